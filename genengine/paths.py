"""Paths from data to noise: x_t = alpha(t) x_0 + sigma(t) eps with eps ~ N(0, I).

The time convention of the whole library stands here: t = 0 is data, t = 1 is noise. Adapters convert at the
border. Every path is a frozen dataclass; its methods take a number or an array of times in [0, 1] and return
float64. Where a derivative or log-SNR is infinite, infinity is returned; solvers know how to avoid such ends.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike


class Path:
    """Base of all paths; a subclass gives `alpha`, `sigma`, `d_alpha`, `d_sigma` and `t_of_log_snr`."""

    def alpha(self, t: ArrayLike) -> np.ndarray:
        """The weight of the data, alpha(t)."""
        raise NotImplementedError

    def sigma(self, t: ArrayLike) -> np.ndarray:
        """The weight of the noise, sigma(t)."""
        raise NotImplementedError

    def d_alpha(self, t: ArrayLike) -> np.ndarray:
        """The derivative d alpha / dt."""
        raise NotImplementedError

    def d_sigma(self, t: ArrayLike) -> np.ndarray:
        """The derivative d sigma / dt; infinite at t = 0 on variance-preserving paths."""
        raise NotImplementedError

    def t_of_log_snr(self, log_snr: ArrayLike) -> np.ndarray:
        """The time t at which log(alpha^2 / sigma^2) has the given value, the inverse of `log_snr`.

        It is not clamped: a value the path never reaches gives a t outside [0, 1] or not a number.
        """
        raise NotImplementedError

    def coefficients(self, t: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(alpha, sigma, d_alpha, d_sigma) at t.

        Args:
            t: a number or an array of times in [0, 1].

        Raises:
            ValueError: where a t is outside [0, 1].
        """
        return self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)

    def log_snr(self, t: ArrayLike) -> np.ndarray:
        """log(alpha(t)^2 / sigma(t)^2); +inf where sigma = 0, -inf where alpha = 0."""
        with np.errstate(divide="ignore"):
            return 2.0 * (np.log(self.alpha(t)) - np.log(self.sigma(t)))

    def prior_scale(self, t: float) -> float:
        """The scale of the noise that sampling starts from at time t: sigma(t), and 1 on VP paths."""
        return float(self.sigma(t))


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """alpha = 1 - t, sigma = t: rectified flow and flow matching (Liu 2022, Lipman 2022)."""

    def alpha(self, t):
        return 1.0 - _time(t)

    def sigma(self, t):
        return 1.0 * _time(t)

    def d_alpha(self, t):
        return np.full_like(_time(t), -1.0)[()]

    def d_sigma(self, t):
        return np.ones_like(_time(t))[()]

    def t_of_log_snr(self, log_snr):
        return 1.0 / (1.0 + np.exp(0.5 * np.asarray(log_snr, dtype=np.float64)))


class VariancePreserving(Path):
    """Base of paths with alpha^2 + sigma^2 = 1, given by log alpha(t) and its rate d log alpha / dt."""

    def _log_alpha(self, t: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _rate(self, t: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def alpha(self, t):
        return np.exp(self._log_alpha(_time(t)))

    def sigma(self, t):
        return np.sqrt(0.0 - np.expm1(2.0 * self._log_alpha(_time(t))))  # 0.0 - : no negative zero

    def d_alpha(self, t):
        return self._rate(_time(t)) * self.alpha(t)

    def d_sigma(self, t):
        with np.errstate(divide="ignore"):
            return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def prior_scale(self, t):
        return 1.0


@dataclass(frozen=True)
class VPLinear(VariancePreserving):
    """The continuous variance-preserving SDE with beta(t) = beta_min + t (beta_max - beta_min).

    alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2), sigma = sqrt(1 - alpha^2).
    Song 2021 (score SDE), appendix C.

    Args:
        beta_min: beta at t = 0, above 0.
        beta_max: beta at t = 1, above beta_min.

    Raises:
        ValueError: unless 0 < beta_min < beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        _ordered("VPLinear", "beta_min", self.beta_min, "beta_max", self.beta_max)

    def _log_alpha(self, t):
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _rate(self, t):
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def t_of_log_snr(self, log_snr):
        loss = np.logaddexp(0.0, -np.asarray(log_snr, dtype=np.float64))  # -log alpha^2
        root = np.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * loss)
        return 2.0 * loss / (self.beta_min + root)


class Discrete(VariancePreserving):
    """Base of paths made from T discrete betas, as pretrained DDPM and latent-diffusion models define them.

    alpha^2 at t = (n + 1)/T is exactly prod_{i <= n} (1 - beta_i), and log alpha is linear between those
    times and t = 0, where alpha = 1. So training step n is t = (n + 1)/T, and `model_time` gives n back. A
    derivative at one of these times is the one from the left, the side towards which a sampler steps.
    """

    @cached_property
    def betas(self) -> np.ndarray:
        """(T,) float64."""
        raise NotImplementedError

    @cached_property
    def _knots(self) -> np.ndarray:
        """(T + 1,) float64: log alpha at t = 0, 1/T, ..., 1."""
        return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-self.betas))])

    def model_time(self, t: ArrayLike) -> np.ndarray:
        """The training step n = T t - 1 that a pretrained model expects: a solver's `model_time`."""
        return len(self.betas) * _time(t) - 1.0

    @cached_property
    def _times(self) -> np.ndarray:
        """(T + 1,) float64: 0, 1/T, ..., 1."""
        return np.arange(len(self.betas) + 1) / len(self.betas)

    def _interval(self, t: np.ndarray) -> np.ndarray:
        """The interval of t between `_times`, 0 .. T - 1; a time between two lies in the left one."""
        num_timesteps = len(self.betas)
        # the small margin keeps (n + 1)/T, rounded, in the interval on its left
        return np.clip(np.ceil(t * num_timesteps - 1e-9).astype(int) - 1, 0, num_timesteps - 1)

    def _log_alpha(self, t):
        return np.interp(t, self._times, self._knots)

    def _rate(self, t):
        return len(self.betas) * np.diff(self._knots)[self._interval(t)]

    def t_of_log_snr(self, log_snr):
        log_alpha = -0.5 * np.logaddexp(0.0, -np.asarray(log_snr, dtype=np.float64))
        t = np.interp(-log_alpha, -self._knots, self._times)
        return np.where(log_alpha < self._knots[-1] * (1 + 1e-12), np.nan, t)[()]


@dataclass(frozen=True)
class DDPMLinear(Discrete):
    """The discrete linear betas of DDPM (Ho 2020, section 4): beta_n = linspace(beta_start, beta_end, T).

    Args:
        beta_start, beta_end: the first and the last beta, 0 < beta_start < beta_end < 1.
        num_timesteps: T.

    Raises:
        ValueError: on arguments out of order or range.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_timesteps: int = 1000

    def __post_init__(self):
        _discrete_arguments(self)

    @cached_property
    def betas(self):
        return np.linspace(self.beta_start, self.beta_end, self.num_timesteps)


@dataclass(frozen=True)
class ScaledLinear(Discrete):
    """The discrete betas of latent diffusion (Rombach 2022): linear in sqrt(beta).

    beta_n = linspace(sqrt(beta_start), sqrt(beta_end), T)^2; times between training steps are interpolated,
    see `Discrete`.

    Args:
        beta_start, beta_end: the first and the last beta, 0 < beta_start < beta_end < 1.
        num_timesteps: T.

    Raises:
        ValueError: on arguments out of order or range.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000

    def __post_init__(self):
        _discrete_arguments(self)

    @cached_property
    def betas(self):
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_timesteps) ** 2


@dataclass(frozen=True)
class DDPMCosine(Discrete):
    """The discrete betas of the cosine path, as pretrained models have them (Nichol and Dhariwal 2021, eq. 17).

    beta_n = min(1 - f((n + 1)/T)/f(n/T), beta_max), f(t) = cos^2(pi/2 (t + s)/(1 + s)). The cap keeps alpha above 0
    at t = 1, where `Cosine` is exactly 0.

    Args:
        s: the small offset, 0 <= s < 1.
        num_timesteps: T.
        beta_max: the cap, in (0, 1).

    Raises:
        ValueError: on arguments out of range.
    """

    s: float = 0.008
    num_timesteps: int = 1000
    beta_max: float = 0.999

    def __post_init__(self):
        if not 0.0 <= self.s < 1.0 or not 0.0 < self.beta_max < 1.0:
            raise ValueError(
                f"DDPMCosine: s must be in [0, 1) and beta_max in (0, 1), got s={self.s!r}, beta_max={self.beta_max!r}"
            )
        _whole_timesteps(self)

    @cached_property
    def betas(self):
        f = Cosine(self.s).alpha(np.arange(self.num_timesteps + 1) / self.num_timesteps) ** 2
        return np.minimum(1.0 - f[1:] / f[:-1], self.beta_max)


@dataclass(frozen=True)
class ZeroTerminalSNR(Discrete):
    """A discrete path shifted and scaled so that nothing of the data is left at t = 1 (Lin 2024, Alg. 1).

    With a_n the base's alpha at step n, alpha_n = (a_n - a_{T-1}) a_0/(a_0 - a_{T-1}): unchanged at the first
    training step, exactly 0 at the last. Between training steps alpha itself is linear (its logarithm has no end).
    A model that predicts eps or score says nothing at t = 1: predict v or x0.

    Args:
        base: the path to rescale, of at least two steps.

    Raises:
        ValueError: where base is not such a path.
    """

    base: Discrete

    def __post_init__(self):
        if not isinstance(self.base, Discrete) or len(self.base.betas) < 2:
            raise ValueError(f"ZeroTerminalSNR: base must be a discrete path of at least 2 steps, got {self.base!r}")

    @cached_property
    def _alphas(self) -> np.ndarray:
        """(T + 1,) float64: alpha at t = 0, 1/T, ..., 1."""
        a = np.exp(self.base._knots)[1:]
        return np.concatenate([[1.0], (a - a[-1]) * (a[0] / (a[0] - a[-1]))])

    @cached_property
    def betas(self):
        return 1.0 - (self._alphas[1:] / self._alphas[:-1]) ** 2

    def alpha(self, t):
        return np.interp(_time(t), self._times, self._alphas)

    def sigma(self, t):
        alpha = self.alpha(t)
        return np.sqrt((1.0 - alpha) * (1.0 + alpha))

    def d_alpha(self, t):
        return len(self.betas) * np.diff(self._alphas)[self._interval(_time(t))]

    def t_of_log_snr(self, log_snr):
        return np.interp(-_vp_of_log_snr(log_snr)[0], -self._alphas, self._times)[()]


@dataclass(frozen=True)
class Cosine(VariancePreserving):
    """The cosine path: alpha = cos(theta(t)) / cos(theta(0)) with theta(t) = pi/2 (t + s)/(1 + s).

    Nichol and Dhariwal 2021, eq. 17. alpha is exactly 0 at t = 1 (the paper's cap of beta at 0.999 belongs to
    its discrete steps): a model that predicts eps or score needs a grid that starts below t = 1.

    Args:
        s: the small offset, 0 <= s < 1; with s = 0 alpha = cos(pi t/2) and sigma = sin(pi t/2).

    Raises:
        ValueError: where s is outside [0, 1).
    """

    s: float = 0.008

    def __post_init__(self):
        if not 0.0 <= self.s < 1.0:
            raise ValueError(f"Cosine: s must be in [0, 1), got {self.s!r}")

    @property
    def _omega(self) -> float:
        return 0.5 * np.pi / (1.0 + self.s)

    def alpha(self, t):
        # sin of the complement: exactly 0 at t = 1, where cos(pi/2) would leave 6e-17
        return np.sin(self._omega * (1.0 - _time(t))) / np.cos(self._omega * self.s)

    def sigma(self, t):
        # cos^2(theta_0) - cos^2(theta) = sin(theta - theta_0) sin(theta + theta_0), without cancellation
        t, theta_0 = _time(t), self._omega * self.s
        return np.sqrt(np.sin(self._omega * t) * np.sin(self._omega * t + 2.0 * theta_0)) / np.cos(theta_0)

    def d_alpha(self, t):
        return -self._omega * np.cos(self._omega * (1.0 - _time(t))) / np.cos(self._omega * self.s)

    def d_sigma(self, t):
        if self.s == 0.0:
            return self._omega * np.cos(self._omega * _time(t))  # the general form is 0/0 at t = 0
        return super().d_sigma(t)

    def t_of_log_snr(self, log_snr):
        alpha, sigma = _vp_of_log_snr(log_snr)
        theta_0 = self._omega * self.s
        theta = np.arctan2(np.hypot(sigma * np.cos(theta_0), np.sin(theta_0)), alpha * np.cos(theta_0))
        return theta / self._omega - self.s


@dataclass(frozen=True)
class EDM(Path):
    """alpha = 1, sigma = t sigma_max: the path of Karras 2022 with its time scaled to [0, 1].

    Args:
        sigma_max: the noise level at t = 1, above 0.

    Raises:
        ValueError: where sigma_max is not a finite number above 0.
    """

    sigma_max: float = 80.0

    def __post_init__(self):
        if not 0.0 < self.sigma_max < np.inf:
            raise ValueError(f"EDM: sigma_max must be a finite number above 0, got {self.sigma_max!r}")

    def alpha(self, t):
        return np.ones_like(_time(t))[()]

    def sigma(self, t):
        return self.sigma_max * _time(t)

    def d_alpha(self, t):
        return np.zeros_like(_time(t))[()]

    def d_sigma(self, t):
        return np.full_like(_time(t), self.sigma_max)[()]

    def t_of_log_snr(self, log_snr):
        return np.exp(-0.5 * np.asarray(log_snr, dtype=np.float64)) / self.sigma_max


@dataclass(frozen=True)
class VE(Path):
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t: the VE SDE (Song 2021, score SDE, appendix C).

    sigma(0) is sigma_min, not 0, so samples keep that little noise.

    Args:
        sigma_min: the noise level at t = 0, above 0.
        sigma_max: the noise level at t = 1, above sigma_min.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        _ordered("VE", "sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    def alpha(self, t):
        return np.ones_like(_time(t))[()]

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** _time(t)

    def d_alpha(self, t):
        return np.zeros_like(_time(t))[()]

    def d_sigma(self, t):
        return self.sigma(t) * np.log(self.sigma_max / self.sigma_min)

    def t_of_log_snr(self, log_snr):
        log_sigma = -0.5 * np.asarray(log_snr, dtype=np.float64)
        return (log_sigma - np.log(self.sigma_min)) / np.log(self.sigma_max / self.sigma_min)


def _time(t: ArrayLike) -> np.ndarray:
    """t as float64 (a scalar stays one), refused outside [0, 1]."""
    t = np.asarray(t, dtype=np.float64)[()]
    if not np.all((t >= 0.0) & (t <= 1.0)):
        raise ValueError(
            f"path: t must be in [0, 1] (0 is data, 1 is noise), got {t!r}; "
            "convert training steps or noise levels to that time first"
        )
    return t


def _vp_of_log_snr(log_snr: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 and the given log(alpha^2 / sigma^2)."""
    log_snr = np.asarray(log_snr, dtype=np.float64)
    return np.exp(-0.5 * np.logaddexp(0.0, -log_snr)), np.exp(-0.5 * np.logaddexp(0.0, log_snr))


def _ordered(path: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0.0 < low < high < np.inf:
        raise ValueError(f"{path}: needs 0 < {low_name} < {high_name}, got {low_name}={low!r}, {high_name}={high!r}")


def _discrete_arguments(path: DDPMLinear | ScaledLinear) -> None:
    name = type(path).__name__
    _ordered(name, "beta_start", path.beta_start, "beta_end", path.beta_end)
    if path.beta_end >= 1.0:
        raise ValueError(f"{name}: beta_end must be below 1, got {path.beta_end!r}")
    _whole_timesteps(path)


def _whole_timesteps(path: Discrete) -> None:
    if path.num_timesteps != int(path.num_timesteps) or path.num_timesteps < 1:
        raise ValueError(
            f"{type(path).__name__}: num_timesteps must be a whole number above 0, got {path.num_timesteps!r}"
        )
