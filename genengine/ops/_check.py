"""Argument checks shared by the public functions of all ops; each message names op, argument, expected, got, remedy."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SEED_LIMIT = 1 << 64


def dtype(op: str, name: str, tensor: Tensor, allowed: tuple = FLOATING) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        names = ", ".join(str(entry) for entry in allowed)
        raise TypeError(f"{op}: {name} must have dtype {names}, got {tensor.dtype}; convert it with .to(...)")


def same_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device} like {like_name}, got {tensor.device}; "
            f"move it with .to({like_name}.device)"
        )


def same_dtype(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must have dtype {like.dtype} like {like_name}, got {tensor.dtype}; "
            f"convert it with .to({like_name}.dtype)"
        )


def shape(op: str, name: str, tensor: Tensor, symbols: str, expected: tuple) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must be {symbols} = {tuple(expected)}, got {tuple(tensor.shape)}")


def overlap(tensor: Tensor, other: Tensor) -> bool:
    """True if the memory spans of two tensors intersect (conservative: holes of a strided view count as its own)."""
    if tensor.numel() == 0 or other.numel() == 0 or tensor.device != other.device:
        return False
    (start, stop), (other_start, other_stop) = _span(tensor), _span(other)
    return start < other_stop and other_start < stop


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def no_grad_needed(op: str, tensors, remedy: str = "call it under torch.no_grad() or detach its inputs") -> None:
    """Refuse to run an op without a backward where autograd would expect one: never a silent zero gradient."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: has no backward, but an input requires grad; {remedy}")


def seed_tensor(op: str, seed, device, batch: int) -> Tensor:
    """`seed` as an int64 tensor of shape () or (batch,), its bits read as unsigned by the kernels."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be an int or an int64 tensor, got a tensor of {seed.dtype}")
        if seed.dim() > 1 or (seed.dim() == 1 and seed.shape[0] != batch):
            raise ValueError(f"{op}: seed must be () or (B,) = ({batch},), got {tuple(seed.shape)}")
        if seed.device != torch.device(device):
            raise ValueError(f"{op}: seed must be on {device}, got {seed.device}; move it with .to(...)")
        return seed.contiguous()
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"{op}: seed must be an int in [0, 2**64) or an int64 tensor, got {type(seed).__name__}")
    value = seed.__index__()
    if not 0 <= value < SEED_LIMIT:
        raise ValueError(f"{op}: seed must be in [0, 2**64), got {value}; reduce it modulo 2**64 if a hash is meant")
    # torch.full, unlike torch.tensor, copies nothing from the host: no synchronisation, and legal under a capture
    return torch.full((), value - SEED_LIMIT if value >> 63 else value, dtype=torch.int64, device=device)


def counter(op: str, name: str, value: int) -> int:
    """A step or stream number: an int in [0, 2^32)."""
    if not isinstance(value, int):
        if not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} must be an int in [0, 2**32), got {type(value).__name__}")
        value = value.__index__()
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{op}: {name} must be in [0, 2**32), got {value}")
    return value


def num(op: str, value) -> int:
    """A number of samples to draw."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: num must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: num must be at least 0, got {value}")
    return value


def temperature(op: str, value) -> float:
    """What logits are divided by: in [1e-6, 1e6]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: temperature must be a float, got {type(value).__name__}")
    if not 1e-6 <= value <= 1e6:
        raise ValueError(f"{op}: temperature must be in [1e-6, 1e6], got {value}")
    return float(value)


def sample_ids(op: str, ids, device, batch: int) -> Tensor | None:
    """`sample_ids` as an int64 (B,) tensor of global sample indices, or None for 0, 1, 2, ..."""
    if ids is None:
        return None
    if not isinstance(ids, Tensor):
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    if ids.dtype != torch.int64:
        raise TypeError(f"{op}: sample_ids must be an int64 tensor, got {ids.dtype}; convert it with .long()")
    shape(op, "sample_ids", ids, "(B,)", (batch,))
    if ids.device != torch.device(device):
        raise ValueError(f"{op}: sample_ids must be on {device}, got {ids.device}; move it with .to(...)")
    return ids.contiguous()


def draw(op: str, like_name: str, like: Tensor, seed, noise, ids, step: int) -> tuple:
    """The arguments of an op that draws noise for every element of `like` (B, ...), or takes it as `noise`.

    Returns (seed, sample_ids, step, noise) as the dispatcher ops take them: seed or noise is None.
    """
    if (seed is None) == (noise is None):
        given = "both" if seed is not None else "neither"
        raise ValueError(f"{op}: exactly one of seed and noise must be given, got {given}")
    if noise is not None:
        dtype(op, "noise", noise)
        shape(op, "noise", noise, f"{like_name}'s shape", like.shape)
        same_device(op, "noise", noise, like_name, like)
    else:
        seed = seed_tensor(op, seed, like.device, like.shape[0])
    return seed, sample_ids(op, ids, like.device, like.shape[0]), counter(op, "step", step), noise
