"""Single-step solvers of the probability-flow ODE."""

import numpy as np

from genengine.solvers._model import Model, Row, X, solver
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
        if end.sigma == 0 and (model.clip or model.prediction not in ("v", "velocity") or not np.isfinite(end.d_sigma)):
            rows.append(model.row(now, X + dt * velocity))
            continue
        # H2 holds the velocity, or with clip the clipped x0, from which H1 gives the velocity back
        y, (h1, h2) = (None, velocity[[0, 2]]) if model.clip else (velocity, (0.0, 1.0))
        rows.append(model.row(now, X + dt * velocity, y=y, writes=(Write.X, Write.Y)))
        rows.append(model.row(end, dt / 2 * model.velocity(end), history=(1 + dt / 2 * h1, dt / 2 * h2)))
    return rows


@solver
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
    model.needs_signal("dpm_2")
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
