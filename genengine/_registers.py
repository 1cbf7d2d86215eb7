"""A recorded sampler as table rows: which combinations later rows read, and which of three registers keeps each.

A recording says how each output depends on the inputs of all rows up to its own. What depends on rows before is
history: of row j the table can keep y_j = phi(p x_j + q m_j), or x_j itself, until the last row that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from genengine._probe import Probe, Reading
from genengine.table import NUM_REGISTERS, Phi, Write, pack_flags

RATIO = 1e-5  # samplers compute their coefficients in float32: two uses of one y may disagree by that rounding


class NotAffine(ValueError):
    """The sampler, or one of its rows, is no affine row of a table; the message says why and what to do."""


@dataclass
class Kept:
    """What is kept of one row: y, x or both, and the weights with which later rows read them."""

    y: dict[int, float] = field(default_factory=dict)
    x: dict[int, float] = field(default_factory=dict)
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0
    c: float = 0.0


def realise(
    outputs: Sequence[np.ndarray], probe: Probe, phi: Phi = Phi.CLAMP
) -> tuple[list[dict[str, float]], list[bool]]:
    """The columns of each row, and which rows rely on their x being the x' of the row before.

    A predictor-corrector's correction starts from a state of the step before, which depends on all rows up to it. As
    x_k = x'_{k-1}, adding a multiple of (x_k - x'_{k-1}) = 0 removes what is older than the solver's order.

    Args:
        outputs: x' of every row, as vectors over the probe's elements.
        probe: the basis they were recorded with.
        phi: what a clamp that shows in them is: to a fixed radius, or to a threshold that is computed, here 1.

    Raises:
        NotAffine: naming the row, where three registers do not suffice, or a dependence has none of the row's forms.
    """
    chained = [False] * len(outputs)
    try:
        return _rows([Reading(values) for values in outputs], phi), chained
    except NotAffine as error:
        reduced, chained = _chain(outputs, probe)
        if not any(chained):
            raise
        try:
            return _rows([Reading(values) for values in reduced], phi), chained
        except NotAffine:
            raise error from None


def _chain(outputs, probe):
    """The outputs without the oldest dependence, where x_k = x'_{k-1} can take it away."""
    reduced, chained = [outputs[0]], [False]
    for k in range(1, len(outputs)):
        now, before = outputs[k], outputs[k - 1]
        weight = _common_factor(Reading(now), Reading(before), k)
        state = probe.read(probe.state(k))
        reduced.append(now + weight * (state - before) if weight else now)
        chained.append(weight != 0.0)
    return reduced, chained


def _common_factor(now: Reading, before: Reading, k: int) -> float:
    """The factor between two outputs' dependence on the oldest input of both."""
    for j in range(k):
        for a, b in ((now.x[j], before.x[j]), (now.m[j], before.m[j])):
            if a != 0.0 and b != 0.0:
                return a / b
            if a != 0.0 or b != 0.0:
                return 0.0
    return 0.0


def _rows(readings: list[Reading], phi: Phi) -> list[dict[str, float]]:
    for k, reading in enumerate(readings):
        _check(reading, k)
    kept = [_keep(readings, j, phi) for j in range(len(readings))]
    rows = []
    for k, reading in enumerate(readings):
        row = {"a": reading.direct_x[k], "b": reading.direct_m[k], "s": reading.draws[k].sum()}
        if kept[k].r:
            row |= {"c": kept[k].c, "r": kept[k].r}
        rows.append(row)
    return place(rows, kept, phi)


def place(rows: list[dict[str, float]], kept: list[Kept], phi: Phi = Phi.CLAMP) -> list[dict[str, float]]:
    """Give everything kept a register: adds h1 .. h3, p, q and flags to rows that have the other columns.

    Raises:
        NotAffine: where three registers do not suffice.
    """
    registers = _allocate(kept)
    for k, row in enumerate(rows):
        writes = [Write.KEEP] * NUM_REGISTERS
        for (j, what), register in registers.items():
            weight = getattr(kept[j], what).get(k)
            if weight is not None:
                row[f"h{register + 1}"] = weight
            if j == k:
                writes[register] = Write.X if what == "x" else Write.Y
        if kept[k].y or row.get("c"):
            row |= {"p": kept[k].p, "q": kept[k].q}
        row["flags"] = pack_flags(phi if "r" in row else Phi.IDENTITY, writes)
    return rows


def _check(reading: Reading, k: int) -> None:
    if np.isnan(reading.const):
        raise NotAffine(f"row {k} is not a number, or infinite, whatever its input")
    if reading.const != 0.0:
        raise NotAffine(
            f"row {k} adds a constant ({reading.const:g}) to the state, for which a row has no column, or draws noise "
            "by another function than torch.randn"
        )
    beyond = slice(k + 1, None)
    if reading.x[beyond].any() or reading.m[beyond].any():
        raise NotAffine(f"row {k} does not act on elements alone: it mixes those of different rows")
    others = np.delete(reading.draws, k, axis=0)
    if others.any():
        raise NotAffine(
            f"row {k} reads the noise of another row, which no register keeps, or does not act on elements alone"
        )
    if np.count_nonzero(reading.draws[k]) > 1:
        raise NotAffine(f"row {k} adds two draws of noise; a row adds one")


def _keep(readings: list[Reading], j: int, phi: Phi) -> Kept:
    """What later rows, and for a clamp row j itself, read of row j, in the forms that the table has.

    y is scaled to p = 1 (or q = 1): x - sigma m, say, whose terms nearly cancel, before it is divided by alpha. A
    rounded p would be an error that all elements and rows have in common.
    """
    kept = Kept()
    clamped = {k: readings[k].clamped[j] for k in range(j, len(readings)) if readings[k].clamped[j] != 0.0}
    if clamped:
        _keep_clamped(kept, readings, j, clamped, phi)
    uses = {
        k: (readings[k].direct_x[j], readings[k].direct_m[j])
        for k in range(j + 1, len(readings))
        if readings[k].direct_x[j] != 0.0 or readings[k].direct_m[j] != 0.0
    }
    if all(m == 0.0 for _, m in uses.values()):
        kept.x = {k: x for k, (x, _) in uses.items()}
        return kept
    if clamped:
        raise NotAffine(f"row {j}: later rows read its model output both clamped and not; a register keeps one of them")
    x0, m0 = max(uses.values(), key=lambda use: abs(use[0]) + abs(use[1]))
    if all(abs(x * m0 - m * x0) <= RATIO * (abs(x) + abs(m)) * (abs(x0) + abs(m0)) for x, m in uses.values()):
        kept.p, kept.q = (1.0, m0 / x0) if x0 else (0.0, 1.0)
        kept.y = {k: x if x0 else m for k, (x, m) in uses.items()}
    else:
        kept.q = 1.0
        kept.y = {k: m for k, (_, m) in uses.items() if m != 0.0}
        kept.x = {k: x for k, (x, _) in uses.items() if x != 0.0}
    return kept


def _keep_clamped(kept, readings, j, clamped, phi):
    """y_j = phi(p x + q m) from the use in which it is largest; the others must be multiples of it."""
    parts = {k: (readings[k].p[j], readings[k].q[j]) for k in clamped}
    largest = max(clamped, key=lambda k: abs(clamped[k]))
    p, q = parts[largest]
    for k, (other_p, other_q) in parts.items():
        if abs(other_p - p) + abs(other_q - q) > RATIO * (abs(p) + abs(q)):
            raise NotAffine(f"row {j}: rows {largest} and {k} clamp different combinations of its x and model output")
    kept.r = 1.0 / p if p else 1.0 / q  # both are positive: see Reading
    kept.p, kept.q = p * kept.r, q * kept.r
    scale = 1.0 if phi == Phi.DYNAMIC_THRESHOLD else 1.0 / kept.r  # a threshold's y is divided by r
    weights = {k: weight * scale for k, weight in clamped.items()}
    kept.c = weights.pop(j, 0.0)
    kept.y = weights


def _allocate(kept: list[Kept]) -> dict[tuple[int, str], int]:
    """A register for each thing kept: free again in the row of its last use, as all reads come before the writes."""
    registers, free_from = {}, [0] * NUM_REGISTERS
    for j, items in enumerate(kept):
        for what in ("x", "y"):
            uses = getattr(items, what)
            if not uses:
                continue
            free = [n for n in range(NUM_REGISTERS) if free_from[n] <= j]
            if not free:
                raise NotAffine(
                    f"row {j}: later rows need more than {NUM_REGISTERS} tensors of history at once; "
                    "choose a lower solver order, or a variant without extra evaluations"
                )
            registers[j, what] = free[0]
            free_from[free[0]] = max(uses)
    return registers
