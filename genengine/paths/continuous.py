"""Paths given by a formula in t."""

from dataclasses import dataclass

import numpy as np

from genengine.paths._base import Path, VariancePreserving, checked_time, ordered, vp_of_log_snr


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """alpha = 1 - t, sigma = t: rectified flow and flow matching (Liu 2022, Lipman 2022)."""

    def alpha(self, t):
        return 1.0 - checked_time(t)

    def sigma(self, t):
        return 1.0 * checked_time(t)

    def d_alpha(self, t):
        return np.full_like(checked_time(t), -1.0)[()]

    def d_sigma(self, t):
        return np.ones_like(checked_time(t))[()]

    def t_of_log_snr(self, log_snr):
        return 1.0 / (1.0 + np.exp(0.5 * np.asarray(log_snr, dtype=np.float64)))


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
        ordered("VPLinear", "beta_min", self.beta_min, "beta_max", self.beta_max)

    def _log_alpha(self, t):
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _rate(self, t):
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def t_of_log_snr(self, log_snr):
        loss = np.logaddexp(0.0, -np.asarray(log_snr, dtype=np.float64))  # -log alpha^2
        root = np.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * loss)
        return 2.0 * loss / (self.beta_min + root)


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
        return np.sin(self._omega * (1.0 - checked_time(t))) / np.cos(self._omega * self.s)

    def sigma(self, t):
        # cos^2(theta_0) - cos^2(theta) = sin(theta - theta_0) sin(theta + theta_0), without cancellation
        t, theta_0 = checked_time(t), self._omega * self.s
        return np.sqrt(np.sin(self._omega * t) * np.sin(self._omega * t + 2.0 * theta_0)) / np.cos(theta_0)

    def d_alpha(self, t):
        return -self._omega * np.cos(self._omega * (1.0 - checked_time(t))) / np.cos(self._omega * self.s)

    def d_sigma(self, t):
        if self.s == 0.0:
            return self._omega * np.cos(self._omega * checked_time(t))  # the general form is 0/0 at t = 0
        return super().d_sigma(t)

    def t_of_log_snr(self, log_snr):
        alpha, sigma = vp_of_log_snr(log_snr)
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
        return np.ones_like(checked_time(t))[()]

    def sigma(self, t):
        return self.sigma_max * checked_time(t)

    def d_alpha(self, t):
        return np.zeros_like(checked_time(t))[()]

    def d_sigma(self, t):
        return np.full_like(checked_time(t), self.sigma_max)[()]

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
        ordered("VE", "sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    def alpha(self, t):
        return np.ones_like(checked_time(t))[()]

    def sigma(self, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** checked_time(t)

    def d_alpha(self, t):
        return np.zeros_like(checked_time(t))[()]

    def d_sigma(self, t):
        return self.sigma(t) * np.log(self.sigma_max / self.sigma_min)

    def t_of_log_snr(self, log_snr):
        log_sigma = -0.5 * np.asarray(log_snr, dtype=np.float64)
        return (log_sigma - np.log(self.sigma_min)) / np.log(self.sigma_max / self.sigma_min)
