"""Multistep solvers: one evaluation per step, earlier outputs wait in the history."""

from collections.abc import Sequence

import numpy as np
from numpy.polynomial import Polynomial

from genengine.solvers._model import Model, Row, X, kept, solver
from genengine.table import Write


@solver
def dpmpp_2m(model: Model) -> list[Row]:
    """DPM-Solver++(2M): second order with one evaluation per step; the previous x0 waits in H1.

    With lambda = log(alpha/sigma), h = lambda' - lambda and h_prev the step before,
    D = x0 + h/(2 h_prev) (x0 - H1),  x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D.
    The first step, and a step to sigma = 0 (which returns alpha' x0), are first order: D = x0.

    Arguments, returns and errors: see the module. Lu 2022 (DPM-Solver++), Alg. 2.
    """
    return _dpmpp_2m_rows(model, 0.0)


@solver
def dpmpp_2m_sde(model: Model, *, eta: float = 1.0) -> list[Row]:
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
    return _dpmpp_2m_rows(model, eta)


@solver(clips=False)
def lms(model: Model, *, order: int = 4) -> list[Row]:
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
    return rows


def _dpmpp_2m_rows(model: Model, eta: float) -> list[Row]:
    rows, h_prev = [], np.inf  # an infinite step before the first makes the first one first order
    for now, end in model.steps:
        k = kept(now, end)  # exp(-h); 0 from alpha = 0 or to sigma = 0, where h is infinite
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
