"""guidance_moments: the sums of two model branches that guidance methods are made of, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genengine.ops import _check, _layout, _registry
from genengine.ops._cost import each

MOMENTS = ("u", "c", "u^2", "u c", "c^2", "(c - u)^2")


def guidance_moments(outputs: Tensor | Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Sum u, c, u^2, u c, c^2 and (c - u)^2 over each sample, u the unconditional and c the conditional branch.

    Rescaled, optimised and projected guidance are w_u u + w_c c with weights that follow from these sums (see
    `genengine.extensions`). The last one also follows from the others, but by a difference that cancels where the
    branches are close.

    outputs: the two branches (B, ...), unconditional first, or one tensor (2 B, ...) that stacks them; of one dtype,
    float32, float16, bfloat16 or float64, contiguous or channels_last (views with dense samples too; else copied).

    Returns (B, 6) float32 (float64 of float64), columns as `MOMENTS`. From a kernel, a sample's sums have the same bits
    in any batch. Inference only. Raises TypeError or ValueError on bad arguments, RuntimeError where a gradient would
    be needed.
    Cost: reads u, c, writes (B, 6) sums; 11 flops, no exponential per element of u.
    """
    u, c = _branches(outputs)
    _check.no_grad_needed("guidance_moments", (u, c))
    if not (_layout.dense(u) or _layout.channels_last(u)):
        u = u.contiguous()
    return _registry.resolve(GUIDANCE_MOMENTS, u.device, u.dtype, backend)(u, _layout.like(c, u))


def _branches(outputs):
    op = "guidance_moments"
    if isinstance(outputs, Tensor):
        _check.dtype(op, "outputs", outputs)
        if outputs.dim() == 0 or outputs.shape[0] % 2:
            raise ValueError(f"{op}: outputs must stack two branches (2 B, ...), got {tuple(outputs.shape)}")
        return outputs.tensor_split(2)
    if len(outputs) != 2:
        raise ValueError(f"{op}: outputs must hold 2 branches, unconditional first, got {len(outputs)}")
    u, c = outputs
    _check.dtype(op, "outputs[0]", u)
    if u.dim() == 0:
        raise ValueError(f"{op}: outputs must be (B, ...), got tensors without dimensions; add a batch with [None]")
    _check.same_dtype(op, "outputs[1]", c, "outputs[0]", u)
    _check.shape(op, "outputs[1]", c, "the shape of outputs[0]", u.shape)
    _check.same_device(op, "outputs[1]", c, "outputs[0]", u)
    return u, c


# ---- reference -------------------------------------------------------------------------------------------------------


def reference(u, c):
    u, c = (t.to(_wide_dtype(t)).flatten(1) if t.dim() > 1 else t.to(_wide_dtype(t))[:, None] for t in (u, c))
    return torch.stack([term.sum(1) for term in (u, c, u * u, u * c, c * c, (c - u) * (c - u))], dim=1)


def _wide_dtype(u):
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _fake(u, c):
    return u.new_empty((u.shape[0], len(MOMENTS)), dtype=_wide_dtype(u))


GUIDANCE_MOMENTS = _registry.define(
    "guidance_moments(Tensor u, Tensor c) -> Tensor",
    reference,
    fake=_fake,
    module="guidance_moments",
    cost=each(flops=11),
)
