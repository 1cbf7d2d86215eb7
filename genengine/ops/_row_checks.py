"""Argument checks shared by the ops that apply a row of a table: sampler_step, advance and patch_step."""

from __future__ import annotations

import torch

from genengine.ops import _check, _layout
from genengine.table import COLUMNS

MAX_HISTORY = 3


def check_step(op, step, x):
    _check.dtype(op, "step", step, (torch.int32,))
    _check.shape(op, "step", step, "(B,)", (x.shape[0],))
    _check.same_device(op, "step", step, "x", x)


def check_table(op, table, step, shared=False):
    """shared: the batch may be several copies of the table's, as where the branches of a model step together."""
    _check.dtype(op, "table", table, (torch.float32, torch.float64))
    batch = step.shape[0]
    columns = len(COLUMNS)
    if table.dim() != 3 or table.shape[2] != columns or table.shape[0] == 0:
        raise ValueError(f"{op}: table must be (R, B or 1, {columns}) with R >= 1, got {tuple(table.shape)}")
    fits = table.shape[1] in (1, batch) or (shared and table.shape[1] > 0 and batch % table.shape[1] == 0)
    if not fits:
        raise ValueError(f"{op}: table must be (R, B or 1, {columns}) with B = {batch}, got {tuple(table.shape)}")
    _check.same_device(op, "table", table, "step", step)


def check_draws(op, x, seed, noise):
    if seed is not None and noise is not None:
        raise ValueError(f"{op}: seed and noise exclude each other, got both; leave one out")
    if noise is not None:
        _check.dtype(op, "noise", noise)
        _check.shape(op, "noise", noise, "x's shape", x.shape)
        _check.same_device(op, "noise", noise, "x", x)


def check_history(op, history, x):
    _check.dtype(op, "history", history, (torch.float32, torch.float64))
    if history.dim() != x.dim() + 1 or history.shape[1:] != x.shape or not 1 <= history.shape[0] <= MAX_HISTORY:
        raise ValueError(
            f"{op}: history must be (K, {', '.join(map(str, x.shape))}) with 1 <= K <= {MAX_HISTORY}, "
            f"got {tuple(history.shape)}"
        )
    _check.same_device(op, "history", history, "x", x)


def check_x_in(op, x_in, x, output, output_name):
    _check.same_dtype(op, "x_in", x_in, output_name, output)
    if x_in.dim() != x.dim() or x_in.shape[1:] != x.shape[1:] or (x.shape[0] and x_in.shape[0] % x.shape[0]):
        raise ValueError(f"{op}: x_in must be (k B, ...) with (B, ...) = {tuple(x.shape)}, got {tuple(x_in.shape)}")
    _check.same_device(op, "x_in", x_in, "x", x)


def check_written_layout(op, out, history, x_in):
    """What is written cannot be copied first: it must share one layout."""
    if not (_layout.dense(out) or _layout.channels_last(out)):
        raise ValueError(f"{op}: out must be contiguous or channels_last, got strides {out.stride()}")
    written = [("x_in", x_in)] if x_in is not None else []
    if history is not None and history.shape[1]:
        written += [(f"history[{k}]", history[k]) for k in range(history.shape[0])]
    for name, tensor in written:
        if _layout.like(tensor, out) is not tensor:
            raise ValueError(
                f"{op}: {name} must be laid out like out (strides {out.stride()}), got {tensor.stride()}; "
                "allocate it in the same memory format"
            )


def check_overlaps(op, out, history, x_in, x, read):
    """What is written must overlap nothing else written, and nothing read but x, updated in place.

    read: (name, tensor or None) of the arguments beside x.
    """
    written = [(name, t) for name, t in (("out", out), ("history", history), ("x_in", x_in)) if t is not None]
    read = [("x", x), *((name, tensor) for name, tensor in read if tensor is not None)]
    for index, (name, tensor) in enumerate(written):
        if tensor.numel() and any(
            size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ValueError(f"{op}: {name} must not be expanded, got strides {tensor.stride()}; use .clone()")
        for other_name, other in (*written[:index], *read):
            in_place = name == "out" and other_name == "x" and _same_memory(out, x)
            if not in_place and _check.overlap(tensor, other):
                raise ValueError(
                    f"{op}: {name} must not overlap {other_name}; pass a tensor of its own"
                    + (", or x itself" if name == "out" else "")
                )


def _same_memory(a, b):
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
