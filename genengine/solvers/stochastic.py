"""Higher-order solvers that add fresh noise, in the noise ratio r = sigma/alpha of x/alpha.

An ancestral step goes down to r_down and adds noise up to r':
r_up = min(r', eta sqrt(r'^2 (r^2 - r'^2)/r^2)), r_down = sqrt(r'^2 - r_up^2).
"""

from collections.abc import Callable, Sequence

import numpy as np

from genengine.solvers._model import Model, Point, Row, X, finite_eta, kept, solver
from genengine.solvers.churn import at_ratio, ratio, stored_eps
from genengine.table import Write


@solver(needs_signal=True)
def dpm_2_ancestral(model: Model, *, eta: float = 1.0) -> list[Row]:
    """DPM-Solver-2 down to r_down, then noise up to r'.

    With r_mid = sqrt(r r_down): x_mid/alpha_mid = x0 + r_mid eps,
    x'/alpha' = x/alpha + (r_down - r) eps(x_mid, r_mid) + r_up z. Where r_down = 0: x'/alpha' = x0 + r_up z, one row.
    Second order and `dpm_2` at eta = 0.

    Arguments and returns: see the module. DPM-Solver-2 of Lu 2022 (DPM-Solver), Alg. 1, with k-diffusion's ancestral
    noise.

    Raises:
        ValueError: as the module says, where eta is negative or not finite, or the grid starts at alpha = 0.
    """
    return _two_stages("dpm_2_ancestral", model, eta, _hold_eps)


@solver(needs_signal=True)
def dpmpp_2s_ancestral(model: Model, *, eta: float = 1.0) -> list[Row]:
    """DPM-Solver++(2S) down to r_down, then noise up to r'.

    With r_mid = sqrt(r r_down): x_mid/alpha_mid = x0 + r_mid eps,
    x'/alpha' = (r_down/r) x/alpha + (1 - r_down/r) x0(x_mid, r_mid) + r_up z.
    Where r_down = 0: x'/alpha' = x0 + r_up z, one row. Second order at eta = 0.

    Arguments and returns: see the module. Lu 2022 (DPM-Solver++), Alg. 1, with k-diffusion's ancestral noise.

    Raises:
        ValueError: as the module says, where eta is negative or not finite, or the grid starts at alpha = 0.
    """
    return _two_stages("dpmpp_2s_ancestral", model, eta, _hold_x0)


@solver(needs_signal=True)
def dpmpp_sde(model: Model, *, eta: float = 1.0, r: float = 0.5) -> list[Row]:
    """DPM-Solver++ for the SDE, singlestep: two ancestral steps from the same state, the second with a better x0.

    At r_s = ratio^(1 - r) ratio'^r: x_s/alpha_s = x0 + down_s eps + up_s z_1, then
    D = (1 - 1/(2r)) x0 + x0(x_s, r_s)/(2r),  x'/alpha' = (down/ratio) x/alpha + (1 - down/ratio) D + up z_2.
    A step to sigma = 0 is one row, alpha' x0.

    Args, besides those of the module:
        eta: the share of fresh noise, >= 0.
        r: where between both ends, in the log of the ratio, the model is evaluated a second time, 0 < r <= 1.

    Returns: see the module. Lu 2022 (DPM-Solver++), section 5, in the singlestep form of k-diffusion.

    Raises:
        ValueError: as the module says, where eta or r is out of range, or the grid starts at alpha = 0.
    """
    finite_eta("dpmpp_sde", eta)
    if not 0.0 < r <= 1.0:
        raise ValueError(f"dpmpp_sde: r must be in (0, 1], got {r!r}")
    rows = []
    for now, end in model.steps:
        if end.sigma == 0:
            rows.append(model.row(now, end.alpha * model.x0(now)))
            continue
        mid = end if r == 1.0 else at_ratio(model, ratio(now) ** (1 - r) * ratio(end) ** r)
        down, up = ancestral_split(ratio(now), ratio(mid), eta)
        update = mid.alpha * (model.x0(now) + down * model.eps(now))
        rows.append(model.row(now, update, noise=mid.alpha * up, writes=(Write.X, Write.Y)))
        down, up = ancestral_split(ratio(now), ratio(end), eta)
        share, second = down / ratio(now), 1 / (2 * r)
        gain = end.alpha * (1 - share)
        history = (end.alpha * share / now.alpha, gain * (1 - second))
        rows.append(model.row(mid, gain * second * model.x0(mid), history=history, noise=end.alpha * up))
    return rows


@solver
def dpmpp_3m_sde(model: Model, *, eta: float = 1.0) -> list[Row]:
    """SDE-DPM-Solver++(3M): slope and curvature of x0 from its last three values.

    With lambda = log(alpha/sigma), h = lambda' - lambda, H = (1 + eta) h, phi_2 = 1 - (1 - exp(-H))/H,
    phi_3 = phi_2/H - 1/2, r_0 = h_prev/h, r_1 = h_prev_prev/h, D_0 = (x0 - H1)/r_0, D_1 = (H1 - H2)/r_1:
    x' = (sigma'/sigma) exp(-eta h) x + alpha' [(1 - exp(-H)) x0 + phi_2 (D_0 + r_0/(r_0 + r_1) (D_0 - D_1))
         - phi_3 (D_0 - D_1)/(r_0 + r_1)] + sigma' sqrt(1 - exp(-2 eta h)) z.
    The first step, and a step to sigma = 0, are first order, the second is that of `dpmpp_2m_sde(form="heun")`. Second
    order at eta = 0: the quadratic through the three values would count phi_3 twice.

    Arguments and returns: see the module. Lu 2022 (DPM-Solver++), the multistep form with three outputs; eta as in
    k-diffusion.

    Raises:
        ValueError: as the module says, and where eta is negative or not finite.
    """
    finite_eta("dpmpp_3m_sde", eta)
    rows, steps = [], []  # the lengths of the steps before, latest first
    for i, (now, end) in enumerate(model.steps):
        k = kept(now, end)  # exp(-h); 0 from alpha = 0 or to sigma = 0, where h is infinite
        gain = end.alpha * (1 - k ** (1 + eta))
        weights = [gain]
        if steps and k > 0:
            correction = end.alpha * _slope_weights(-np.log(k), steps, (1 + eta) * -np.log(k))
            weights = [gain + correction[0], *correction[1:]]
        update = end.sigma / now.sigma * k**eta * X + weights[0] * model.x0(now)
        history, writes = [0.0, 0.0], [Write.KEEP, Write.KEEP]
        for back, weight in enumerate(weights[1:], 1):
            history[(i - back) % 2] = weight
        writes[i % 2] = Write.Y
        noise = end.sigma * np.sqrt(1 - k ** (2 * eta))
        rows.append(model.row(now, update, history=history, writes=writes, noise=noise))
        steps = [-np.log(k), *steps][:2] if k > 0 else []  # across an infinite step x0 has no slope
    return rows


@solver(needs_signal=True)
def dpm_fast(model: Model, *, orders: Sequence[int] | None = None, eta: float = 0.0) -> list[Row]:
    """DPM-Solver-fast: singlestep DPM-Solver of order 1, 2 or 3 in each step, a row per evaluation.

    With lambda = log(alpha/sigma), h = lambda_down - lambda, and eps_j at lambda + r_j h, r_1 = 1/3 (1/2 in order 2),
    r_2 = 2/3, the last stage is
    x'/alpha' = x/alpha - r_down [(e^h - 1) eps + w (eps_j - eps)] + r_up z,  w = e^h - 1 (order 2, j = 1) or
    ((e^h - 1)/h - 1)/r_2 (order 3, j = 2). r_down does not go below the last ratio of the grid, so its last step adds
    no noise. Where r_down = 0: x'/alpha' = x0 + r_up z, one row.

    Args, besides those of the module:
        orders: 1, 2 or 3 for each step; by default 3, ..., 3, 2, 1 (a single step: 1).
        eta: the share of fresh noise, >= 0.

    Returns: see the module. Lu 2022 (DPM-Solver), Algs. 1 and 2 and section 3.4 (fast); eta as in k-diffusion.

    Raises:
        ValueError: as the module says, where orders or eta is out of range, or the grid starts at alpha = 0.
    """
    finite_eta("dpm_fast", eta)
    count = len(model.steps)
    orders = (*[3] * (count - 2), *[2, 1][-count:]) if orders is None else tuple(orders)
    if len(orders) != count or not set(orders) <= {1, 2, 3}:
        raise ValueError(f"dpm_fast: orders must hold 1, 2 or 3 for each of {count} steps, got {orders}")
    floor, rows = ratio(model.points[-1]), []
    for (now, end), order in zip(model.steps, orders, strict=True):
        down = max(floor, ancestral_split(ratio(now), ratio(end), eta)[0])
        up = np.sqrt((ratio(end) - down) * (ratio(end) + down))
        if down == 0:
            rows.append(model.row(now, end.alpha * model.x0(now), noise=end.alpha * up))
            continue
        rows += _fast_step(model, now, end, order, down, up)
    return rows


def ancestral_split(r: float, r_next: float, eta: float) -> tuple[float, float]:
    """(r_down, r_up): how far an ancestral step from r goes down, and the noise that brings it up to r_next."""
    fresh = min(1.0, eta * np.sqrt((1 - r_next / r) * (1 + r_next / r)))
    return r_next * np.sqrt((1 - fresh) * (1 + fresh)), r_next * fresh


def _two_stages(name: str, model: Model, eta: float, second: Callable) -> list[Row]:
    """A step to the geometric mean of r and r_down, then `second` from the step's start with the output there."""
    finite_eta(name, eta)
    rows = []
    for now, end in model.steps:
        down, up = ancestral_split(ratio(now), ratio(end), eta)
        if down == 0:
            rows.append(model.row(now, end.alpha * model.x0(now), noise=end.alpha * up))
            continue
        mid = at_ratio(model, np.sqrt(ratio(now) * down))
        rows.append(model.row(now, mid.alpha * model.x0(now) + mid.sigma * model.eps(now), writes=(Write.X,)))
        update, weight = second(model, mid, down, ratio(now))
        history = (end.alpha * weight / now.alpha,)
        rows.append(model.row(mid, end.alpha * update, history=history, noise=end.alpha * up))
    return rows


def _hold_eps(model: Model, mid: Point, down: float, r: float) -> tuple[np.ndarray, float]:
    """x'/alpha' with eps held at its value in the middle: its update, and the weight of x/alpha."""
    return (down - r) * model.eps(mid), 1.0


def _hold_x0(model: Model, mid: Point, down: float, r: float) -> tuple[np.ndarray, float]:
    """x'/alpha' with x0 held at its value in the middle: its update, and the weight of x/alpha."""
    return (1 - down / r) * model.x0(mid), down / r


def _slope_weights(h: float, steps: Sequence[float], total: float) -> np.ndarray:
    """Weights of x0 and of the one or two before it, for the slope (and curvature) of x0; total is (1 + eta) h."""
    phi_2 = 1 + np.expm1(-total) / total
    d_0 = np.array([1.0, -1.0, 0.0]) * h / steps[0]
    if len(steps) == 1:
        return phi_2 * d_0[:2]
    d_1 = np.array([0.0, 1.0, -1.0]) * h / steps[1]
    phi_3 = phi_2 / total - 0.5
    bend = (d_0 - d_1) * h / (steps[0] + steps[1])  # of D_0 - D_1 over r_0 + r_1
    return phi_2 * (d_0 + bend * steps[0] / h) - phi_3 * bend


def _fast_step(model: Model, now: Point, end: Point, order: int, down: float, up: float) -> list[Row]:
    """The stages of one step of `dpm_fast`: to each node in turn, then from x to down, with noise up to the end."""
    h = np.log(ratio(now) / down)
    nodes = {1: (1.0,), 2: (1 / 2, 1.0), 3: (1 / 3, 2 / 3, 1.0)}[order]
    middles = [at_ratio(model, ratio(now) * np.exp(-node * h)) for node in nodes[:-1]]
    targets = [*((middle.alpha, ratio(middle)) for middle in middles), (end.alpha, down)]
    y, stored = stored_eps(model, now)
    # x/alpha - target (e^h - 1) eps is x0 + target eps
    alpha, target = targets[0]
    rows = [model.row(now, alpha * (model.x0(now) + target * model.eps(now)), y=y, writes=(Write.X, Write.Y))]
    for before, node, middle, (alpha, target) in zip(nodes[:-1], nodes[1:], middles, targets[1:], strict=True):
        growth = np.expm1(node * h)
        slope = growth if order == 2 else (growth / (node * h) - 1) * node / before
        history = alpha * (np.array([1 / now.alpha, 0.0]) - target * (growth - slope) * stored)
        rows.append(model.row(middle, -alpha * target * slope * model.eps(middle), history=history))
    rows[-1].columns["s"] = end.alpha * up
    return rows
