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

from genengine._beta import beta_quantile


class _HasLogSnr(Protocol):
    def log_snr(self, t: ArrayLike) -> np.ndarray: ...
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
    return _at_noise_levels("karras", np.linspace(*ends, num_steps) ** rho, sigma_min, sigma_max, path)


def exponential(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, path: _HasLogSnr | None = None
) -> np.ndarray:
    """Noise levels that are evenly spaced in log sigma, then 0: sigma_i = sigma_max (sigma_min/sigma_max)^(i/(N - 1)).

    As in `karras`, sigma is the noise relative to the data, sigma(t)/alpha(t), and i < N = num_steps.

    Args:
        num_steps: number of steps, at least 1.
        sigma_min: the last noise level above 0.
        sigma_max: the first noise level, above sigma_min.
        path: the path whose times are wanted; by default `paths.EDM(sigma_max)`, where t = sigma/sigma_max.

    Returns:
        (num_steps + 1,) float64 times, the last one 0.

    Raises:
        ValueError: on arguments out of order, or a noise level that the path does not reach.
    """
    num_steps = _count("exponential", num_steps)
    if not 0.0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"exponential: needs 0 < sigma_min < sigma_max, got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}"
        )
    sigma = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), num_steps))
    return _at_noise_levels("exponential", sigma, sigma_min, sigma_max, path)


def log_snr(num_steps: int, path: _HasLogSnr, t_max: float = 1.0, t_min: float = 1e-3) -> np.ndarray:
    """Times evenly spaced in the log-SNR of a path (Lu 2022, DPM-Solver).

    Args:
        num_steps: number of steps, at least 1.
        path: the path, whose log-SNR must be finite at both ends.
        t_max: the first time, t_min < t_max <= 1.
        t_min: the last time; above 0 where sigma(0) = 0.

    Returns:
        (num_steps + 1,) float64 times from t_max to t_min.

    Raises:
        ValueError: on num_steps below 1, times out of order or range, or a log-SNR that is not finite at an end.
    """
    num_steps = _count("log_snr", num_steps)
    ends = float(path.log_snr(t_max)), float(path.log_snr(t_min))
    if not np.isfinite(ends).all():
        raise ValueError(
            f"log_snr: the path's log-SNR must be finite at t_max={t_max!r} and t_min={t_min!r}, got {ends}; "
            "choose t_max where alpha > 0 and t_min where sigma > 0"
        )
    t = np.array(path.t_of_log_snr(np.linspace(*ends, num_steps + 1)))
    t[0], t[-1] = t_max, t_min  # the inverse may land a rounding error beside them
    return _checked("log_snr", t)


def linspace(num_steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Training steps evenly spaced from the last to the first, rounded, then t = 0.

    Step n of T = num_timesteps is t = (n + 1)/T (see `paths.Discrete`); n_i = round((T - 1)(1 - i/(N - 1))).
    Lin 2024 (common diffusion noise schedules), table 2.

    Args:
        num_steps: N, 1 to num_timesteps; a single step starts at the last training step.
        num_timesteps: T.

    Returns:
        (num_steps + 1,) float64 times, the last one 0.

    Raises:
        ValueError: on counts out of range.
    """
    num_steps, num_timesteps = _counts("linspace", num_steps, num_timesteps)
    steps = np.linspace(0, num_timesteps - 1, num_steps).round()[::-1] if num_steps > 1 else [num_timesteps - 1]
    return _at_training_steps("linspace", steps, num_timesteps)


def leading(num_steps: int, num_timesteps: int = 1000, steps_offset: int = 0) -> np.ndarray:
    """Training steps at even whole strides from the first, n_i = (N - 1 - i) (T // N) + steps_offset, then t = 0.

    The spacing of DDIM and of Stable Diffusion (there with steps_offset = 1); it does not reach the last training
    step. Lin 2024 (common diffusion noise schedules), table 2.

    Args:
        num_steps: N, 1 to num_timesteps.
        num_timesteps: T.
        steps_offset: added to every step, at least 0.

    Returns:
        (num_steps + 1,) float64 times (n + 1)/T, the last one 0.

    Raises:
        ValueError: on counts out of range, or where the offset pushes the first time beyond 1.
    """
    num_steps, num_timesteps = _counts("leading", num_steps, num_timesteps)
    highest = num_timesteps - 1 - (num_steps - 1) * (num_timesteps // num_steps)
    if steps_offset != int(steps_offset) or not 0 <= steps_offset <= highest:
        raise ValueError(f"leading: steps_offset must be a whole number from 0 to {highest} here, got {steps_offset!r}")
    steps = np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + steps_offset
    return _at_training_steps("leading", steps, num_timesteps)


def trailing(num_steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Training steps at even strides down from the last, n_i = round(T - i T/N) - 1, then t = 0.

    Always starts at the last training step, as samplers of a zero-terminal-SNR path must. Lin 2024 (common diffusion
    noise schedules), table 2.

    Args:
        num_steps: N, 1 to num_timesteps.
        num_timesteps: T.

    Returns:
        (num_steps + 1,) float64 times (n + 1)/T, the last one 0.

    Raises:
        ValueError: on counts out of range.
    """
    num_steps, num_timesteps = _counts("trailing", num_steps, num_timesteps)
    steps = np.round(num_timesteps - np.arange(num_steps) * (num_timesteps / num_steps)) - 1
    return _at_training_steps("trailing", steps, num_timesteps)


def beta(num_steps: int, a: float = 0.6, b: float = 0.6, t_max: float = 1.0, t_min: float = 0.0) -> np.ndarray:
    """The quantiles of a beta distribution: t_i = t_min + (t_max - t_min) I^-1(1 - i/num_steps; a, b).

    I is the regularised incomplete beta function. With a and b below 1 steps are dense at both ends, where images
    change most in low and high frequencies. Lee 2024 (beta sampling is all you need).

    Args:
        num_steps: number of steps, at least 1.
        a: above 0; smaller puts more steps near the data.
        b: above 0; smaller puts more steps near the noise.
        t_max, t_min: the ends, t_min < t_max.

    Returns:
        (num_steps + 1,) float64.

    Raises:
        ValueError: on num_steps below 1, a or b not finite and above 0, or times out of order or range.
    """
    num_steps = _count("beta", num_steps)
    if not (0.0 < a < math.inf and 0.0 < b < math.inf):
        raise ValueError(f"beta: a and b must be finite numbers above 0, got a={a!r}, b={b!r}")
    quantiles = beta_quantile(np.arange(num_steps, -1, -1) / num_steps, a, b)
    return _checked("beta", t_min + (t_max - t_min) * quantiles)


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


def shifted_dynamic(
    num_steps: int, mu: float, form: str = "exponential", t_max: float = 1.0, t_min: float = 0.0
) -> np.ndarray:
    """`shifted` by an amount that depends on the image: shift = exp(mu) ("exponential") or mu ("linear").

    Args:
        num_steps: number of steps, at least 1.
        mu: see `shift_mu`, which gives it from the number of tokens.
        form: "exponential" (Flux) or "linear".
        t_max, t_min: the ends before the shift.

    Returns:
        (num_steps + 1,) float64.

    Raises:
        ValueError: on an unknown form, a mu that is not finite (for "linear": not above 0), and as `shifted`.
    """
    if form not in ("exponential", "linear"):
        raise ValueError(f"shifted_dynamic: form must be 'exponential' or 'linear', got {form!r}")
    if not math.isfinite(mu) or (form == "linear" and mu <= 0):
        wanted = "a finite number above 0" if form == "linear" else "a finite number"
        raise ValueError(f"shifted_dynamic: mu must be {wanted}, got {mu!r}")
    times = uniform(_count("shifted_dynamic", num_steps), t_max, t_min)
    return _checked("shifted_dynamic", shifted_times(times, math.exp(mu) if form == "exponential" else mu))


def shift_mu(
    image_seq_len: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> float:
    """mu of `shifted_dynamic`: linear in the number of tokens, base_shift at base_seq_len, max_shift at max_seq_len.

    Larger images are shifted more, because their noise averages out over more pixels (Esser 2024, section 5.3.2).

    Args:
        image_seq_len: the number of image tokens, above 0.
        base_shift, max_shift: mu at the two lengths; Flux's by default.
        base_seq_len, max_seq_len: the two lengths, which must differ.

    Raises:
        ValueError: where image_seq_len is not above 0 or the two lengths are equal.
    """
    if not image_seq_len > 0 or base_seq_len == max_seq_len:
        raise ValueError(
            "shift_mu: image_seq_len must be above 0 and base_seq_len unlike max_seq_len, "
            f"got {image_seq_len!r}, {base_seq_len!r} and {max_seq_len!r}"
        )
    return base_shift + (max_shift - base_shift) * (image_seq_len - base_seq_len) / (max_seq_len - base_seq_len)


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


def _counts(grid: str, num_steps: int, num_timesteps: int) -> tuple[int, int]:
    num_steps = _count(grid, num_steps)
    if num_timesteps != int(num_timesteps) or num_timesteps < num_steps:
        raise ValueError(
            f"{grid}: num_steps must be at most num_timesteps, a whole number, got {num_steps} and {num_timesteps!r}"
        )
    return num_steps, int(num_timesteps)


def _at_training_steps(grid: str, steps: ArrayLike, num_timesteps: int) -> np.ndarray:
    """The times (n + 1)/T of training steps, then 0."""
    return _checked(grid, np.append((np.asarray(steps) + 1) / num_timesteps, 0.0))


def _at_noise_levels(
    grid: str, sigma: np.ndarray, sigma_min: float, sigma_max: float, path: _HasLogSnr | None
) -> np.ndarray:
    """The times at which sigma(t)/alpha(t) has the given values, then 0."""
    sigma[0] = sigma_max
    t = sigma / sigma_max if path is None else path.t_of_log_snr(-2.0 * np.log(sigma))
    if path is not None and abs(t[0] - 1.0) < 1e-9:
        t[0] = 1.0  # the inverse may land a rounding error beyond the end
    if not np.all((t > 0.0) & (t <= 1.0)):
        raise ValueError(
            f"{grid}: the path does not reach every noise level from sigma_max={sigma_max!r} down to "
            f"sigma_min={sigma_min!r}; choose them within exp(-path.log_snr(t)/2) for t in (0, 1]"
        )
    return _checked(grid, np.append(t, 0.0))


def _checked(grid: str, t: np.ndarray) -> np.ndarray:
    """t, refused unless it falls strictly from at most 1 to at least 0."""
    if not (np.all(np.diff(t) < 0.0) and t[0] <= 1.0 and t[-1] >= 0.0):
        raise ValueError(f"{grid}: times must fall strictly from t_max <= 1 to t_min >= 0, got {t!r}")
    return t
