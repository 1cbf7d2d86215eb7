"""Solvers from data to noise, for inversion and editing: their grid rises, and x is the data they start from.

`sample` must be given x, as the table's init_scale means nothing here.
"""

import numpy as np

from genengine.solvers._exponential import half_log_snr
from genengine.solvers._model import Model, Row, kept, one_of, solver
from genengine.table import Write


@solver(rising=True)
def ddim_inverse(model: Model, *, model_at: str = "start") -> list[Row]:
    """DDIM run towards noise: x' = alpha' x0 + sigma' eps along a rising grid.

    Arguments and returns: see the module; the grid rises.
        model_at: "start" evaluates the network at the time of the state; "end" at the time it goes to, which for
            networks of discrete training steps avoids the step before the first.
    Song 2020 (DDIM), section 4.3.

    Raises:
        ValueError: as the module says, where model_at is neither "start" nor "end", and at sigma = 0 with clip,
            a score or an x0 prediction, which say nothing of eps there.
    """
    one_of("ddim_inverse", "model_at", model_at, ("start", "end"))
    rows = []
    for now, end in model.steps:
        point = now._replace(t=end.t) if model_at == "end" else now
        rows.append(model.row(point, end.alpha * model.x0(point) + end.sigma * model.eps(point)))
    return rows


@solver(rising=True)
def dpmpp_2m_inverse(model: Model) -> list[Row]:
    """`dpmpp_2m` run towards noise along a rising grid: second order; the previous x0 waits in H1.

    With h = lambda' - lambda < 0, x' = alpha' x0 + sigma' eps + alpha' (1 - exp(-h))/2 h/h_prev (x0 - H1). The
    first step, a step from sigma = 0, the one after it and a step to alpha = 0 are first order: `ddim_inverse`.

    Arguments, returns and errors: see the module and `ddim_inverse`; the grid rises. Lu 2022 (DPM-Solver++), Alg. 2,
    with the times reversed.
    """
    lam = [half_log_snr(point) for point in model.points]
    rows, h_prev = [], np.inf
    for i, (now, end) in enumerate(model.steps):
        h = lam[i + 1] - lam[i]
        second = end.alpha * (1 - kept(now, end)) / 2 * h / h_prev if np.isfinite(h) and np.isfinite(h_prev) else 0.0
        update = end.alpha * model.x0(now) + end.sigma * model.eps(now) + second * model.x0(now)
        rows.append(model.row(now, update, history=(-second,), writes=(Write.Y,)))
        h_prev = h
    return rows
