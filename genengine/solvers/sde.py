"""Euler-Maruyama on the reverse-time SDEs that share the marginals of a path."""

from collections.abc import Callable

import numpy as np

from genengine.solvers._model import Model, Point, Row, X, one_of, solver

Diffusion = Callable[[float], float]

_DIFFUSIONS = {
    "sde": lambda point: 2 * point.sigma * (point.d_sigma - point.d_alpha / point.alpha * point.sigma),
    "sigma": lambda point: point.sigma,
    "linear": lambda point: point.t,
    "constant": lambda point: 1.0,
    "decreasing": lambda point: ((1 - np.cos(np.pi * point.t)) / 2) ** 2,
    "increasing-decreasing": lambda point: np.sin(np.pi * point.t) ** 2,
}
LAST_STEPS = ("mean", "noise", "euler", "tweedie")


@solver
def euler_maruyama(
    model: Model, *, diffusion: str | Diffusion = "sigma", scale: float = 1.0, last_step: str = "mean"
) -> list[Row]:
    """Euler-Maruyama on the reverse-time SDE with diffusion w(t), from noise to data.

    dx = (velocity - w/2 score) dt + sqrt(w) dW backwards in time, with score = -eps/sigma, so
    x' = x + (t' - t) (velocity + w/(2 sigma) eps) + sqrt(w (t - t')) z.
    With every w >= 0 x has the marginals of the path; w = 0 is `euler`. w(t) is `scale` times
    "sde": 2 sigma (d_sigma - d_alpha/alpha sigma), the squared diffusion of the forward SDE (beta(t) on
    `paths.VPLinear`, d sigma^2/dt on `paths.VE`; infinite at alpha = 0); "sigma": sigma; "linear": t; "constant": 1;
    "decreasing": ((1 - cos(pi t))/2)^2, falling towards the data; "increasing-decreasing": sin^2(pi t); or a function.

    Arguments and returns: see the module.
        diffusion: a name above, or a function of t.
        scale: a finite number >= 0.
        last_step: "mean" leaves out the noise of the last step, "noise" keeps it, "euler" follows the velocity alone,
            "tweedie" goes along x0 and eps, as `ddim` does.
    Song 2021 (score SDE), section 3.3 and appendix; Ma 2024 (SiT), section 2, for the choices of w on interpolants.

    Raises:
        ValueError: as the module says, on an unknown name, where scale is out of range, or where w is negative or not
            finite at a time of the grid.
    """
    one_of("euler_maruyama", "last_step", last_step, LAST_STEPS)
    if not callable(diffusion):
        one_of("euler_maruyama", "diffusion", diffusion, tuple(_DIFFUSIONS))
    if not 0.0 <= scale < np.inf:
        raise ValueError(f"euler_maruyama: scale must be a finite number >= 0, got {scale!r}")
    rows = []
    for i, (now, end) in enumerate(model.steps):
        dt, kind = end.t - now.t, last_step if i == len(model.steps) - 1 else "noise"
        if kind == "tweedie":
            rows.append(model.row(now, end.alpha * model.x0(now) + end.sigma * model.eps(now)))
            continue
        w = 0.0 if kind == "euler" else scale * _diffusion(diffusion, now)
        drift = model.velocity(now) + w / (2 * now.sigma) * model.eps(now)
        rows.append(model.row(now, X + dt * drift, noise=np.sqrt(-w * dt) if kind == "noise" else 0.0))
    return rows


def _diffusion(diffusion: str | Diffusion, point: Point) -> float:
    """w at a point, before `scale`."""
    if diffusion == "sde" and point.alpha == 0:
        raise ValueError(
            f"euler_maruyama: diffusion 'sde' is infinite where alpha = 0, got t = {point.t}; start the grid a little "
            "below, or take diffusion='sigma'"
        )
    w = diffusion(point.t) if callable(diffusion) else _DIFFUSIONS[diffusion](point)
    if not 0.0 <= w < np.inf:
        raise ValueError(f"euler_maruyama: diffusion must be finite and >= 0, got {w!r} at t = {point.t}")
    return float(w)
