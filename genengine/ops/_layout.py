"""Memory layouts of elementwise ops: samples dense in C order, or dense channels_last; anything else is copied once."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """True for a 4-D tensor whose samples are dense in (H, W, C) order and not also in C order."""
    if x.dim() != 4 or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1:
        return False
    _, channels, _, width = x.shape
    return x.stride()[1:] == (1, width * channels, channels)


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if channels_last(x) else torch.contiguous_format


def dense(x: Tensor) -> bool:
    """True if every sample is dense in C order; the batch stride is free."""
    if x.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """x itself if its samples are laid out as the pattern's, else a copy that is."""
    if dense(pattern):
        return x if dense(x) else x.contiguous()
    return x if channels_last(x) else x.contiguous(memory_format=torch.channels_last)


def registers(count: int, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """(count, B, ...) history of sampler_step laid out like x, uninitialised: rows read only what rows wrote."""
    if count == 0:
        return None
    flat = torch.empty((count * x.shape[0], *x.shape[1:]), dtype=dtype, device=x.device)
    if channels_last(x):
        flat = flat.contiguous(memory_format=torch.channels_last)
    return flat.view(count, *x.shape)
