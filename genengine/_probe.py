"""Basis tensors for `genengine.trace`: what is pushed through a sampler, and how its coefficients are read off.

Every element of a probe tensor is an experiment of its own, because a sampler's step acts on elements alone. For each
row there is one element where only its state x is not zero, one where only its model output is, one for each draw of
noise, and two more of each where x or the output is so large that a step which clamps p x + q m shows what is left of
them beside the clamped part. All elements of a row stand together; element 0 has no input, so it shows a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SMALL = 1e-6  # below any clamp; coefficients are read with 16 digits all the same, as there is no constant beside them
LARGE = 1e8  # above any clamp, unless the clamped part hardly depends on x or m
MAX_DRAWS = 4

_INPUTS = np.array(
    [[SMALL, 0], [0, SMALL], [LARGE, 0], [2 * LARGE, 0], [0, LARGE], [0, 2 * LARGE]]
)  # (x, m) by element
_X, _M, _LARGE_X, _LARGER_X, _LARGE_M, _LARGER_M = range(6)
_DRAW = len(_INPUTS)
_ELEMENTS = _DRAW + MAX_DRAWS
_DRAWS = (torch.randn, torch.randn_like)
_NARROWING = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class Reading:
    """The coefficients of one output on the inputs of all rows, each (R,) float64.

    The output is const + sum_j direct_x[j] x_j + direct_m[j] m_j + clamped[j] clamp(p_j x_j + q_j m_j, -1, 1) +
    draws[j] z_j where, as long as nothing is clamped, x[j] and m[j] are the whole coefficients of x_j and m_j.
    Without a clamp `direct` and whole coefficients agree and `clamped` is 0.
    """

    def __init__(self, values: np.ndarray):
        self.const = float(values[0]) if np.isfinite(values).all() else np.nan
        elements = (values[1:] - values[0]).reshape(-1, _ELEMENTS)
        self.x, self.m = elements[:, _X] / SMALL, elements[:, _M] / SMALL
        self.direct_x = (elements[:, _LARGER_X] - elements[:, _LARGE_X]) / LARGE
        self.direct_m = (elements[:, _LARGER_M] - elements[:, _LARGE_M]) / LARGE
        self._clamped_x = 2 * elements[:, _LARGE_X] - elements[:, _LARGER_X]
        self._clamped_m = 2 * elements[:, _LARGE_M] - elements[:, _LARGER_M]
        self.draws = elements[:, _DRAW:]
        self._clean()

    def _clean(self):
        """Rounding is not a coefficient."""
        scale = max(np.abs(part).max(initial=0.0) for part in (self.x, self.m, self.draws))
        for part in (self.x, self.m, self.draws, self.direct_x, self.direct_m):
            part[np.abs(part) < 1e-9 * scale] = 0.0
        direct = max(np.abs(self.direct_x).max(initial=0.0), np.abs(self.direct_m).max(initial=0.0))
        for part in (self._clamped_x, self._clamped_m):
            part[np.abs(part) < 1e-6 * max(direct, 1.0)] = 0.0
        # of the two signs that y may have, the one with p > 0; if p = 0, q > 0
        self.clamped = np.where(self._clamped_x != 0.0, self._clamped_x, self._clamped_m)
        through = np.where(self.clamped != 0.0, self.clamped, 1.0)
        self.p = np.where(self._clamped_x != 0.0, (self.x - self.direct_x) / through, 0.0)
        self.q = np.where(self._clamped_m != 0.0, (self.m - self.direct_m) / through, 0.0)
        plain = self.clamped == 0.0
        self.direct_x[plain], self.direct_m[plain] = self.x[plain], self.m[plain]


@dataclass(frozen=True)
class Probe:
    """The basis of a run of `num_rows` rows; tensors are (1, channels, 1, size) float64."""

    num_rows: int
    channels: int = 1

    @property
    def size(self) -> int:
        return 1 + self.num_rows * _ELEMENTS

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.channels, 1, self.size

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64)

    def state(self, row: int) -> Tensor:
        """x of a row."""
        return self._input(row, _INPUTS[:, 0])

    def output(self, row: int) -> Tensor:
        """The model output of a row."""
        return self._input(row, _INPUTS[:, 1])

    def draw(self, row: int, index: int) -> Tensor:
        """The noise of the index-th draw in a row."""
        z = self.zeros()
        z[..., 1 + row * _ELEMENTS + _DRAW + index] = 1.0
        return z

    def draw_used(self, values: np.ndarray, row: int) -> int | None:
        """Which draw of a row an output contains."""
        first = 1 + row * _ELEMENTS + _DRAW
        used = np.flatnonzero(values[first : first + MAX_DRAWS])
        return int(used[0]) if len(used) else None

    def read(self, values: Tensor) -> np.ndarray:
        """One output as a vector over all elements."""
        return values.detach().double().expand(self.shape)[0, 0, 0].numpy().copy()

    def _input(self, row, values):
        x = self.zeros()
        first = 1 + row * _ELEMENTS
        x[..., first : first + len(values)] = torch.from_numpy(values.copy())
        return x


class Draws(TorchFunctionMode):
    """While active, torch.randn and randn_like give what draw(index, shape) returns, index counting within a row.

    Tensors of the probe's size stay float64 where the sampler would round them.
    """

    def __init__(self, draw, size: int):
        super().__init__()
        self._draw, self._size, self.count = draw, size, 0

    def next_row(self) -> None:
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DRAWS:
            shape = args[0].shape if func is torch.randn_like else _shape(args, kwargs)
            self.count += 1
            return self._draw(self.count - 1, tuple(shape))
        if func in _NARROWING and args[0].dim() and args[0].shape[-1] == self._size and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


def _shape(args, kwargs):
    size = kwargs.get("size", args)
    return size[0] if len(size) == 1 and not isinstance(size[0], int) else size
