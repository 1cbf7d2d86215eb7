"""The eager twin of any model: every fused op swapped for what one writes in plain PyTorch.

    with eager.ops():
        loss = model.loss(x0, labels, seed=0)       the same network and weights, no kernel of ours

torch.compile traces through it. Noise is torch's own, from its global generator; with same_noise=True it is ours, drawn
once per call as in the fused model, so that losses and samples can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from genengine import ops as fused
from genengine.benchmarks.bench_adaln import eager_adaln, eager_gated_adaln
from genengine.benchmarks.bench_logistic_mixture import eager as eager_logistic_mixture
from genengine.nets import layers
from genengine.ops._activations import ACTIVATIONS


@contextlib.contextmanager
def ops(*, same_noise: bool = False) -> Iterator[None]:
    """Inside, `genengine.ops.<name>` is the plain form of every op that models call."""
    plain = {name: function for name, function in PLAIN.items() if not (same_noise and name in _NOISE)}
    if same_noise:
        plain |= {"diffuse": _diffuse(_our_noise), "reparameterize": _reparameterize(_our_noise)}
    kept, epilogue = {name: getattr(fused, name) for name in plain}, layers.GELU_EPILOGUE
    for name, function in plain.items():
        setattr(fused, name, function)
    layers.GELU_EPILOGUE = ()
    try:
        yield
    finally:
        layers.GELU_EPILOGUE = epilogue
        for name, function in kept.items():
            setattr(fused, name, function)


def calling(function: Callable, *, same_noise: bool = False) -> Callable:
    """The function, called inside `ops`."""

    def call(*args, **kwargs):
        with ops(same_noise=same_noise):
            return function(*args, **kwargs)

    return call


def attention(q, k, v, *, causal=False, scale=None):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def bias_act(x, bias=None, *, activation="linear", alpha=0.2, gain=1.0, clamp=None, dim=1):
    if bias is not None:
        x = x + bias.view([-1 if i == dim % x.dim() else 1 for i in range(x.dim())])
    x = ACTIVATIONS[activation].value(x, alpha)
    x = x if gain == 1.0 else x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def bias_gelu(x, bias=None, *, approximate="none"):
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def geglu(x, bias=None, *, approximate="none", gate_first=True):
    gate, value = _halves(x, bias, gate_first)
    return F.gelu(gate, approximate=approximate) * value


def swiglu(x, bias=None, *, gate_first=True):
    gate, value = _halves(x, bias, gate_first)
    return F.silu(gate) * value


def _halves(x, bias, gate_first):
    first, second = (x if bias is None else x + bias).chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def group_norm_silu(x, weight, bias, num_groups, scale=None, shift=None, eps=1e-5, *, silu=True):
    x = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        shape = (*scale.shape, *[1] * (x.dim() - 2))
        x = x * (1 + scale.view(shape)) + shift.view(shape)
    return F.silu(x) if silu else x


def add_group_norm_silu(x, branch, *rest, **options):
    x = x + branch
    return x, group_norm_silu(x, *rest, **options)


def ema_update(averages, values, decay):
    for average, value in zip(averages, values, strict=True):
        average.mul_(decay).add_(value, alpha=1 - decay)


def normal(shape, *, device=None, dtype=torch.float32, **_):
    return torch.randn(shape, device=device, dtype=dtype)


def uniform(shape, *, device=None, dtype=torch.float32, **_):
    return torch.rand(shape, device=device, dtype=dtype)


def _torch_noise(like, stream, seed, sample_ids, step):
    return torch.randn_like(like)


def _our_noise(like, stream, seed, sample_ids, step):
    draw = {"seed": seed, "sample_ids": sample_ids, "step": step, "stream": stream}
    return fused.normal(like.shape, device=like.device, **draw).to(like.dtype)


def _diffuse(draw):
    def diffuse(x0, alpha, sigma, c_x0, c_eps, *, seed=None, noise=None, sample_ids=None, step=0):
        eps = draw(x0, "diffuse", seed, sample_ids, step) if noise is None else noise
        alpha, sigma, c_x0, c_eps = (c.view(-1, *[1] * (x0.dim() - 1)) for c in (alpha, sigma, c_x0, c_eps))
        return alpha * x0 + sigma * eps, c_x0 * x0 + c_eps * eps

    return diffuse


def _reparameterize(draw):
    def reparameterize(mean, logvar, *, seed=None, noise=None, sample_ids=None, step=0, kl="analytic", free_bits=0.0):
        eps = draw(mean, "reparameterize", seed, sample_ids, step) if noise is None else noise
        z = mean + (0.5 * logvar).exp() * eps
        if kl == "monte_carlo":
            terms = 0.5 * (z.square() - eps.square() - logvar)
        else:
            terms = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
            terms = terms.clamp(min=free_bits) if free_bits else terms
        return z, terms.flatten(1).sum(1)

    return reparameterize


_NOISE = ("normal", "uniform")
PLAIN: dict[str, Callable] = {
    "adaln": eager_adaln, "gated_adaln": eager_gated_adaln, "attention": attention, "bias_act": bias_act,
    "bias_gelu": bias_gelu, "geglu": geglu, "swiglu": swiglu, "group_norm_silu": group_norm_silu,
    "add_group_norm_silu": add_group_norm_silu,
    "ema_update": ema_update, "normal": normal, "uniform": uniform, "diffuse": _diffuse(_torch_noise),
    "reparameterize": _reparameterize(_torch_noise), "logistic_mixture_log_prob": eager_logistic_mixture,
}  # fmt: skip
