"""Rows for a recorded loop, of which only the states at the model's evaluations are known.

The next state is a combination of the present one, the model's output, noise and what the loop remembers. It is
searched among what samplers do remember: earlier states, outputs, or slopes (x - output)/sigma; the fewest that
explain every row are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

from genengine._probe import Reading
from genengine._recording import LoopRecording
from genengine._registers import Kept, NotAffine, place
from genengine.table import NUM_REGISTERS

LAGS = 3
RESIDUAL = 1e-9


def loop_rows(recording: LoopRecording) -> list[dict[str, float]]:
    """The columns of each row, with a, b, s, history and registers.

    Raises:
        NotAffine: where no such combination explains a row.
    """
    reasons = []
    for form in (_output, _slope):
        try:
            return _fit(_Vectors(recording), form)
        except NotAffine as error:
            reasons.append(error)
    raise reasons[-1]


class _Vectors:
    """States and outputs of a loop as vectors over the inputs x_0, every m_j and every z_j."""

    def __init__(self, recording: LoopRecording):
        self.num_rows, self.sigmas = recording.probe.num_rows, recording.sigmas
        readings = [Reading(values) for values in recording.states]
        self.states = [np.concatenate([r.x[:1], r.m, r.draws.ravel()]) for r in readings]
        self.draws = readings[0].draws.shape[1]

    def output(self, j: int) -> np.ndarray:
        e = np.zeros(len(self.states[0]))
        e[1 + j] = 1.0
        return e

    def noise(self, j: int) -> slice:
        first = 1 + self.num_rows + j * self.draws
        return slice(first, first + self.draws)


def _output(vectors: _Vectors, j: int) -> tuple[float, float]:
    """(p, q) of y = m."""
    return 0.0, 1.0


def _slope(vectors: _Vectors, j: int) -> tuple[float, float]:
    """(p, q) of y = (x - m)/sigma."""
    return 1.0 / vectors.sigmas[j], -1.0 / vectors.sigmas[j]


def _fit(vectors: _Vectors, form: Callable) -> list[dict[str, float]]:
    rows, kept = [], []
    for j in range(vectors.num_rows):
        p, q = form(vectors, j)
        kept.append(Kept(p=p, q=q))
    for k in range(vectors.num_rows):
        row, uses = _fit_row(vectors, form, k)
        for (j, what), weight in uses.items():
            getattr(kept[j], what)[k] = weight
        rows.append(row)
    return place(rows, kept)


def _fit_row(vectors, form, k):
    target, noise = vectors.states[k + 1].copy(), vectors.noise(k)
    drawn = target[noise].copy()
    if np.count_nonzero(np.abs(drawn) > RESIDUAL) > 1:
        raise NotAffine(f"evaluation {k} is followed by two draws of noise; a row adds one")
    target[noise] = 0.0
    known = [vectors.states[k], vectors.output(k)]
    memory = {}
    for j in range(k - 1, max(-1, k - 1 - LAGS), -1):
        p, q = form(vectors, j)
        memory[j, "y"] = p * vectors.states[j] + q * vectors.output(j)
        memory[j, "x"] = vectors.states[j]
    for size in range(NUM_REGISTERS + 1):
        for chosen in combinations(memory, size):
            matrix = np.stack([*known, *(memory[item] for item in chosen)], axis=1)
            weights = np.linalg.lstsq(matrix, target, rcond=None)[0]
            if np.abs(matrix @ weights - target).max() <= RESIDUAL * max(1.0, np.abs(target).max()):
                weights[np.abs(weights) < RESIDUAL] = 0.0
                row = {"a": weights[0], "b": weights[1], "s": drawn.sum()}
                return row, {item: w for item, w in zip(chosen, weights[2:], strict=True) if w != 0.0}
    raise NotAffine(
        f"the state after evaluation {k} is no combination of the present and at most {NUM_REGISTERS} earlier states "
        "and outputs: the loop is not affine, chooses its steps itself, or has more memory than a table"
    )
