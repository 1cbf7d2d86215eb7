"""Time grids for sampling, and maps from random numbers to training times.

A grid is a float64 array of num_steps + 1 strictly falling times that ends at t_min (0 is data, 1 is noise).
The `*_times` functions turn random numbers into training times with arithmetic operators alone, so that they
serve NumPy arrays and tensors alike; they draw nothing themselves.
"""

import math
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike


class _HasLogSnr(Protocol):
    def t_of_log_snr(self, log_snr: ArrayLike) -> np.ndarray: ...


def uniform(num_steps: int, t_max: float = 1.0, t_min: float = 0.0) -> np.ndarray:
    """Evenly spaced times: t_i = t_max + (t_min - t_max) i / num_steps.

    Args:
        num_steps: number of steps, at least 1.
        t_max: the first time, t_min < t_max <= 1.
        t_min: the last time, at least 0.

    Returns:
        (num_steps + 1,) float64.

    Raises:
        ValueError: on num_steps below 1 or times out of order or range.
    """
    return _checked("uniform", np.linspace(t_max, t_min, _count("uniform", num_steps) + 1))


def karras(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    path: _HasLogSnr | None = None,
) -> np.ndarray:
    """Noise levels that are evenly spaced in sigma^(1/rho), then 0 (Karras 2022, eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(num_steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    for i < num_steps. Here sigma is the noise relative to the data, sigma(t)/alpha(t), so the grid has a
    meaning on every path.

    Args:
        num_steps: number of steps, at least 1.
        sigma_min: the last noise level above 0.
        sigma_max: the first noise level, above sigma_min.
        rho: larger values put more steps at low noise; above 0.
        path: the path whose times are wanted; by default `paths.EDM(sigma_max)`, where t = sigma/sigma_max.

    Returns:
        (num_steps + 1,) float64 times, the last one 0.

    Raises:
        ValueError: on arguments out of order, or a noise level that the path does not reach.
    """
    num_steps = _count("karras", num_steps)
    if not (0.0 < sigma_min < sigma_max < math.inf and 0.0 < rho < math.inf):
        raise ValueError(
            "karras: needs 0 < sigma_min < sigma_max and rho > 0, "
            f"got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}, rho={rho!r}"
        )
    ends = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    sigma = np.linspace(*ends, num_steps) ** rho
    sigma[0] = sigma_max
    t = sigma / sigma_max if path is None else path.t_of_log_snr(-2.0 * np.log(sigma))
    if path is not None and abs(t[0] - 1.0) < 1e-9:
        t[0] = 1.0  # the inverse may land a rounding error beyond the end
    if not np.all((t > 0.0) & (t <= 1.0)):
        raise ValueError(
            f"karras: the path does not reach every noise level from sigma_max={sigma_max!r} down to "
            f"sigma_min={sigma_min!r}; choose them within exp(-path.log_snr(t)/2) for t in (0, 1]"
        )
    return _checked("karras", np.append(t, 0.0))


def shifted(num_steps: int, shift: float = 3.0, t_max: float = 1.0, t_min: float = 0.0) -> np.ndarray:
    """Evenly spaced times pushed towards noise: t' = shift t / (1 + (shift - 1) t)  (Esser 2024, eq. 23).

    Args:
        num_steps: number of steps, at least 1.
        shift: above 1 for more steps at high noise (large images), 1 for the uniform grid.
        t_max, t_min: the ends before the shift.

    Returns:
        (num_steps + 1,) float64.

    Raises:
        ValueError: on num_steps below 1, shift not above 0, or times out of order or range.
    """
    return _checked("shifted", shifted_times(uniform(_count("shifted", num_steps), t_max, t_min), shift))


def logit_normal(num_steps: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """The quantiles of the logit-normal distribution: t_i = sigmoid(mean + std Phi^-1(1 - i/num_steps)).

    The ends are exactly 1 and 0, and steps are dense where `logit_normal_times` draws most often.

    Args:
        num_steps: number of steps, at least 1.
        mean: above 0 for more steps at high noise.
        std: the spread, above 0.

    Returns:
        (num_steps + 1,) float64.

    Raises:
        ValueError: on num_steps below 1 or std not above 0.
    """
    quantiles = np.arange(_count("logit_normal", num_steps) - 1, 0, -1) / num_steps
    normal = np.array([NormalDist().inv_cdf(u) for u in quantiles])
    return _checked("logit_normal", np.concatenate([[1.0], logit_normal_times(normal, mean, std), [0.0]]))


def uniform_times(u, t_min: float = 0.0, t_max: float = 1.0):
    """Training times t = t_min + (t_max - t_min) u from uniform numbers u in (0, 1), array or tensor.

    Raises:
        ValueError: unless 0 <= t_min < t_max <= 1.
    """
    if not 0.0 <= t_min < t_max <= 1.0:
        raise ValueError(f"uniform_times: needs 0 <= t_min < t_max <= 1, got t_min={t_min!r}, t_max={t_max!r}")
    return t_min + (t_max - t_min) * u


def logit_normal_times(z, mean: float = 0.0, std: float = 1.0):
    """Training times t = sigmoid(mean + std z) from standard normal numbers z (Esser 2024, eq. 19).

    Args:
        z: array or tensor of any shape, N(0, 1).
        mean: above 0 for more training at high noise.
        std: the spread, above 0.

    Returns:
        Times strictly inside (0, 1), of the shape and type of z.

    Raises:
        ValueError: where std is not above 0 or mean is not finite.
    """
    if not (0.0 < std < math.inf and math.isfinite(mean)):
        raise ValueError(f"logit_normal: needs a finite mean and std > 0, got mean={mean!r}, std={std!r}")
    return 1.0 / (1.0 + math.e ** -(mean + std * z))


def shifted_times(u, shift: float = 3.0):
    """Times t = shift u / (1 + (shift - 1) u) from times or uniform numbers u in [0, 1] (Esser 2024, eq. 23).

    Raises:
        ValueError: where shift is not a finite number above 0.
    """
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shifted: shift must be a finite number above 0, got {shift!r}")
    return shift * u / (1.0 + (shift - 1.0) * u)


def _count(grid: str, num_steps: int) -> int:
    if isinstance(num_steps, bool) or num_steps != int(num_steps) or num_steps < 1:
        raise ValueError(f"{grid}: num_steps must be a whole number above 0, got {num_steps!r}")
    return int(num_steps)


def _checked(grid: str, t: np.ndarray) -> np.ndarray:
    """t, refused unless it falls strictly from at most 1 to at least 0."""
    if not (np.all(np.diff(t) < 0.0) and t[0] <= 1.0 and t[-1] >= 0.0):
        raise ValueError(f"{grid}: times must fall strictly from t_max <= 1 to t_min >= 0, got {t!r}")
    return t
