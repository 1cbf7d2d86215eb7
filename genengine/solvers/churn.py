"""Sampling with churn: before a step some noise is added, and the step starts from the higher noise level.

The model is evaluated at the churned state, so the noise that precedes a step belongs to the last row of the step
before it, and the first step's to the start: the table's init_scale.
"""

from collections.abc import Sequence

import numpy as np

from genengine.solvers._model import Model, Point, Row, one_of, solver
from genengine.table import Write

METHODS = ("heun", "euler", "dpm_2")


@solver(needs_signal=True)
def edm(
    model: Model,
    *,
    method: str = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
) -> list[Row]:
    """The stochastic sampler of EDM, in the noise ratio r = sigma/alpha, where d(x/alpha)/dr = eps.

    gamma = min(s_churn/num_steps, sqrt(2) - 1) where s_tmin <= r <= s_tmax, else 0;
    r_hat = (1 + gamma) r,  x_hat/alpha_hat = x/alpha + s_noise sqrt(r_hat^2 - r^2) z;
    then one step of `method` from r_hat to r'. With eps_hat = eps(x_hat, r_hat):
    euler: x'/alpha' = x_hat/alpha_hat + (r' - r_hat) eps_hat;
    heun: the same with the mean of eps_hat and of eps at the point that Euler's step reaches;
    dpm_2: the same with eps at the geometric mean of r_hat and r', reached by Euler's step.
    A step to sigma = 0 is one Euler row. On `paths.EDM` r is sigma and without churn this is `heun`, `euler`, `dpm_2`.

    Args, besides those of the module:
        method: "heun" (two rows per step), "euler" (one) or "dpm_2" (two).
        s_churn: how much noise is added over all steps, >= 0.
        s_tmin, s_tmax: the noise levels r between which it is added.
        s_noise: the factor on the noise added, >= 0, a little above 1 to make up for lost detail.

    Returns: see the module. Karras 2022, Alg. 2 (heun); the middle of dpm_2 is that of Lu 2022 (DPM-Solver), Alg. 1.

    Raises:
        ValueError: as the module says, on an unknown method, an option out of range, a grid that starts at
            alpha = 0, or where churn leads beyond t = 1.
    """
    one_of("edm", "method", method, METHODS)
    if not 0.0 <= s_noise < np.inf:
        raise ValueError(f"edm: s_noise must be a finite number >= 0, got {s_noise!r}")
    step = {"heun": _heun, "euler": _euler, "dpm_2": _dpm_2}[method]
    increases = gammas([ratio(now) for now, _ in model.steps], s_churn, s_tmin, s_tmax)
    rows = []
    for (now, end), gamma in zip(model.steps, increases, strict=True):
        hat = _hotter(model, now, gamma)
        scale = hat.alpha / now.alpha
        noise = s_noise * hat.alpha * ratio(now) * np.sqrt(gamma * (2 + gamma))  # r_hat^2 - r^2
        if rows:
            rows[-1] = _churned(rows[-1], scale, noise)
        else:  # fresh noise on top of fresh noise
            model.init_scale = float(np.hypot(scale * model.init_scale, noise))
        rows += step(model, hat, end)
    return rows


def gammas(ratios: Sequence[float], s_churn: float, s_tmin: float, s_tmax: float) -> list[float]:
    """The relative increase of the noise level before each step (Karras 2022, Alg. 2, line 3).

    Args:
        ratios: sigma/alpha where each step starts.
        s_churn, s_tmin, s_tmax: as in `edm`.

    Raises:
        ValueError: where s_churn is negative or not finite, or a bound is not a number.
    """
    if not 0.0 <= s_churn < np.inf:
        raise ValueError(f"edm: s_churn must be a finite number >= 0, got {s_churn!r}")
    if np.isnan(s_tmin) or np.isnan(s_tmax):
        raise ValueError(f"edm: s_tmin and s_tmax must be numbers, got {s_tmin!r} and {s_tmax!r}")
    gamma = min(s_churn / len(ratios), np.sqrt(2.0) - 1.0)
    return [gamma if s_tmin <= r <= s_tmax else 0.0 for r in ratios]


def ratio(point: Point) -> float:
    """r = sigma/alpha: the noise level of x/alpha."""
    return point.sigma / point.alpha


def at_ratio(model: Model, r: float) -> Point:
    """The point of the path where sigma/alpha = r."""
    return model.point(float(model.path.t_of_log_snr(-2.0 * np.log(r))))


def stored_eps(model: Model, point: Point) -> tuple[np.ndarray | None, np.ndarray]:
    """What a row at `point` must keep as y (with x in H1, y in H2), and the weights of (H1, H2) that give eps back.

    Without clipping y is eps itself. With it y is x0, and eps = (x - alpha x0)/sigma.
    """
    if model.clip:
        return None, np.array([1.0, -point.alpha]) / point.sigma
    return model.eps(point), np.array([0.0, 1.0])


def _hotter(model: Model, now: Point, gamma: float) -> Point:
    """The point whose noise ratio is 1 + gamma times that of `now`."""
    if gamma == 0:
        return now
    t = float(model.path.t_of_log_snr(model.path.log_snr(now.t) - 2.0 * np.log1p(gamma)))
    if not t <= 1.0:  # not a number where the path ends before
        raise ValueError(
            f"edm: churn at t = {now.t:g} would raise the noise ratio {ratio(now):g} by {gamma:g} of it, beyond t = 1; "
            "pass a smaller s_tmax, start the grid later, or take a path with a larger sigma_max"
        )
    return model.point(t)


def _churned(row: Row, scale: float, noise: float) -> Row:
    """The row, then x_hat = scale x' + noise z."""
    scaled = {name: scale * row.columns[name] for name in ("a", "b", "c", "h1", "h2", "h3") if name in row.columns}
    return Row({**row.columns, **scaled, "s": noise}, row.writes)


def _euler(model: Model, now: Point, end: Point) -> list[Row]:
    return [model.row(now, end.alpha * model.x0(now) + end.sigma * model.eps(now))]


def _heun(model: Model, now: Point, end: Point) -> list[Row]:
    if end.sigma == 0:
        return _euler(model, now, end)
    y, eps_now = stored_eps(model, now)
    half = end.alpha * (ratio(end) - ratio(now)) / 2
    history = np.array([end.alpha / now.alpha, 0.0]) + half * eps_now
    return [
        model.row(now, end.alpha * model.x0(now) + end.sigma * model.eps(now), y=y, writes=(Write.X, Write.Y)),
        model.row(end, half * model.eps(end), history=history),
    ]


def _dpm_2(model: Model, now: Point, end: Point) -> list[Row]:
    if end.sigma == 0:
        return _euler(model, now, end)
    mid = at_ratio(model, np.sqrt(ratio(now) * ratio(end)))
    update = end.alpha * (ratio(end) - ratio(now)) * model.eps(mid)
    return [
        model.row(now, mid.alpha * model.x0(now) + mid.sigma * model.eps(now), writes=(Write.X,)),
        model.row(mid, update, history=(end.alpha / now.alpha,)),
    ]
