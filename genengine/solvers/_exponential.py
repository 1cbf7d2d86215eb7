"""Exponential integrators in lambda = log(alpha/sigma): the integrals and the history that DPM-Solver-like rows share.

With s from 0 to 1 over a step of length h in lambda, the exact step is
x' = (sigma'/sigma) x + alpha' integral of h exp(-h (1 - s)) x0(s) ds. Solvers differ in how they guess x0(s).
"""

import numpy as np

from genengine.solvers._model import Point

# Gauss-Legendre on [0, 1]: 24 nodes integrate exp(h s) times a cubic to rounding for |h| < 40, and for small h
# without the cancellation of the closed forms
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def half_log_snr(point: Point) -> float:
    """lambda = log(alpha/sigma); inf at sigma = 0, -inf at alpha = 0."""
    if point.sigma == 0 or point.alpha == 0:
        return np.inf if point.sigma == 0 else -np.inf
    return float(np.log(point.alpha / point.sigma))


def moments(h: float, count: int) -> np.ndarray:
    """(count,) float64: J_k = integral over [0, 1] of h exp(-h (1 - s)) s^k ds, so J_0 = 1 - exp(-h)."""
    weights = h * np.exp(-h * (1 - _NODES)) * _WEIGHTS
    return np.array([-np.expm1(-h), *(weights @ _NODES**k for k in range(1, count))])


def usable(lam: list[float], i: int, order: int) -> list[int]:
    """The newest `order` steps up to i whose y can enter step i, newest first: only i itself where h is infinite."""
    if not np.isfinite(lam[i + 1] - lam[i]):
        return [i]
    return [j for j in range(i, max(-1, i - order), -1) if np.isfinite(lam[j])]


def order_at(num_steps: int, i: int, order: int, lower_order_final: bool) -> int:
    """The order of step i; with lower_order_final at most 2 and 1 in the last two steps."""
    return min(order, num_steps - i) if lower_order_final else order
