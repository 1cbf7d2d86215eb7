"""Paths from data to noise: x_t = alpha(t) x_0 + sigma(t) eps with eps ~ N(0, I).

The time convention of the whole library stands here: t = 0 is data, t = 1 is noise. Adapters convert at the
border. Every path is a frozen dataclass; its methods take a number or an array of times in [0, 1] and return
float64. Where a derivative or log-SNR is infinite, infinity is returned; solvers know how to avoid such ends.
"""

from genengine.paths._base import Path, VariancePreserving
from genengine.paths.continuous import EDM, VE, Cosine, RectifiedFlow, Sigmoid, Trigonometric, VPLinear
from genengine.paths.discrete import DDPMCosine, DDPMLinear, DDPMSigmoid, Discrete, ScaledLinear, ZeroTerminalSNR

__all__ = [
    "EDM",
    "VE",
    "Cosine",
    "DDPMCosine",
    "DDPMLinear",
    "DDPMSigmoid",
    "Discrete",
    "Path",
    "RectifiedFlow",
    "ScaledLinear",
    "Sigmoid",
    "Trigonometric",
    "VPLinear",
    "VariancePreserving",
    "ZeroTerminalSNR",
]
