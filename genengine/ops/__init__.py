"""The fused ops. Each lives in a file of its own name, its eager reference directly under the formula."""

from genengine.ops import _ranges, _registry
from genengine.ops.adaln import adaln, gated_adaln
from genengine.ops.attention import attention
from genengine.ops.bias_act import bias_act, bias_gelu
from genengine.ops.diffuse import diffuse
from genengine.ops.ema_update import ema_update
from genengine.ops.glu import geglu, swiglu
from genengine.ops.group_norm_silu import add_group_norm_silu, group_norm_silu
from genengine.ops.guidance_moments import guidance_moments
from genengine.ops.logistic_mixture import logistic_mixture_log_prob, logistic_mixture_sample
from genengine.ops.normal import normal, uniform
from genengine.ops.patch_step import patch_step
from genengine.ops.pixelcnn_sample import PixelCNNSamples, PixelCNNWeights, pack_pixelcnn, pixelcnn_sample
from genengine.ops.qk_norm_rope import qk_norm_rope
from genengine.ops.reparameterize import reparameterize
from genengine.ops.sampler_step import advance, sampler_step
from genengine.ops.transformer_sample import Sequences, TransformerWeights, pack_transformer, transformer_sample

# Loaded after every schema is defined: the shared object holds implementations only.
EXTENSION = _registry.load_extension()
_ranges.from_environment()
backend = _registry.backend

__all__ = [
    "EXTENSION", "PixelCNNSamples", "PixelCNNWeights", "Sequences", "TransformerWeights", "adaln",
    "add_group_norm_silu", "advance", "attention", "backend", "bias_act", "bias_gelu", "diffuse", "ema_update",
    "gated_adaln", "geglu", "group_norm_silu", "guidance_moments", "logistic_mixture_log_prob",
    "logistic_mixture_sample", "normal", "pack_pixelcnn", "pack_transformer", "patch_step", "pixelcnn_sample",
    "qk_norm_rope", "reparameterize", "sampler_step", "swiglu", "transformer_sample", "uniform",
]  # fmt: skip
