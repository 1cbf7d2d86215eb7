"""DPM-Solver++ multistep: one evaluation per step, earlier x0 wait in the history."""

import numpy as np

from genengine.solvers._exponential import half_log_snr, moments, order_at, usable
from genengine.solvers._model import Model, Point, Row, X, finite_eta, kept, one_of, remembered, solver
from genengine.table import Write

FORMS = ("midpoint", "heun")


@solver
def dpmpp_2m(model: Model, *, form: str = "midpoint") -> list[Row]:
    """DPM-Solver++(2M): second order with one evaluation per step; the previous x0 waits in H1.

    With lambda = log(alpha/sigma), h = lambda' - lambda and h_prev the step before,
    x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) x0 + w h/h_prev (x0 - H1),
    w = alpha' (1 - exp(-h))/2 ("midpoint") or alpha' (1 - (1 - exp(-h))/h) ("heun").
    The first step, and a step to sigma = 0 (which returns alpha' x0), are first order.

    Arguments and returns: see the module. Lu 2022 (DPM-Solver++), Alg. 2; the two forms agree to second order.

    Raises:
        ValueError: as the module says, and where form is neither "midpoint" nor "heun".
    """
    one_of("dpmpp_2m", "form", form, FORMS)
    return _dpmpp_2m_rows(model, 0.0, form)


@solver
def dpmpp_2m_sde(model: Model, *, eta: float = 1.0, form: str = "midpoint") -> list[Row]:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` with noise.

    With g = (1 + eta) h and the rest as in `dpmpp_2m`,
    x' = (sigma'/sigma) exp(-eta h) x + alpha' (1 - exp(-g)) x0 + w h/h_prev (x0 - H1)
    + sigma' sqrt(1 - exp(-2 eta h)) z, w = alpha' (1 - exp(-g))/2 or alpha' (1 - (1 - exp(-g))/g).

    Arguments and returns: see the module. Lu 2022 (DPM-Solver++), SDE-DPM-Solver++(2M), at eta = 1;
    eta as in k-diffusion.

    Raises:
        ValueError: as the module says, where eta is negative or not finite, or form is neither "midpoint" nor
            "heun".
    """
    finite_eta("dpmpp_2m_sde", eta)
    one_of("dpmpp_2m_sde", "form", form, FORMS)
    return _dpmpp_2m_rows(model, eta, form)


@solver
def dpmpp_3m(model: Model, *, form: str = "published", lower_order_final: bool = False) -> list[Row]:
    """DPM-Solver++(3M): one evaluation per step; the two previous x0 wait in H1 and H2.

    With h the step in lambda = log(alpha/sigma), r0 and r1 the two steps before it relative to h, and
    d = (x0 - x0_1)/r0, d_1 = (x0_1 - x0_2)/r1, D1 = d + r0/(r0 + r1) (d - d_1), D2 = (d - d_1)/(r0 + r1),
    x' = (sigma'/sigma) x + alpha' (phi1 x0 + phi2 D1 + w phi3 D2),
    phi1 = 1 - exp(-h), phi2 = 1 - phi1/h, phi3 = 1/2 - phi2/h.
    w = 1 is the solver as published and as other libraries run it. D2 is half of the second derivative, so third
    order takes w = 2, the "exact" form; with w = 1 the order is 2, with a small constant. The first two steps have
    order 1 and 2, and a step to sigma = 0 returns alpha' x0.

    Arguments and returns: see the module.
        form: "published" (w = 1) or "exact" (w = 2).
        lower_order_final: the last two steps have orders 2 and 1, which steadies sampling in few steps.
    Lu 2022 (DPM-Solver++), multistep, third order; phi as in Hochbruck and Ostermann 2010.

    Raises:
        ValueError: as the module says, and where form is neither "published" nor "exact".
    """
    one_of("dpmpp_3m", "form", form, ("published", "exact"))
    lam = [half_log_snr(point) for point in model.points]
    rows = []
    for i, (now, end) in enumerate(model.steps):
        used = usable(lam, i, order_at(len(model.steps), i, 3, lower_order_final))
        weights = dict(zip(used, _dpmpp_3m_weights(lam, used, end, form), strict=True))
        history, writes = remembered(i, weights, 2)
        update = end.sigma / now.sigma * X + weights[i] * model.x0(now)
        rows.append(model.row(now, update, history=history, writes=writes))
    return rows


def _dpmpp_3m_weights(lam: list[float], used: list[int], end: Point, form: str) -> np.ndarray:
    """The weights in x' of the x0 of the steps `used`."""
    unit = np.eye(len(used))  # row j stands for the x0 of used[j]
    i = used[0]
    h = lam[i + 1] - lam[i]
    if len(used) == 1:
        return end.alpha * -np.expm1(-h) * unit[0]
    phi1, phi2, twice_phi3 = moments(h, 3)
    r0 = (lam[i] - lam[i - 1]) / h
    d = (unit[0] - unit[1]) / r0
    if len(used) == 2:
        return end.alpha * phi1 * (unit[0] + d / 2)
    r1 = (lam[i - 1] - lam[i - 2]) / h
    bend = (d - (unit[1] - unit[2]) / r1) / (r0 + r1)
    phi3 = twice_phi3 / 2 if form == "published" else twice_phi3
    return end.alpha * (phi1 * unit[0] + phi2 * (d + r0 * bend) + phi3 * bend)


def _dpmpp_2m_rows(model: Model, eta: float, form: str) -> list[Row]:
    rows, h_prev = [], np.inf  # an infinite step before the first makes the first one first order
    for now, end in model.steps:
        k = kept(now, end)  # exp(-h); 0 from alpha = 0 or to sigma = 0, where h is infinite
        h = -np.log(k) if k > 0 else np.inf
        gain = end.alpha * (1 - k ** (1 + eta))
        blend = 0.0
        if np.isfinite(h):
            blend = h / h_prev * (gain / 2 if form == "midpoint" else end.alpha - gain / ((1 + eta) * h))
        update = end.sigma / now.sigma * k**eta * X + (gain + blend) * model.x0(now)
        noise = end.sigma * np.sqrt(1 - k ** (2 * eta))
        rows.append(model.row(now, update, history=(-blend,), writes=(Write.Y,), noise=noise))
        h_prev = h
    return rows
