"""Extensions of the sampling loop, each a small named piece: `genengine.sample(..., extensions=(...))`.

Every row of a run is one fused pass (`ops.sampler_step`) by coefficients that lie on the device. An extension computes
some of them there, from the outputs, before the row; or changes the state after it. None waits for the device, so runs
stay capturable, and a sample's result does not depend on its batch (but for `Langevin` with norms="batch").

    Rescale, CFGZeroStar, Projected, PerChannelGuidance, GuidanceInterval      guidance
    DynamicThreshold                                                           the radius that x0 is clamped to
    Inpaint                                                                    parts of x that are known
    Langevin                                                                   corrector steps

`image_to_image` makes the state to start from, and `token_step` is the row for tokens at times of their own. Extensions
act in the order given: one that guides before one that looks at the guided output.
"""

from genengine.extensions._protocol import Extension, Run
from genengine.extensions.corrector import Langevin
from genengine.extensions.editing import Inpaint, image_to_image
from genengine.extensions.guidance import CFGZeroStar, GuidanceInterval, PerChannelGuidance, Projected, Rescale
from genengine.extensions.threshold import DynamicThreshold
from genengine.extensions.tokens import token_step

__all__ = [
    "CFGZeroStar", "DynamicThreshold", "Extension", "GuidanceInterval", "Inpaint", "Langevin", "PerChannelGuidance",
    "Projected", "Rescale", "Run", "image_to_image", "token_step",
]  # fmt: skip
