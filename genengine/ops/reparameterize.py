"""reparameterize: a sample of a diagonal Gaussian posterior and its KL divergence from the prior, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine import random
from genengine.ops import _check, _layout, _registry
from genengine.ops._cost import per_element, traffic
from genengine.ops.normal import NORMAL_EXPS, NORMAL_FLOPS, reference_normal

_STREAM = random.STREAMS["reparameterize"]
KL = ("analytic", "monte_carlo")


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    step: int = 0,
    kl: str = "analytic",
    free_bits: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw z from q = N(mean, exp(logvar)) and measure KL(q || N(0, 1)), in two reads and one write.

        eps = normal(seed, sample_ids[b], step, stream "reparameterize")       or `noise`
        z   = mean + exp(logvar / 2) eps
        kl  = sum of (mean^2 + exp(logvar) - 1 - logvar) / 2 over a sample     "analytic"
              sum of (z^2 - eps^2 - logvar) / 2 = log q(z) - log N(z; 0, 1)    "monte_carlo", an unbiased estimate

    The backward draws eps again from the seed, so that nothing is kept but mean and logvar.

    mean, logvar: (B, ...) of one dtype, float32, float16, bfloat16 or float64, contiguous or channels_last, or the
    halves of an encoder's output, chunk(2, dim=1) (other strides are copied).
    seed: int in [0, 2^64) or int64 tensor () or (B,); or noise: like mean, float32 or mean's dtype. sample_ids: int64
    (B,), the samples' indices in the data set when training, default 0..B-1. step: the global iteration, in [0, 2^32).
    free_bits: at least 0, in nats: an element adds max(its analytic KL, free_bits), without a gradient below.

    Returns z (B, ...) in mean's dtype and kl (B,) in nats, float32 (float64 of float64). Differentiable once, in both.
    Raises TypeError or ValueError on bad arguments, RuntimeError if the noise requires grad.
    Cost: reads mean, logvar, a given noise, seed, sample_ids, writes z, kl; 11 flops, 2 exponentials per element of z
    ("monte_carlo": 10 and 1), and 6 flops, 1.5 exponentials for a normal that is drawn. Backward: reads grad_z, grad_kl
    besides, writes dmean, dlogvar; 11 flops, 2 exponentials, with free_bits 16 and 2 ("monte_carlo": 10 and 1), and
    the normal again.
    Kingma & Welling 2014, eq. 10 and appendix B; free bits: Kingma et al. 2016, with groups of one element.
    """
    op = "reparameterize"
    _check.dtype(op, "mean", mean)
    if mean.dim() == 0:
        raise ValueError(f"{op}: mean must be (B, ...), got a tensor without dimensions; add a batch with mean[None]")
    _check.dtype(op, "logvar", logvar)
    _check.shape(op, "logvar", logvar, "mean's shape", mean.shape)
    _check.same_device(op, "logvar", logvar, "mean", mean)
    _check.same_dtype(op, "logvar", logvar, "mean", mean)
    if kl not in KL:
        raise ValueError(f"{op}: kl must be one of {', '.join(KL)}, got {kl!r}")
    free_bits = _check_free_bits(op, free_bits, kl)
    _check.no_grad_needed(op, (noise,), "only mean and logvar are differentiable: detach the noise")
    seed, sample_ids, step, noise = _check.draw(op, "mean", mean, seed, noise, sample_ids, step)
    if not (_layout.dense(mean) or _layout.channels_last(mean)):
        mean = mean.contiguous()
    logvar = _layout.like(logvar, mean)
    if noise is not None:
        noise = _layout.like(noise.to(_wide_dtype(mean)), mean)
    kernel = _registry.resolve(REPARAMETERIZE, mean.device, mean.dtype, backend)
    return kernel(mean, logvar, seed, sample_ids, step, noise, free_bits, kl == "monte_carlo")


def _check_free_bits(op, free_bits, kl):
    if isinstance(free_bits, bool) or not isinstance(free_bits, (int, float)):
        raise TypeError(f"{op}: free_bits must be a float, got {type(free_bits).__name__}")
    if not 0 <= free_bits < float("inf"):
        raise ValueError(f"{op}: free_bits must be finite and at least 0, got {free_bits}")
    if free_bits and kl != "analytic":
        raise ValueError(f"{op}: free_bits must be 0 with kl='monte_carlo', got {free_bits}; use kl='analytic'")
    return float(free_bits)


# ---- reference -------------------------------------------------------------------------------------------------------


def reference(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo):
    m, v, eps = _operands(mean, logvar, seed, sample_ids, step, noise)
    z = m + torch.exp(0.5 * v) * eps
    terms = 0.5 * (z * z - eps * eps - v) if monte_carlo else 0.5 * (m * m + torch.exp(v) - 1 - v)
    if free_bits > 0:
        terms = terms.clamp_min(free_bits)
    return _like(z, mean), terms.flatten(1).sum(1) if terms.dim() > 1 else terms


def reference_backward(grad_z, grad_kl, mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo):
    """With s = exp(logvar / 2), g = grad_z and k = grad_kl of the sample:

    analytic      dmean = g + k mean,    dlogvar = g s eps / 2 + k (exp(logvar) - 1) / 2;    k = 0 below free_bits
    monte_carlo   dmean = g + k z,       dlogvar = (g + k z) s eps / 2 - k / 2
    """
    m, v, eps = _operands(mean, logvar, seed, sample_ids, step, noise)
    sigma, variance = torch.exp(0.5 * v), torch.exp(v)
    k = grad_kl.to(m.dtype).reshape(-1, *[1] * (m.dim() - 1)).expand_as(m)
    g = grad_z.to(m.dtype)
    if monte_carlo:
        g = g + k * (m + sigma * eps)
        return _like(g, mean), _like(0.5 * (g * sigma * eps - k), logvar)
    if free_bits > 0:
        k = torch.where(0.5 * (m * m + variance - 1 - v) < free_bits, 0.0, k)
    return _like(g + k * m, mean), _like(0.5 * (g * sigma * eps + k * (variance - 1)), logvar)


def _operands(mean, logvar, seed, sample_ids, step, noise):
    if noise is None:
        noise = torch.empty(mean.shape, dtype=torch.float32, device=mean.device)
        reference_normal(noise, seed, sample_ids, step, _STREAM)
    return tuple(t.to(_wide_dtype(mean)) for t in (mean, logvar, noise))


def _wide_dtype(mean):
    return torch.float64 if mean.dtype == torch.float64 else torch.float32


def _like(value, tensor):
    return torch.empty_like(tensor).copy_(value)


# ---- shapes, gradients, schemas --------------------------------------------------------------------------------------


def _fake(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo):
    return torch.empty_like(mean), mean.new_empty(mean.shape[0], dtype=_wide_dtype(mean))


def _fake_backward(grad_z, grad_kl, mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo):
    return torch.empty_like(mean), torch.empty_like(logvar)


def _setup_context(ctx, inputs, output):
    mean, logvar, seed, sample_ids, ctx.step, noise, ctx.free_bits, ctx.monte_carlo = inputs
    ctx.save_for_backward(mean, logvar, seed, sample_ids, noise)


def _grads(ops, ctx, grad_z, grad_kl):
    mean, logvar, seed, sample_ids, noise = ctx.saved_tensors
    if grad_z is None:
        grad_z = torch.empty_like(mean).zero_()
    if grad_kl is None:
        grad_kl = mean.new_zeros(mean.shape[0], dtype=_wide_dtype(mean))
    once = "it is differentiable once: drop create_graph=True"
    _check.no_grad_needed("reparameterize_backward", (grad_z, grad_kl, mean, logvar), once)
    grad_z = _layout.like(grad_z, mean)
    options = (seed, sample_ids, ctx.step, noise, ctx.free_bits, ctx.monte_carlo)
    found = ops.reparameterize_backward(grad_z, grad_kl.contiguous(), mean, logvar, *options)
    return (*found, None, None, None, None, None, None)


def _cost(arguments, results):
    *_, monte_carlo = arguments
    flops, exps = (10, 1) if monte_carlo else (11, 2)
    return _cost_with_noise(arguments, results, flops, exps)


def _cost_backward(arguments, results):
    *_, free_bits, monte_carlo = arguments
    flops, exps = (10, 1) if monte_carlo else (16 if free_bits > 0 else 11, 2)
    return _cost_with_noise(arguments, results, flops, exps)


def _cost_with_noise(arguments, results, flops, exps):
    drawn = arguments[-3] is None
    count = arguments[0].numel()
    return per_element(traffic(arguments, results), count, flops + drawn * NORMAL_FLOPS, exps + drawn * NORMAL_EXPS)


_OPTIONS = "Tensor? seed, Tensor? sample_ids, SymInt step, Tensor? noise, float free_bits, bool monte_carlo"
_GRADS = "Tensor grad_z, Tensor grad_kl"
_registry.define(
    f"reparameterize_backward({_GRADS}, Tensor mean, Tensor logvar, {_OPTIONS}) -> (Tensor, Tensor)",
    reference_backward,
    fake=_fake_backward,
    module="reparameterize",
    cost=_cost_backward,
)
REPARAMETERIZE = _registry.define(
    f"reparameterize(Tensor mean, Tensor logvar, {_OPTIONS}) -> (Tensor, Tensor)",
    reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_grads,
    module="reparameterize",
    cost=_cost,
)
