"""DPM-Solver++ singlestep: several evaluations inside every step, no history across steps."""

import numpy as np

from genengine.solvers._exponential import half_log_snr, moments
from genengine.solvers._model import Model, Point, Row, X, one_of, solver
from genengine.table import Write


@solver(needs_signal=True)
def dpmpp_singlestep(model: Model, *, order: int = 2) -> list[Row]:
    """DPM-Solver++(2S) and (3S): x0 is evaluated inside the step, at even spacings of the log-SNR.

    With h the step in lambda = log(alpha/sigma), and u1 (and u2) at lambda + h/2 (or + h/3, + 2h/3),
    2S: x_u1 = (sigma_u1/sigma) x + alpha_u1 (1 - exp(-h/2)) x0,
        x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) x0(x_u1);
    3S: x_u1 with h/3, then with J(h) = 1 - (1 - exp(-h))/h and D_k = x0(x_uk) - x0
        x_u2 = (sigma_u2/sigma) x + alpha_u2 ((1 - exp(-2h/3)) x0 + 2 J(2h/3) D_1),
        x' = (sigma'/sigma) x + alpha' ((1 - exp(-h)) x0 + 3/2 J(h) D_2).
    `order` rows per step, and the same order; x waits in H1, x0 in H2. A step to sigma = 0, whose interval is
    infinite, is one `ddim` row.

    Arguments and returns: see the module.
        order: 2 or 3.
    Lu 2022 (DPM-Solver++), Alg. 1; the third order in Lu 2022 (DPM-Solver), Alg. 2, for x0.

    Raises:
        ValueError: as the module says, where order is neither 2 nor 3, or the grid starts at alpha = 0.
    """
    one_of("dpmpp_singlestep", "order", order, (2, 3))
    step = _second if order == 2 else _third
    rows = []
    for now, end in model.steps:
        if end.sigma == 0:
            rows.append(model.row(now, end.alpha * model.x0(now)))
        else:
            rows += step(model, now, end)
    return rows


def _second(model: Model, now: Point, end: Point) -> list[Row]:
    h = half_log_snr(end) - half_log_snr(now)
    mid = _inside(model, now, h / 2)
    first = mid.sigma / now.sigma * X - mid.alpha * np.expm1(-h / 2) * model.x0(now)
    last = -end.alpha * np.expm1(-h) * model.x0(mid)
    return [model.row(now, first, writes=(Write.X,)), model.row(mid, last, history=(end.sigma / now.sigma,))]


def _third(model: Model, now: Point, end: Point) -> list[Row]:
    h = half_log_snr(end) - half_log_snr(now)
    u1, u2 = _inside(model, now, h / 3), _inside(model, now, 2 * h / 3)
    first = u1.sigma / now.sigma * X - u1.alpha * np.expm1(-h / 3) * model.x0(now)
    whole, slope = u2.alpha * moments(2 * h / 3, 2) * (1, 2)
    second = model.row(u1, slope * model.x0(u1), history=(u2.sigma / now.sigma, whole - slope))
    whole, slope = end.alpha * moments(h, 2) * (1, 1.5)
    third = model.row(u2, slope * model.x0(u2), history=(end.sigma / now.sigma, whole - slope))
    return [model.row(now, first, writes=(Write.X, Write.Y)), second, third]


def _inside(model: Model, now: Point, offset: float) -> Point:
    """The point whose lambda is that of `now` plus an offset."""
    return model.point(model.path.t_of_log_snr(2 * (half_log_snr(now) + offset)))
