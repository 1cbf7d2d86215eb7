"""Solvers write tables: (path, grid) -> CoefficientTable. They never see a tensor.

Each solver is its textbook update written with 3-vectors (a, b, c): the weights of the state x, the model
output m and the converted output y in x' = a*x + b*m + c*y. `X` is the state itself; `_Model` gives x0, eps
and velocity as such vectors. So `alpha*x0 + sigma*eps` in a solver is the paper's formula and the table row
at once.

Without clipping, x0, eps and velocity are affine in (x, m) and c is 0. With `clip`, y = clamp(x0, -clip,
clip), and eps and velocity are derived again from x and the clipped x0: eps = (x - alpha y)/sigma.

All solvers share these arguments:
    path: a `paths.Path`.
    grid: (num_steps + 1,) strictly falling times in [0, 1], see `schedules`.
    prediction: what the network predicts, one of `prediction.PREDICTIONS`.
    guidance_scale: the weight g1 in m = out_0 + g1 (out_1 - out_0), a number or (B,); without a second branch
        unused.
    clip: the radius that x0 is clamped to, or None.
    model_time: maps t to what the network expects as its time; by default t itself.
    input_scale: maps t to the factor on the network's input, for example
        `lambda t: 1/np.hypot(sigma_data, path.sigma(t))` for EDM networks; by default 1.
They raise ValueError on an invalid grid, clip or prediction, and where the prediction is singular at a time
of the grid, as eps is at alpha = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike

from genengine.paths import Path
from genengine.prediction import to_eps, to_velocity, to_x0
from genengine.table import CoefficientTable, Phi, Write, build_rows, pack_flags

X = np.array([1.0, 0.0, 0.0])  # the state x as a vector (a, b, c)
Y = np.array([0.0, 0.0, 1.0])  # the converted output y

TimeMap = Callable[[float], float]


def euler(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
) -> CoefficientTable:
    """Euler's method on dx/dt = velocity(x, t): x' = x + (t' - t) velocity.

    First order. Arguments, returns and errors: see the module. Lipman 2022; on `paths.EDM` this is Karras
    2022, Alg. 1 without its correction, on `paths.RectifiedFlow` and `paths.EDM` it equals `ddim`.
    """
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    return model.table("euler", [model.row(now, X + (end.t - now.t) * model.velocity(now)) for now, end in model.steps])


def heun(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
) -> CoefficientTable:
    """Heun's method: x' = x + (t' - t)/2 (velocity(x, t) + velocity(x + (t' - t) velocity(x, t), t')).

    Second order, two rows per step: the first stores x in H1 and y in H2, the second reads them. A step to
    sigma = 0 is one Euler row (Karras 2022, Alg. 1, line 6) because there the velocity, (x - x0)/sigma or
    alike, is 0/0; only a model that predicts v or velocity on a path with finite derivatives, unclipped, is
    evaluated at that end.

    Arguments, returns and errors: see the module. Karras 2022, Alg. 1.
    """
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    rows = []
    for now, end in model.steps:
        dt, velocity = end.t - now.t, model.velocity(now)
        if end.sigma == 0 and (clip or prediction not in ("v", "velocity") or not np.isfinite(end.d_sigma)):
            rows.append(model.row(now, X + dt * velocity))
            continue
        # H2 holds the velocity, or with clip the clipped x0, from which H1 gives the velocity back
        y, (h1, h2) = (None, velocity[[0, 2]]) if clip else (velocity, (0.0, 1.0))
        rows.append(model.row(now, X + dt * velocity, y=y, writes=(Write.X, Write.Y)))
        rows.append(model.row(end, dt / 2 * model.velocity(end), history=(1 + dt / 2 * h1, dt / 2 * h2)))
    return model.table("heun", rows)


def dpm_2(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
) -> CoefficientTable:
    """DPM-Solver-2: a midpoint method in the log-SNR.

    At the middle u of the log-SNR interval, x_u = alpha_u x0 + sigma_u eps; then
    x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) eps(x_u, u).
    Second order, two rows per step; x waits in H1. A step to sigma = 0, whose interval is infinite, is one
    `ddim` row.

    Arguments and returns: see the module. Lu 2022 (DPM-Solver), Alg. 1; with alpha = 1, Karras 2022's DPM-2.

    Raises:
        ValueError: as the module says, and where the grid starts at alpha = 0 (log-SNR = -inf).
    """
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    model.needs_signal("dpm_2")
    rows = []
    for now, end in model.steps:
        if end.sigma == 0:
            rows.append(model.row(now, end.alpha * model.x0(now) + end.sigma * model.eps(now)))
            continue
        mid = model.point(path.t_of_log_snr(0.5 * (path.log_snr(now.t) + path.log_snr(end.t))))
        rows.append(model.row(now, mid.alpha * model.x0(now) + mid.sigma * model.eps(now), writes=(Write.X,)))
        scale = end.alpha / now.alpha
        rows.append(model.row(mid, (end.sigma - scale * now.sigma) * model.eps(mid), history=(scale,)))
    return model.table("dpm_2", rows)


def ddpm(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
    variance: str = "small",
) -> CoefficientTable:
    """Ancestral sampling: x' = mean of q(x_t' | x_t, x0) at the model's x0, plus noise.

    With k = alpha sigma'/(alpha' sigma) the mean is alpha' x0 + k sigma' eps, and the standard deviation is
    sigma' sqrt(1 - k^2) ("small", the posterior's) or sigma sqrt(1 - k^2) ("large", the forward step's,
    sqrt(beta) of DDPM). A step to sigma' = 0 adds no noise.

    Arguments and returns: see the module. Ho 2020, eqs. 6-7, Alg. 2 and section 3.2.

    Raises:
        ValueError: as the module says, and where variance is neither "small" nor "large".
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be 'small' or 'large', got {variance!r}")
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    rows = []
    for now, end in model.steps:
        k = _kept(now, end)
        mean = end.alpha * model.x0(now) + k * end.sigma * model.eps(now)
        scale = end.sigma if variance == "small" or end.sigma == 0 else now.sigma
        rows.append(model.row(now, mean, noise=scale * np.sqrt(1 - k * k)))
    return model.table("ddpm", rows)


def ddim(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
    eta: float = 0.0,
) -> CoefficientTable:
    """DDIM: x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z.

    s = eta sigma' sqrt(1 - k^2), k = alpha sigma'/(alpha' sigma). Deterministic and first order at eta = 0;
    `ddpm` with the small variance at eta = 1.

    Arguments and returns: see the module. Song 2020 (DDIM), eqs. 12 and 16.

    Raises:
        ValueError: as the module says, and where eta is outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta!r}")
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    return model.table("ddim", [_ancestral_row(model, now, end, eta) for now, end in model.steps])


def euler_ancestral(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
    eta: float = 1.0,
) -> CoefficientTable:
    """Euler in relative noise r = sigma/alpha down to r_down, then noise up to r'.

    r_up = min(r', eta sqrt(r'^2 (r^2 - r'^2)/r^2)), r_down = sqrt(r'^2 - r_up^2),
    x' = alpha' (x0 + r_down eps + r_up z).
    For eta <= 1 this is `ddim` with the same eta; larger eta adds more noise until all of r' is fresh.

    Arguments and returns: see the module. The ancestral Euler sampler of k-diffusion, in any path's
    coordinates.

    Raises:
        ValueError: as the module says, and where eta is negative or not finite.
    """
    if not 0.0 <= eta < np.inf:
        raise ValueError(f"euler_ancestral: eta must be a finite number >= 0, got {eta!r}")
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    return model.table("euler_ancestral", [_ancestral_row(model, now, end, eta) for now, end in model.steps])


def dpmpp_2m(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
) -> CoefficientTable:
    """DPM-Solver++(2M): second order with one evaluation per step; the previous x0 waits in H1.

    With lambda = log(alpha/sigma), h = lambda' - lambda and h_prev the step before,
    D = x0 + h/(2 h_prev) (x0 - H1),  x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D.
    The first step, and a step to sigma = 0 (which returns alpha' x0), are first order: D = x0.

    Arguments, returns and errors: see the module. Lu 2022 (DPM-Solver++), Alg. 2.
    """
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    return model.table("dpmpp_2m", _dpmpp_2m_rows(model, 0.0))


def dpmpp_2m_sde(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    clip: float | None = None,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
    eta: float = 1.0,
) -> CoefficientTable:
    """SDE-DPM-Solver++(2M), midpoint form: `dpmpp_2m` with noise.

    With lambda, h, h_prev and D as in `dpmpp_2m`,
    x' = (sigma'/sigma) exp(-eta h) x + alpha' (1 - exp(-(1 + eta) h)) D + sigma' sqrt(1 - exp(-2 eta h)) z.

    Arguments and returns: see the module. Lu 2022 (DPM-Solver++), SDE-DPM-Solver++(2M), at eta = 1;
    eta as in k-diffusion.

    Raises:
        ValueError: as the module says, and where eta is negative or not finite.
    """
    if not 0.0 <= eta < np.inf:
        raise ValueError(f"dpmpp_2m_sde: eta must be a finite number >= 0, got {eta!r}")
    model = _Model(path, grid, prediction, guidance_scale, clip, model_time, input_scale)
    return model.table("dpmpp_2m_sde", _dpmpp_2m_rows(model, eta))


def lms(
    path: Path,
    grid: ArrayLike,
    *,
    prediction: str,
    guidance_scale: float | np.ndarray = 1.0,
    model_time: TimeMap | None = None,
    input_scale: TimeMap | None = None,
    order: int = 4,
) -> CoefficientTable:
    """Linear multistep (Adams-Bashforth) in relative noise r = sigma/alpha, where d(x/alpha)/dr = eps.

    x'/alpha' = x/alpha + sum_j w_j eps_j, w_j the integral over [r, r'] of the Lagrange polynomial of the
    last `order` noise levels. The earlier eps rotate through H1..H3; the first steps have lower order, so for
    order > 2 the error is smaller but, strictly, of order 2.

    Arguments and returns: see the module; there is no clip, because eps of a clipped x0 is not one of y's
    forms. Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.1 and III.5.

    Raises:
        ValueError: as the module says, where order is not 1 to 4, or the grid starts at alpha = 0 (r = inf).
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"lms: order must be 1, 2, 3 or 4, got {order!r}")
    model = _Model(path, grid, prediction, guidance_scale, None, model_time, input_scale)
    model.needs_signal("lms")
    ratio = [float(point.sigma / point.alpha) for point in model.points]
    rows = []
    for i, (now, end) in enumerate(model.steps):
        nodes = range(max(0, i - order + 1), i + 1)
        weights = {
            j: _lagrange_integral([ratio[k] for k in nodes], j - nodes[0], ratio[i], ratio[i + 1]) for j in nodes
        }
        history, writes = [0.0] * 3, [Write.KEEP] * 3
        for j in nodes[:-1]:
            history[j % 3] = end.alpha * weights[j]
        if order > 1:
            writes[i % 3] = Write.Y
        update = end.alpha / now.alpha * X + end.alpha * weights[i] * model.eps(now)
        rows.append(model.row(now, update, y=model.eps(now), history=history, writes=writes))
    return model.table("lms", rows)


SOLVERS = {
    solver.__name__: solver for solver in (euler, heun, dpm_2, ddpm, ddim, euler_ancestral, dpmpp_2m, dpmpp_2m_sde, lms)
}


class _Point(NamedTuple):
    """A time of the grid and the path there."""

    t: float
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float


class _Row(NamedTuple):
    """A table row in the making: columns by name, and what H1.. receive."""

    columns: dict[str, float]
    writes: list[Write]


@dataclass
class _Model:
    """The arguments common to all solvers, and a network's output as vectors (a, b, c) at a point."""

    path: Path
    grid: ArrayLike
    prediction: str
    guidance_scale: float | np.ndarray
    clip: float | None
    model_time: TimeMap | None
    input_scale: TimeMap | None

    def __post_init__(self):
        grid = np.asarray(self.grid, dtype=np.float64)
        if grid.ndim != 1 or grid.size < 2 or not np.all(np.diff(grid) < 0) or grid[0] > 1 or grid[-1] < 0:
            raise ValueError(
                "solver: grid must be at least 2 strictly falling times in [0, 1], "
                f"got {self.grid!r}; see genengine.schedules"
            )
        if self.clip is not None and not 0 < self.clip < np.inf:
            raise ValueError(f"solver: clip must be None or a finite radius above 0, got {self.clip!r}")
        self.points = [self.point(t) for t in grid]
        self.steps = list(pairwise(self.points))

    def point(self, t: float) -> _Point:
        return _Point(float(t), *(float(value) for value in self.path.coefficients(t)))

    def x0(self, point: _Point) -> np.ndarray:
        return Y if self.clip else self._affine(to_x0, point)

    def eps(self, point: _Point) -> np.ndarray:
        if self.clip:
            return (X - point.alpha * Y) / point.sigma
        return self._affine(to_eps, point)

    def velocity(self, point: _Point) -> np.ndarray:
        if self.clip:
            return point.d_alpha * Y + point.d_sigma * self.eps(point)
        return self._affine(to_velocity, point)

    def row(
        self,
        point: _Point,
        update: np.ndarray,
        *,
        y: np.ndarray | None = None,
        history: Sequence[float] = (),
        noise: float = 0.0,
        writes: Sequence[Write] = (),
    ) -> "_Row":
        """One table row that evaluates the model at `point`.

        Args:
            update: (a, b, c) of x'.
            y: what a register stores as y, by default x0.
            history: weights of H1.. in x'.
            noise: the standard deviation of the noise added.
            writes: what H1.. receive.
        """
        a, b, c = update
        columns = {"t_model": point.t, "a": a, "b": b, "c": c, "s": noise}
        columns |= {f"h{j}": weight for j, weight in enumerate(history, 1)}
        if c != 0 or Write.Y in writes:
            columns["p"], columns["q"], _ = self._affine(to_x0, point) if y is None else y
        return _Row(columns, list(writes))

    def table(self, name: str, rows: list["_Row"]) -> CoefficientTable:
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
        init_scale = self.path.prior_scale(self.points[0].t)
        table = CoefficientTable(build_rows(row.columns for row in rows), init_scale, scales[0], name)
        return table.with_guidance(self.guidance_scale).validate()

    def needs_signal(self, solver: str) -> None:
        """Refuse a grid that starts at alpha = 0."""
        first = self.points[0]
        if first.alpha == 0:
            raise ValueError(
                f"{solver}: grid must start where alpha > 0, got alpha = 0 at t = {first.t}; "
                "start the grid a little below, for example at t_max = 0.999"
            )

    def _affine(self, convert: Callable, point: _Point) -> np.ndarray:
        """(p, q, 0) of `prediction.to_*` at a point."""
        return np.array([*convert(self.prediction, *point[1:], t=point.t), 0.0])


def _drop_unread_writes(rows: list[_Row]) -> None:
    """Keep only register writes that a later row reads: each one dropped saves a pass over memory."""
    live = set()
    for columns, writes in reversed(rows):
        for register, write in enumerate(writes):
            if register not in live:
                writes[register] = Write.KEEP
            if write != Write.KEEP:
                live.discard(register)
        live |= {j for j in range(3) if columns.get(f"h{j + 1}", 0.0) != 0}


def _kept(now: _Point, end: _Point) -> float:
    """k = alpha sigma'/(alpha' sigma) = exp(lambda - lambda'): the share of eps an ancestral step keeps."""
    return now.alpha * end.sigma / (end.alpha * now.sigma)


def _ancestral_row(model: _Model, now: _Point, end: _Point, eta: float) -> _Row:
    k = _kept(now, end)
    fresh = min(1.0, eta * np.sqrt(1 - k * k))  # the share of sigma' that is new noise
    mean = end.alpha * model.x0(now) + end.sigma * np.sqrt(1 - fresh * fresh) * model.eps(now)
    return model.row(now, mean, noise=end.sigma * fresh)


def _dpmpp_2m_rows(model: _Model, eta: float) -> list[_Row]:
    rows, h_prev = [], np.inf  # an infinite step before the first makes the first one first order
    for now, end in model.steps:
        k = _kept(now, end)  # exp(-h); 0 from alpha = 0 or to sigma = 0, where h is infinite
        h = -np.log(k) if k > 0 else np.inf
        blend = h / (2 * h_prev) if np.isfinite(h) else 0.0
        gain = end.alpha * (1 - k ** (1 + eta))
        update = end.sigma / now.sigma * k**eta * X + gain * (1 + blend) * model.x0(now)
        rows.append(
            model.row(
                now,
                update,
                history=(-gain * blend,),
                writes=(Write.Y,),
                noise=end.sigma * np.sqrt(1 - k ** (2 * eta)),
            )
        )
        h_prev = h
    return rows


def _lagrange_integral(nodes: Sequence[float], index: int, start: float, stop: float) -> float:
    """The integral over [start, stop] of the polynomial that is 1 at nodes[index], 0 at the other nodes."""
    basis = Polynomial([1.0])
    for k, node in enumerate(nodes):
        if k != index:  # in r - start, so that the integral of short steps does not cancel
            basis = basis * Polynomial([start - node, 1.0]) / (nodes[index] - node)
    return float(basis.integ()(stop - start))
