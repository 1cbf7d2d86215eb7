"""Rotary tables: the cosines and sines by which `ops.qk_norm_rope` rotates tokens to positions on one or more axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, dim: int, *, theta: float = 10000.0, axes: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of R = dim rotated elements.

        angle[n, i] = positions[n, a] theta^(-2 j / axes[a])        i = axes[0] / 2 + ... + axes[a - 1] / 2 + j

    Every axis rotates its own axes[a] elements, in the order of the axes, with its own frequencies.

    positions: (N,) or (N, A), integers or floats: 1-D text, 2-D images, 3-D video; `grid_positions` makes them.
    dim: R, even, at most the head's D. theta: > 0, the longest wavelength over 2 pi.
    axes: A even ints that sum to dim. Default: dim split as evenly as even parts allow, the first axes taking the rest:
    64 over 3 axes is (22, 22, 20).

    Returns cos and sin, (N, dim / 2) float32 on the positions' device, computed in float64.
    Raises TypeError or ValueError on bad arguments.
    Su et al. 2021, "RoFormer"; axial: Heo et al. 2024, "Rotary position embedding for vision transformer".
    """
    if not isinstance(positions, Tensor) or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"rope_table: positions must be a tensor of integers or floats, got {_kind(positions)}")
    if positions.dim() not in (1, 2) or (positions.dim() == 2 and positions.shape[1] == 0):
        raise ValueError(f"rope_table: positions must be (N,) or (N, A), got {tuple(positions.shape)}")
    positions = positions.double() if positions.dim() == 2 else positions.double()[:, None]  # (N, A)
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_table: dim must be even and at least 2, got {dim}")
    if not theta > 0:
        raise ValueError(f"rope_table: theta must be positive, got {theta}")
    axes = _even_split(dim, positions.shape[1]) if axes is None else tuple(axes)
    if len(axes) != positions.shape[1] or sum(axes) != dim or any(part < 0 or part % 2 for part in axes):
        raise ValueError(f"rope_table: axes must be {positions.shape[1]} even sizes that sum to {dim}, got {axes}")
    parts = []
    for place, part in zip(positions.unbind(1), axes, strict=True):
        exponent = torch.arange(0, part, 2, dtype=torch.float64, device=positions.device) / max(part, 1)
        parts.append(place[:, None] * theta**-exponent)  # (N, part / 2)
    angle = torch.cat(parts, 1)
    return angle.cos().float(), angle.sin().float()


def grid_positions(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """The positions of a grid's tokens, the last axis fastest: (sizes[0] * ... * sizes[-1], A) int64."""
    if not sizes:
        raise ValueError("grid_positions: at least one size is needed, got none")
    places = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    return torch.stack([place.reshape(-1) for place in places], 1)


def _even_split(dim, count):
    pairs, rest = divmod(dim // 2, count)
    return tuple(2 * (pairs + (axis < rest)) for axis in range(count))


def _kind(value):
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
