"""genengine: fused kernels for generative models, and the samplers and thin models that use them.

import genengine

table = genengine.solvers.euler(genengine.paths.RectifiedFlow(), genengine.schedules.uniform(50),
                                prediction="velocity", guidance_scale=2.0)
images = genengine.sample(denoiser, table, (16, 4, 64, 64), cond={"y": labels}, uncond={"y": null}, seed=0)
"""

from genengine import extensions, ops, paths, schedules, solvers
from genengine.engine import Engine
from genengine.ops import backend
from genengine.sampler import sample
from genengine.table import CoefficientTable
from genengine.trace import trace

__version__ = "0.1.0"
__all__ = [
    "CoefficientTable", "Engine", "backend", "extensions", "ops", "paths", "sample", "schedules", "solvers", "trace",
]  # fmt: skip
