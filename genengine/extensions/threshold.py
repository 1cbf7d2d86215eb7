"""Dynamic thresholding: the radius that x0 is clamped to, of every sample at every row, is a quantile of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from genengine.extensions._protocol import Extension, Run
from genengine.table import COLUMNS, CoefficientTable, Phi

_TOP_SHARE = 16  # up to a sixteenth of the elements, finding the largest is cheaper than selecting one of a rank
_R, _FLAGS = COLUMNS.index("r"), COLUMNS.index("flags")


@dataclass
class DynamicThreshold(Extension):
    """Clamp x0 to a quantile of its absolute values, and scale it back to [-1, 1].

        r  = clip(quantile(|x0|), 1, max_value)         of each sample, linear between order statistics
        y  = clip(x0, -r, r) / r

    Give the solver clip=1.0: the rows that clamp become rows that threshold, and r is written into them on the device.
    Rows that threshold already, as `trace` reads them off a scheduler, are taken as they are: there y is x0 times a
    factor, and r before the run is that factor.

    Args:
        quantile: in [0, 1].
        max_value: the largest r, at least 1; there is none by default.
    Raises:
        ValueError: arguments out of range; at the start of the run, if no row clamps, or to another radius than 1.
    Saharia et al. 2022, Photorealistic text-to-image diffusion models, section 2.3.
    """

    quantile: float = 0.995
    max_value: float = math.inf

    def __post_init__(self):
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"DynamicThreshold: quantile must be in [0, 1], got {self.quantile!r}")
        if not self.max_value >= 1:
            raise ValueError(f"DynamicThreshold: max_value must be at least 1, got {self.max_value!r}")

    def extend(self, table: CoefficientTable) -> CoefficientTable:
        rows = table.rows.copy()
        phi = rows[..., _FLAGS].astype(np.int64) & 3
        clamps = phi == Phi.CLAMP
        radii = np.unique(rows[..., _R][clamps])
        if not np.array_equal(radii, [1.0]) and not (radii.size == 0 and (phi == Phi.DYNAMIC_THRESHOLD).any()):
            got = "none that clamps" if radii.size == 0 else f"radii {', '.join(f'{r:g}' for r in radii)}"
            raise ValueError(
                f"DynamicThreshold: the table '{table.name}' must have rows that clamp x0 to [-1, 1], got {got}; "
                "make it with clip=1.0"
            )
        rows[..., _FLAGS][clamps] += Phi.DYNAMIC_THRESHOLD - Phi.CLAMP
        return replace(table, rows=rows)

    def start(self, run: Run) -> None:
        self._x0 = run.buffer()

    def before_row(self, run: Run, outputs: tuple[Tensor, ...]) -> None:
        p, q, old = run.read("p", "q", "r")
        size = run.affine(p, q, outputs, self._x0).abs_()
        # in the order of memory, which a quantile does not depend on
        values = size.as_strided((len(size), size[0].numel()), (size[0].numel(), 1))
        r = threshold(values, old, self.quantile, self.max_value)
        run.write(r=torch.where(old > 0, r, old))


def threshold(size: Tensor, r: Tensor, quantile: float, max_value: float) -> Tensor:
    """(B,): r clip(quantile(|x0|), 1, max_value), from size = r |x0| (B, n) and r (B,)."""
    return torch.clamp(row_quantile(size, quantile), min=r, max=r * max_value)


def row_quantile(values: Tensor, quantile: float) -> Tensor:
    """(B,): of each row of values (B, n), as torch.quantile has it by default, in a fifteenth of a sort's time."""
    n = values.shape[1]
    rank = quantile * (n - 1)
    below = math.floor(rank)
    above, from_top = min(below + 1, n - 1), n - below
    if from_top * _TOP_SHARE <= n:
        top = values.topk(from_top, dim=1).values
        low, high = top[:, n - 1 - below], top[:, n - 1 - above]
    else:
        low, high = (values.kthvalue(index + 1, dim=1).values for index in (below, above))
    return torch.lerp(low, high, rank - below)
