"""diffuse: the forward process and its regression target, for training, with the noise drawn in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from genengine import random
from genengine.ops import _check, _layout, _registry
from genengine.ops._cost import per_element, traffic
from genengine.ops.normal import NORMAL_EXPS, NORMAL_FLOPS, reference_normal

_DIFFUSE_STREAM = random.STREAMS["diffuse"]


def diffuse(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    c_x0: Tensor,
    c_eps: Tensor,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Tensor | None = None,
    step: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise clean data and form what the network must predict, in one read and two writes.

        eps    = normal(seed, sample_ids[b], step, stream "diffuse")       or `noise`
        x_t    = alpha[b] x0 + sigma[b] eps
        target = c_x0[b] x0 + c_eps[b] eps

    x0: (B, ...) float32, float16, bfloat16 or float64, contiguous or channels_last (else copied).
    alpha, sigma, c_x0, c_eps: (B,) float32, from `genengine.paths` and `genengine.prediction.target`.
    seed: int in [0, 2^64) or int64 tensor () or (B,); or noise: like x0, float32 or x0's dtype. sample_ids: int64 (B,),
    the samples' indices in the data set when training, default 0..B-1. step: the global iteration, in [0, 2^32).

    Returns (x_t, target), each (B, ...) in x0's dtype. Differentiable in x0 only.
    Raises TypeError or ValueError on bad arguments, RuntimeError if a coefficient or the noise requires grad.
    Cost: reads x0, the coefficients, a given noise, seed, sample_ids, writes x_t, target; 6 flops, no exponential per
    element of x0, and 6 flops, 1.5 exponentials for a normal that is drawn. The backward is torch's own.
    Ho et al. 2020, eq. 4; Lipman et al. 2023, eq. 20.
    """
    op = "diffuse"
    _check.dtype(op, "x0", x0)
    if x0.dim() == 0:
        raise ValueError(f"{op}: x0 must be (B, ...), got a tensor without dimensions; add a batch with x0[None]")
    batch = x0.shape[0]
    coefficients = {"alpha": alpha, "sigma": sigma, "c_x0": c_x0, "c_eps": c_eps}
    for name, value in coefficients.items():
        _check.dtype(op, name, value, (torch.float32, torch.float64))
        _check.shape(op, name, value, "(B,)", (batch,))
        _check.same_device(op, name, value, "x0", x0)
    _check.no_grad_needed(
        op, (*coefficients.values(), noise), "only x0 is differentiable: detach the coefficients and the noise"
    )
    seed, sample_ids, step, noise = _check.draw(op, "x0", x0, seed, noise, sample_ids, step)
    if not (_layout.dense(x0) or _layout.channels_last(x0)) or not _packed(x0):
        x0 = x0.contiguous()
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    if noise is not None:
        noise = _layout.like(noise.to(wide), x0)
    values = [value.to(wide).contiguous() for value in coefficients.values()]
    kernel = _registry.resolve(DIFFUSE, x0.device, x0.dtype, backend)
    return kernel(x0, *values, seed, sample_ids, step, noise)


def _packed(x):
    """No holes between samples, so that empty_like keeps the strides."""
    return x.shape[0] < 2 or x.stride(0) == x[:1].numel()


# ---- reference ---------------------------------------------------------------------------------------------------


def reference(x0, alpha, sigma, c_x0, c_eps, seed, sample_ids, step, noise):
    if noise is None:
        noise = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)
        reference_normal(noise, seed, sample_ids, step, _DIFFUSE_STREAM)
    column = lambda value: value.reshape(-1, *[1] * (x0.dim() - 1))  # noqa: E731
    clean, eps = x0.to(alpha.dtype), noise.to(alpha.dtype)
    x_t = column(alpha) * clean + column(sigma) * eps
    target = column(c_x0) * clean + column(c_eps) * eps
    return _as(x_t, x0), _as(target, x0)


def _as(value, x0):
    return torch.empty_like(x0).copy_(value)


def _fake(x0, alpha, sigma, c_x0, c_eps, seed, sample_ids, step, noise):
    return torch.empty_like(x0), torch.empty_like(x0)


def _setup_context(ctx, inputs, output):
    _, alpha, _, c_x0, *_ = inputs
    ctx.save_for_backward(alpha, c_x0)


def _backward(ops, ctx, grad_x_t, grad_target):
    """d x0 = alpha d x_t + c_x0 d target."""
    alpha, c_x0 = ctx.saved_tensors
    column = lambda value, like: value.reshape(-1, *[1] * (like.dim() - 1))  # noqa: E731
    total = None
    for coefficient, grad in ((alpha, grad_x_t), (c_x0, grad_target)):
        if grad is not None:
            part = (column(coefficient, grad) * grad).to(grad.dtype)
            total = part if total is None else total + part
    return total, None, None, None, None, None, None, None, None


def _cost(arguments, results):
    x0, *_, noise = arguments
    drawn = noise is None
    flops, exps = 6 + drawn * NORMAL_FLOPS, drawn * NORMAL_EXPS
    return per_element(traffic(arguments, results), x0.numel(), flops, exps)


DIFFUSE = _registry.define(
    "diffuse(Tensor x0, Tensor alpha, Tensor sigma, Tensor c_x0, Tensor c_eps, Tensor? seed, Tensor? sample_ids, "
    "SymInt step, Tensor? noise) -> (Tensor, Tensor)",
    reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    module="diffuse",
    cost=_cost,
)
