"""Langevin corrector: further evaluations whose step size the score and the noise decide, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from genengine.extensions._protocol import Extension, Run, row_times
from genengine.ops import guidance_moments
from genengine.paths import Path
from genengine.prediction import to_eps
from genengine.table import COLUMNS, CoefficientTable, Write, unpack_flags

_INDEX = {name: index for index, name in enumerate(COLUMNS)}


@dataclass
class Langevin(Extension):
    """Correct x by Langevin steps at its noise level before each of the solver's rows.

        g   = score(x, t)
        eps = 2 alpha (snr |z| / |g|)^2
        x'  = x + eps g + sqrt(2 eps) z

    alpha is (alpha(t) / alpha(t'))^2, t' the next row's time: 1 on a variance-exploding path, 1 - beta of the step on
    a variance-preserving one. Each correction is a row of its own, so one more evaluation of the model.

    Args:
        path, prediction: the solver's.
        snr: r of the paper, above 0.
        num_steps: corrections before each row.
        norms: "sample" for the norms of each sample's z and g, so that it depends on no other; "batch" for their means
            over the batch, as the published code has it.
        times: (R,) path times at which the rows that exist when it is this extension's turn evaluate the model; default
            their t_model, which is right where the solver was given no model_time.
    Raises:
        ValueError: arguments out of range; at the start of the run, a solver that evaluates the model more than once a
            step, t_model that cannot be path times, a time where the prediction gives no score.
    Song et al. 2021, Score-based generative modeling through stochastic differential equations, Alg. 4 and 5.
    """

    path: Path
    prediction: str
    snr: float = 0.16
    num_steps: int = 1
    norms: str = "sample"
    times: ArrayLike | None = None

    def __post_init__(self):
        if not 0 < self.snr < math.inf:
            raise ValueError(f"Langevin: snr must be finite and above 0, got {self.snr!r}")
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"Langevin: num_steps must be an int >= 1, got {self.num_steps!r}")
        if self.norms not in ("sample", "batch"):
            raise ValueError(f"Langevin: norms must be 'sample' or 'batch', got {self.norms!r}")

    def extend(self, table: CoefficientTable) -> CoefficientTable:
        flags = np.unique(table.rows[..., _INDEX["flags"]])
        if any(Write.X in unpack_flags(value)[1] for value in flags):
            raise ValueError(
                f"Langevin: the solver '{table.name}' evaluates the model more than once a step, between which nothing "
                "may change x; take one with one row per step, as euler or ddim"
            )
        at = row_times("Langevin", table, self.times)
        corrections, alpha, idle = self._corrections(table, at)
        repeats = [corrections] * self.num_steps
        rows = np.stack([*repeats, table.rows], axis=1).reshape(-1, *table.rows.shape[1:])
        off = np.zeros(table.rows.shape[:2], dtype=bool)
        self._corrects = np.stack([*[~idle] * self.num_steps, off], axis=1).reshape(-1, table.batch)
        self._alpha = np.repeat(np.broadcast_to(alpha, off.shape), self.num_steps + 1, axis=0)
        return replace(table, rows=rows, name=f"{table.name} with Langevin steps")

    def _corrections(self, table, at):
        """(rows, alpha, idle): a correction before each of the table's rows; p x + q m is the score there.

        idle: rows that do nothing, as stacked tables end with; their corrections do nothing either.
        """
        source = table.rows
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(at)
        following = self.path.alpha(np.concatenate([at[1:], np.zeros_like(at[:1])]))
        p, q = to_eps(self.prediction, alpha, sigma, d_alpha, d_sigma)
        rows = np.zeros_like(source)
        for name in ("t_model", "g1", "g2"):
            rows[..., _INDEX[name]] = source[..., _INDEX[name]]
        rows[..., _INDEX["a"]] = 1.0
        rows[0, :, _INDEX["c_in"]], rows[1:, :, _INDEX["c_in"]] = table.first_c_in, source[:-1, :, _INDEX["c_in"]]
        idle = ~source[..., [_INDEX["b"], _INDEX["c"], _INDEX["s"]]].any(-1)
        for name, value in (("p", -p / sigma), ("q", -q / sigma), ("s", 1.0)):  # s: written during the run, but not 0
            rows[..., _INDEX[name]] = np.where(idle, 0.0, value)
        return rows, (alpha / following) ** 2, idle

    def start(self, run: Run) -> None:
        if len(self._corrects) != run.table.num_rows:
            raise ValueError("Langevin: another extension adds rows after it; make Langevin the last that does")
        device = run.x.device
        self._z, self._score = run.buffer(), run.buffer()
        self._on = torch.from_numpy(self._corrects).to(device)
        self._factor = torch.from_numpy(self._alpha).to(device)

    def before_row(self, run: Run, outputs: tuple[Tensor, ...]) -> None:
        p, q, a, b, s = run.read("p", "q", "a", "b", "s")
        run.affine(p, q, outputs, self._score)
        sums = guidance_moments([self._score, run.noise(self._z)]).double()
        g, z = sums[:, 2].sqrt(), sums[:, 4].sqrt()
        if self.norms == "batch":
            g, z = (norms.mean().expand_as(norms) for norms in (g, z))
        eps = 2 * run.of_row(self._factor) * (self.snr * torch.where(g > 0, z / g, 0.0)) ** 2
        on = run.of_row(self._on)
        new = {"a": 1 + eps * p, "b": eps * q, "s": (2 * eps).sqrt()}
        run.write(**{name: torch.where(on, new[name], old) for name, old in (("a", a), ("b", b), ("s", s))})
