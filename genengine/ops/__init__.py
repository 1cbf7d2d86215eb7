"""The fused ops. Each lives in a file of its own name, its eager reference directly under the formula."""

from genengine.ops import _registry
from genengine.ops.adaln import adaln, gated_adaln
from genengine.ops.attention import attention
from genengine.ops.diffuse import diffuse
from genengine.ops.ema_update import ema_update
from genengine.ops.group_norm_silu import group_norm_silu
from genengine.ops.logistic_mixture import logistic_mixture_log_prob, logistic_mixture_sample
from genengine.ops.normal import normal, uniform
from genengine.ops.reparameterize import reparameterize
from genengine.ops.sampler_step import advance, sampler_step

# Loaded after every schema is defined: the shared object holds implementations only.
EXTENSION = _registry.load_extension()
backend = _registry.backend

__all__ = [
    "EXTENSION", "adaln", "advance", "attention", "backend", "diffuse", "ema_update", "gated_adaln",
    "group_norm_silu", "logistic_mixture_log_prob", "logistic_mixture_sample",
    "normal", "reparameterize", "sampler_step", "uniform",
]  # fmt: skip
