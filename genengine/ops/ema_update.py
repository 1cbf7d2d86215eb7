"""ema_update: the exponential moving average of a whole model's weights, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genengine.ops import _check, _registry
from genengine.ops._cost import per_element, traffic


def ema_update(
    averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, *, backend: str | None = None
) -> None:
    """Move every average towards its value, in place.

        average <- average + (1 - decay) (value - average)

    One kernel updates all tensors, however many: two reads and one write per element. Averages keep their dtype, the
    arithmetic is float32 (a 16-bit average loses what is below its last place: keep averages float32).

    averages, values: as many tensors, each value of its average's shape; float32, float16, bfloat16 or float64, freely
    mixed, all on one device. Any strides; pairs that are not dense in the same order are copied once.
    decay: in [0, 1]. backend: see `genengine.backend`.

    No backward: call it under torch.no_grad(), as after an optimiser's step.
    Raises TypeError or ValueError on bad arguments, RuntimeError where autograd would need a gradient.
    Cost: reads averages, values, writes averages; 3 flops, no exponential per element of averages.
    Polyak & Juditsky 1992.
    """
    op = "ema_update"
    averages, values = list(averages), list(values)
    if len(averages) != len(values):
        raise ValueError(f"{op}: values must be as many as averages = {len(averages)}, got {len(values)}")
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"{op}: decay must be a float, got {type(decay).__name__}")
    if not 0 <= decay <= 1:
        raise ValueError(f"{op}: decay must be in [0, 1], got {decay}")
    for i, (average, value) in enumerate(zip(averages, values, strict=True)):
        _check.dtype(op, f"averages[{i}]", average)
        _check.dtype(op, f"values[{i}]", value)
        _check.shape(op, f"values[{i}]", value, f"averages[{i}]'s shape", average.shape)
        _check.same_device(op, f"averages[{i}]", average, "averages[0]", averages[0])
        _check.same_device(op, f"values[{i}]", value, "averages[0]", averages[0])
    _check.no_grad_needed(op, (*averages, *values), "call it under torch.no_grad()")
    if not averages:
        return
    dense = [average if _is_dense(average) else average.contiguous() for average in averages]
    values = [_laid_out(value, average) for value, average in zip(values, dense, strict=True)]
    dtypes = {tensor.dtype for tensor in (*averages, *values)}
    dtype = torch.float64 if torch.float64 in dtypes else averages[0].dtype
    _registry.resolve(EMA_UPDATE, averages[0].device, dtype, backend)(dense, values, 1.0 - decay)
    for average, copy in zip(averages, dense, strict=True):
        if copy is not average:
            average.copy_(copy)
    if not torch.compiler.is_compiling():  # the dispatcher does not count what a kernel of ours writes
        torch.autograd.graph.increment_version([average for average in averages if not average.is_inference()])


def _is_dense(tensor):
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(tensor)


def _laid_out(value, average):
    if value.stride() == average.stride() or (value.is_contiguous() and average.is_contiguous()):
        return value
    return torch.empty_like(average, dtype=value.dtype).copy_(value)


# ---- reference -------------------------------------------------------------------------------------------------------


def reference(averages, values, weight):
    for average, value in zip(averages, values, strict=True):
        wide = torch.float64 if torch.float64 in (average.dtype, value.dtype) else torch.float32
        a, v = average.to(wide), value.to(wide)
        average.copy_(a + weight * (v - a))


def _fake(averages, values, weight):
    return None


def _cost(arguments, results):
    averages, values, _ = arguments
    count = sum(average.numel() for average in averages)
    return per_element(traffic(averages, values, averages), count, flops=3)


EMA_UPDATE = _registry.define(
    "ema_update(Tensor(a!)[] averages, Tensor[] values, float weight) -> ()",
    reference,
    fake=_fake,
    module="ema_update",
    cost=_cost,
)
