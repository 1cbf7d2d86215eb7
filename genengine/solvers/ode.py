"""Single-step solvers of the probability-flow ODE."""

import numpy as np

from genengine.solvers._model import Model, Point, Row, X, solver
from genengine.table import Write


@solver
def euler(model: Model) -> list[Row]:
    """Euler's method on dx/dt = velocity(x, t): x' = x + (t' - t) velocity.

    First order. Arguments, returns and errors: see the module. Lipman 2022; on `paths.EDM` this is Karras
    2022, Alg. 1 without its correction, on `paths.RectifiedFlow` and `paths.EDM` it equals `ddim`.
    """
    return [model.row(now, X + (end.t - now.t) * model.velocity(now)) for now, end in model.steps]


@solver
def heun(model: Model) -> list[Row]:
    """Heun's method: x' = x + (t' - t)/2 (velocity(x, t) + velocity(x + (t' - t) velocity(x, t), t')).

    Second order, two rows per step: the first stores x in H1 and y in H2, the second reads them. A step to
    sigma = 0 is one Euler row (Karras 2022, Alg. 1, line 6) because there the velocity, (x - x0)/sigma or
    alike, is 0/0; only a model that predicts v or velocity on a path with finite derivatives, unclipped, is
    evaluated at that end.

    Arguments, returns and errors: see the module. Karras 2022, Alg. 1.
    """
    rows = []
    for now, end in model.steps:
        dt, velocity = end.t - now.t, model.velocity(now)
        if not _evaluable(model, end):
            rows.append(model.row(now, X + dt * velocity))
            continue
        # H2 holds the velocity, or with clip the clipped x0, from which H1 gives the velocity back
        y, (h1, h2) = (None, velocity[[0, 2]]) if model.clip else (velocity, (0.0, 1.0))
        rows.append(model.row(now, X + dt * velocity, y=y, writes=(Write.X, Write.Y)))
        rows.append(model.row(end, dt / 2 * model.velocity(end), history=(1 + dt / 2 * h1, dt / 2 * h2)))
    return rows


@solver(needs_signal=True)
def dpm_2(model: Model) -> list[Row]:
    """DPM-Solver-2: a midpoint method in the log-SNR.

    At the middle u of the log-SNR interval, x_u = alpha_u x0 + sigma_u eps; then
    x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) eps(x_u, u).
    Second order, two rows per step; x waits in H1. A step to sigma = 0, whose interval is infinite, is one
    `ddim` row.

    Arguments and returns: see the module. Lu 2022 (DPM-Solver), Alg. 1; with alpha = 1, Karras 2022's DPM-2.

    Raises:
        ValueError: as the module says, and where the grid starts at alpha = 0 (log-SNR = -inf).
    """
    rows = []
    for now, end in model.steps:
        if end.sigma == 0:
            rows.append(model.row(now, end.alpha * model.x0(now) + end.sigma * model.eps(now)))
            continue
        mid = model.point(model.path.t_of_log_snr(0.5 * (model.path.log_snr(now.t) + model.path.log_snr(end.t))))
        rows.append(model.row(now, mid.alpha * model.x0(now) + mid.sigma * model.eps(now), writes=(Write.X,)))
        scale = end.alpha / now.alpha
        rows.append(model.row(mid, (end.sigma - scale * now.sigma) * model.eps(mid), history=(scale,)))
    return rows


@solver
def midpoint(model: Model) -> list[Row]:
    """The explicit midpoint method: x' = x + (t' - t) velocity(x + (t' - t)/2 velocity(x, t), (t + t')/2).

    Second order, two rows per step; x waits in H1. The end of a step is never evaluated, so a grid may end at
    sigma = 0 whatever the prediction.

    Arguments, returns and errors: see the module. Hairer, Norsett and Wanner, Solving Ordinary Differential
    Equations I, II.1.
    """
    return [row for now, end in model.steps for row in _midpoint_step(model, now, end)]


@solver
def rk4(model: Model) -> list[Row]:
    """The classical Runge-Kutta method: x' = x + (t' - t)/6 (k1 + 2 k2 + 2 k3 + k4).

    k1 = velocity(x, t), k2 and k3 at the middle from x + (t' - t)/2 k1 and x + (t' - t)/2 k2, k4 at t' from
    x + (t' - t) k3. Fourth order, four rows per step. The registers hold x and the second and third stage's
    state x1, x2 rather than slopes: with x3 the last stage's state,
    x' = (x1 + 2 x2 + x3 - x)/3 + (t' - t)/6 k4.
    A step to sigma = 0 where the velocity is 0/0 (see `heun`) is one step of `midpoint`.

    Arguments, returns and errors: see the module. Hairer, Norsett and Wanner, Solving Ordinary Differential
    Equations I, II.1.
    """
    rows = []
    for now, end in model.steps:
        if not _evaluable(model, end):
            rows += _midpoint_step(model, now, end)
            continue
        dt, mid = end.t - now.t, model.point((now.t + end.t) / 2)
        third = 1.0 / 3.0
        rows += [
            model.row(now, X + dt / 2 * model.velocity(now), writes=(Write.X,)),
            model.row(mid, dt / 2 * model.velocity(mid), history=(1.0,), writes=(Write.KEEP, Write.X)),
            model.row(mid, dt * model.velocity(mid), history=(1.0,), writes=(Write.KEEP, Write.KEEP, Write.X)),
            model.row(end, third * X + dt / 6 * model.velocity(end), history=(-third, third, 2 * third)),
        ]
    return rows


def _midpoint_step(model: Model, now: Point, end: Point) -> list[Row]:
    dt, mid = end.t - now.t, model.point((now.t + end.t) / 2)
    return [
        model.row(now, X + dt / 2 * model.velocity(now), writes=(Write.X,)),
        model.row(mid, dt * model.velocity(mid), history=(1.0,)),
    ]


def _evaluable(model: Model, point: Point) -> bool:
    """Whether the velocity is determined at a point, sigma = 0 too: see `heun`."""
    regular = model.prediction in ("v", "velocity") and np.isfinite(point.d_sigma)
    return point.sigma > 0 or (regular and not model.clip)
