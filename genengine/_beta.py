"""Quantiles of the beta distribution, for `schedules.beta`."""

import math

import numpy as np


def beta_quantile(u: np.ndarray, a: float, b: float) -> np.ndarray:
    """x with I_x(a, b) = u, elementwise, by bisection; exactly 0 and 1 at the ends.

    Args:
        u: probabilities in [0, 1].
        a, b: the parameters, above 0.

    Returns:
        float64 of u's shape.
    """
    x = np.asarray(u, dtype=np.float64).copy()
    inside = (x > 0) & (x < 1)
    wanted, low, high = x[inside], np.zeros(inside.sum()), np.ones(inside.sum())
    while np.any(high - low > 4e-16 * high):  # relative, as quantiles near 0 may be tiny
        middle = (low + high) / 2
        below = regularised_incomplete_beta(middle, a, b) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x[inside] = (low + high) / 2
    return x


def regularised_incomplete_beta(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """I_x(a, b), the beta distribution function, by its continued fraction (DLMF 8.17.22).

    Args:
        x: (n,) in [0, 1].
        a, b: the parameters, above 0.

    Returns:
        (n,) float64.

    Raises:
        ArithmeticError: where the fraction has not converged in 10,000 terms (a or b above some 1e7).
    """
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    swap = x > (a + 1) / (a + b + 2)  # beyond it the fraction of 1 - I_(1-x)(b, a) converges faster
    y = np.where(swap, 1 - x, x)
    p, q = np.where(swap, b, a), np.where(swap, a, b)
    with np.errstate(divide="ignore"):
        front = np.exp(log_scale + p * np.log(y) + q * np.log1p(-y)) / p
    value = front * _continued_fraction(y, p, q)
    return np.where(swap, 1 - value, value)


def _continued_fraction(x: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """1/(1 + d1/(1 + d2/(1 + ...))) from the front, two terms at a time, for x < (p + 1)/(p + q + 2)."""
    upper, lower = np.ones_like(x), 1 / (1 - (p + q) * x / (p + 1))
    value = lower
    for m in range(1, 5_000):
        even = m * (q - m) * x / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m) * (p + q + m) * x / ((p + 2 * m) * (p + 2 * m + 1))
        for d in (even, odd):
            upper, lower = 1 + d / upper, 1 / (1 + d * lower)
            value = value * (upper * lower)
        if np.all(np.abs(upper * lower - 1) < 1e-15):
            return value
    raise ArithmeticError(f"beta_quantile: no convergence for a = {p.max():g}, b = {q.max():g}; take smaller ones")
