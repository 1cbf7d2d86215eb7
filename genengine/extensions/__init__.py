"""Extensions of the sampling loop, each a small named piece: `genengine.sample(..., extensions=(...))`.

Every row of a run is one fused pass (`ops.sampler_step`) by coefficients that lie on the device. An extension computes
some of them there, from the outputs, before the row; or changes the state after it. None waits for the device, so runs
stay capturable, and a sample's result does not depend on its batch.
"""

from genengine.extensions._protocol import Extension, Run
from genengine.extensions.guidance import CFGZeroStar, GuidanceInterval, PerChannelGuidance, Projected, Rescale

__all__ = ["CFGZeroStar", "Extension", "GuidanceInterval", "PerChannelGuidance", "Projected", "Rescale", "Run"]
