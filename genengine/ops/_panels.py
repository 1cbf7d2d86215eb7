"""Weights of small products in panels: the layout that the kernels of autoregressive sampling read.

A product y = x W with W (K, N) is stored in panels of sixteen columns, the vector of every instruction set in use:

    float32, float64:  [N / 16][K][16]            one row of a panel is 64 or 128 bytes in a row
    bfloat16:          [N / 16][K / 2][16][2]     two values of k side by side, as the instructions that multiply pairs
                                                  take them (AVX512-BF16's vdpbf16ps, the GPU's mma)

N is filled with zeros to a multiple of sixteen, K to an even number, for every dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16


def padded(k: int, n: int) -> tuple[int, int]:
    """(K, N) as stored."""
    return k + k % 2, -(-n // PANEL) * PANEL


def numel(k: int, n: int) -> int:
    """Elements that a (K, N) matrix takes."""
    k, n = padded(k, n)
    return k * n


def pack(matrix: Tensor) -> Tensor:
    """(K, N) to its panels, flat, in the dtype it has."""
    rows, columns = padded(*matrix.shape)
    full = matrix.new_zeros(rows, columns)
    full[: matrix.shape[0], : matrix.shape[1]] = matrix
    panels = full.view(rows, -1, PANEL).transpose(0, 1)  # (N / 16, K, 16)
    if matrix.dtype == torch.bfloat16:
        panels = panels.unflatten(1, (rows // 2, 2)).transpose(2, 3)  # (N / 16, K / 2, 16, 2)
    return panels.reshape(-1)


def unpack(flat: Tensor, k: int, n: int) -> Tensor:
    """The (K, N) matrix that `pack` was given; a copy, or a view of `flat` where a single panel holds it."""
    rows, columns = padded(k, n)
    if flat.dtype == torch.bfloat16:
        panels = flat.view(-1, rows // 2, PANEL, 2).transpose(2, 3).reshape(-1, rows, PANEL)
    else:
        panels = flat.view(-1, rows, PANEL)
    return panels.transpose(0, 1).reshape(rows, columns)[:k, :n].contiguous()
