"""Paths given by the betas of T training steps."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from genengine.paths._base import VariancePreserving, checked_time, ordered, vp_of_log_snr
from genengine.paths.continuous import Cosine


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
        return len(self.betas) * checked_time(t) - 1.0

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
class DDPMSigmoid(Discrete):
    """Discrete betas along a logistic curve: beta_n = beta_start + S(linspace(-6, 6, T)) (beta_end - beta_start).

    S is the logistic function. The "sigmoid" betas of GeoDiff (Xu 2022) and of diffusion libraries; the continuous
    `Sigmoid` is another path.

    Args:
        beta_start, beta_end: the ends of the curve, 0 < beta_start < beta_end < 1.
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
        curve = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, self.num_timesteps)))
        return self.beta_start + curve * (self.beta_end - self.beta_start)


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
        return np.interp(checked_time(t), self._times, self._alphas)

    def sigma(self, t):
        alpha = self.alpha(t)
        return np.sqrt((1.0 - alpha) * (1.0 + alpha))

    def d_alpha(self, t):
        return len(self.betas) * np.diff(self._alphas)[self._interval(checked_time(t))]

    def t_of_log_snr(self, log_snr):
        return np.interp(-vp_of_log_snr(log_snr)[0], -self._alphas, self._times)[()]


def _discrete_arguments(path: DDPMLinear | ScaledLinear | DDPMSigmoid) -> None:
    name = type(path).__name__
    ordered(name, "beta_start", path.beta_start, "beta_end", path.beta_end)
    if path.beta_end >= 1.0:
        raise ValueError(f"{name}: beta_end must be below 1, got {path.beta_end!r}")
    _whole_timesteps(path)


def _whole_timesteps(path: Discrete) -> None:
    if path.num_timesteps != int(path.num_timesteps) or path.num_timesteps < 1:
        raise ValueError(
            f"{type(path).__name__}: num_timesteps must be a whole number above 0, got {path.num_timesteps!r}"
        )
