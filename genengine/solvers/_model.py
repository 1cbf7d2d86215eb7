"""What all solvers share: the checked arguments, and a network's output as vectors (a, b, c) of the row to be.

Each solver is its textbook update written with 3-vectors (a, b, c): the weights of the state x, the model
output m and the converted output y in x' = a*x + b*m + c*y. `X` is the state itself; `Model` gives x0, eps
and velocity as such vectors. So `alpha*x0 + sigma*eps` in a solver is the paper's formula and the table row
at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from genengine.paths import Path
from genengine.prediction import to_eps, to_velocity, to_x0
from genengine.table import CoefficientTable, Phi, Write, build_rows, pack_flags

X = np.array([1.0, 0.0, 0.0])  # the state x as a vector (a, b, c)
Y = np.array([0.0, 0.0, 1.0])  # the converted output y

TimeMap = Callable[[float], float]


def solver(
    rows: Callable[..., list[Row]] | None = None,
    *,
    clips: bool = True,
    needs_signal: bool = False,
    rising: bool = False,
):
    """Make a solver (path, grid, *, prediction, ..., own options) of a function (model, *, own options) -> rows.

    The result has the signature of `_common` and the function's own options after it; its name names the table,
    and its attributes `clips` and `needs_signal` are these arguments.

    Args:
        rows: the function; it may refuse its options with a ValueError.
        clips: False where x0 cannot be clipped, which takes `clip` out of the signature.
        needs_signal: True refuses a grid that touches alpha = 0, where the log-SNR is -inf.
        rising: True for solvers that go from data to noise: their grid rises.
    """
    if rows is None:
        return functools.partial(solver, clips=clips, needs_signal=needs_signal, rising=rising)
    name, own = rows.__name__, list(inspect.signature(rows).parameters.values())[1:]

    @functools.wraps(rows)
    def build(path, grid, **options):
        common = {key: options.pop(key) for key in list(options) if key in _COMMON and (clips or key != "clip")}
        if "prediction" not in common:
            raise TypeError(
                f"{name}: prediction is missing; say what the network predicts, prediction='eps' for example"
            )
        model = Model(path, grid, rising=rising, **common)
        if needs_signal:
            model.needs_signal(name)
        return model.table(name, rows(model, **options))

    shared = [p for p in _SIGNATURE if clips or p.name != "clip"]
    build.__signature__ = inspect.Signature(shared + own, return_annotation=CoefficientTable)
    build.clips, build.needs_signal = clips, needs_signal
    return build


def _common(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
):
    """The arguments of every solver; see `genengine.solvers`."""


_SIGNATURE = tuple(inspect.signature(_common).parameters.values())
_COMMON = frozenset(p.name for p in _SIGNATURE[2:])


class Point(NamedTuple):
    """A time of the grid and the path there."""

    t: float
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float


class Row(NamedTuple):
    """A table row in the making: columns by name, and what H1.. receive."""

    columns: dict[str, float]
    writes: list[Write]


@dataclass
class Model:
    """The arguments common to all solvers, and a network's output as vectors (a, b, c) at a point."""

    path: Path
    grid: ArrayLike
    prediction: str
    guidance_scale: float | np.ndarray = 1.0
    clip: float | None = None
    model_time: TimeMap | None = None
    input_scale: TimeMap | None = None
    rising: bool = False

    def __post_init__(self):
        grid = np.asarray(self.grid, dtype=np.float64)
        falling = grid[::-1] if self.rising else grid
        if grid.ndim != 1 or grid.size < 2 or not np.all(np.diff(falling) < 0) or falling[0] > 1 or falling[-1] < 0:
            direction, remedy = ("rising", ", reversed with [::-1]") if self.rising else ("falling", "")
            raise ValueError(
                f"solver: grid must be at least 2 strictly {direction} times in [0, 1], "
                f"got {self.grid!r}; see genengine.schedules{remedy}"
            )
        if self.clip is not None and not 0 < self.clip < np.inf:
            raise ValueError(f"solver: clip must be None or a finite radius above 0, got {self.clip!r}")
        self.points = [self.point(t) for t in grid]
        self.steps = list(pairwise(self.points))
        self.init_scale = self.path.prior_scale(self.points[0].t)  # a solver may start from more noise

    def point(self, t: float) -> Point:
        return Point(float(t), *(float(value) for value in self.path.coefficients(t)))

    def x0(self, point: Point) -> np.ndarray:
        return Y if self.clip else self._affine(to_x0, point)

    def eps(self, point: Point) -> np.ndarray:
        if self.clip:
            if point.sigma == 0:
                raise ValueError(
                    f"solver: clip leaves eps undetermined where sigma = 0, got t = {point.t}; "
                    "start the grid above it, or do not clip"
                )
            return (X - point.alpha * Y) / point.sigma
        if point.sigma == 0 and self.prediction == "score":
            raise ValueError(
                f"prediction 'score': needs sigma > 0, got sigma = 0 at t = {point.t}; keep t above that end"
            )
        return self._affine(to_eps, point)

    def own_eps(self, point: Point) -> np.ndarray:
        """eps as the network says it, whatever becomes of x0."""
        return self._affine(to_eps, point)

    def velocity(self, point: Point) -> np.ndarray:
        if self.clip:
            return point.d_alpha * Y + point.d_sigma * self.eps(point)
        return self._affine(to_velocity, point)

    def row(
        self,
        point: Point,
        update: np.ndarray,
        *,
        y: np.ndarray | None = None,
        history: Sequence[float] = (),
        noise: float = 0.0,
        learned: float = 0.0,
        writes: Sequence[Write] = (),
    ) -> Row:
        """One table row that evaluates the model at `point`.

        Args:
            update: (a, b, c) of x'.
            y: what a register stores as y, by default x0.
            history: weights of H1.. in x'.
            noise: the standard deviation of the noise added.
            learned: l in the factor exp(l v) on that noise, v the second half of the network's channels.
            writes: what H1.. receive.
        """
        a, b, c = update
        columns = {"t_model": point.t, "a": a, "b": b, "c": c, "s": noise, "l": learned}
        columns |= {f"h{j}": weight for j, weight in enumerate(history, 1)}
        if c != 0 or Write.Y in writes:
            columns["p"], columns["q"], _ = self._affine(to_x0, point) if y is None else y
        return Row(columns, list(writes))

    def table(self, name: str, rows: list[Row]) -> CoefficientTable:
        _drop_unread_writes(rows)
        times = [row.columns["t_model"] for row in rows]
        scales = [1.0 if self.input_scale is None else float(self.input_scale(t)) for t in times] + [1.0]
        for (columns, writes), t, next_scale in zip(rows, times, scales[1:], strict=True):
            columns["c_in"] = next_scale
            columns["t_model"] = t if self.model_time is None else float(self.model_time(t))
            if columns["c"] == 0 and Write.Y not in writes:  # nobody reads y
                columns["p"] = columns["q"] = 0.0
            elif self.clip:
                columns["r"] = self.clip
            columns["flags"] = pack_flags(Phi.CLAMP if "r" in columns else Phi.IDENTITY, writes)
        table = CoefficientTable(build_rows(row.columns for row in rows), self.init_scale, scales[0], name)
        return table.with_guidance(self.guidance_scale).validate()

    def needs_signal(self, solver: str) -> None:
        """Refuse a grid that starts, or if rising ends, at alpha = 0."""
        noisiest, verb = (self.points[-1], "end") if self.rising else (self.points[0], "start")
        if noisiest.alpha == 0:
            raise ValueError(
                f"{solver}: grid must {verb} where alpha > 0, got alpha = 0 at t = {noisiest.t}; "
                f"{verb} the grid a little below, for example at t_max = 0.999"
            )

    def _affine(self, convert: Callable, point: Point) -> np.ndarray:
        """(p, q, 0) of `prediction.to_*` at a point."""
        return np.array([*convert(self.prediction, *point[1:], t=point.t), 0.0])


def _drop_unread_writes(rows: list[Row]) -> None:
    """Keep only register writes that a later row reads: each one dropped saves a pass over memory."""
    live = set()
    for columns, writes in reversed(rows):
        for register, write in enumerate(writes):
            if register not in live:
                writes[register] = Write.KEEP
            if write != Write.KEEP:
                live.discard(register)
        live |= {j for j in range(3) if columns.get(f"h{j + 1}", 0.0) != 0}


def kept(now: Point, end: Point) -> float:
    """k = alpha sigma'/(alpha' sigma) = exp(lambda - lambda'): the share of eps an ancestral step keeps."""
    return now.alpha * end.sigma / (end.alpha * now.sigma)


def remembered(i: int, weights: Mapping[int, float], size: int) -> tuple[list[float], list[Write]]:
    """History weights and writes of step i, where y of step j waits in register j mod size.

    Args:
        i: the step, whose own y is stored.
        weights: the weight in x' of the y of earlier steps; an entry for i itself is passed over.
        size: the number of registers, 0 to 3.
    """
    history, writes = [0.0] * size, [Write.KEEP] * size
    for j, weight in weights.items():
        if j != i:
            history[j % size] = weight
    if size:
        writes[i % size] = Write.Y
    return history, writes


def one_of(solver: str, option: str, value, allowed: Sequence) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise ValueError(f"{solver}: {option} must be {', '.join(others)} or {last}, got {value!r}")


def finite_eta(solver: str, eta: float) -> None:
    """Refuse an eta that is negative or not finite."""
    if not 0.0 <= eta < np.inf:
        raise ValueError(f"{solver}: eta must be a finite number >= 0, got {eta!r}")
