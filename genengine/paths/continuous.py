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
class Trigonometric(VariancePreserving):
    """alpha = cos(pi t/2), sigma = sin(pi t/2): the generalised variance-preserving interpolant and TrigFlow.

    Its velocity at data of unit variance has unit scale at every t. Albergo 2023 (stochastic interpolants); Ma 2024
    (SiT), GVP; Lu and Song 2024 (sCM), whose time is pi t/2.
    """

    def alpha(self, t):
        return np.sin(0.5 * np.pi * (1.0 - checked_time(t)))  # exactly 0 at t = 1, where cos(pi/2) would leave 6e-17

    def sigma(self, t):
        return np.sin(0.5 * np.pi * checked_time(t))

    def d_alpha(self, t):
        return -0.5 * np.pi * self.sigma(t)

    def d_sigma(self, t):
        return 0.5 * np.pi * self.alpha(t)

    def t_of_log_snr(self, log_snr):
        alpha, sigma = vp_of_log_snr(log_snr)
        return np.arctan2(sigma, alpha) / (0.5 * np.pi)


@dataclass(frozen=True)
class Sigmoid(VariancePreserving):
    """The sigmoid path: alpha^2 falls from 1 to 0 along a piece of the logistic function.

    With u = (start + t (end - start))/tau and S the logistic function,
    alpha^2 = (S(end/tau) - S(u))/(S(end/tau) - S(start/tau)). Jabri 2022 (RIN), without its clip at 1e-9:
    alpha is exactly 0 at t = 1, so a model that predicts eps or score needs a grid that starts below.

    Args:
        start, end: the piece of the logistic function, start < end.
        tau: its temperature, above 0; larger is nearer to a straight line.

    Raises:
        ValueError: unless start < end are finite and tau is finite and above 0.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self):
        if not (-np.inf < self.start < self.end < np.inf and 0.0 < self.tau < np.inf):
            raise ValueError(
                "Sigmoid: needs finite start < end and tau > 0, "
                f"got start={self.start!r}, end={self.end!r}, tau={self.tau!r}"
            )

    @property
    def _span(self) -> float:
        return (self.end - self.start) / self.tau

    def _share(self, t, part: float, there: float) -> np.ndarray:
        """sinh(span part/2) cosh(there/2) / (sinh(span/2) cosh(u/2)), which is alpha^2 or sigma^2 without cancellation.

        From S(a) - S(b) = sinh((a - b)/2)/(2 cosh(a/2) cosh(b/2)).
        """
        u = self.start / self.tau + self._span * t
        return np.sinh(self._span * part / 2) * np.cosh(there / 2) / (np.sinh(self._span / 2) * np.cosh(u / 2))

    def alpha(self, t):
        t = checked_time(t)
        return np.sqrt(self._share(t, 1.0 - t, self.start / self.tau))

    def sigma(self, t):
        t = checked_time(t)
        return np.sqrt(self._share(t, t, self.end / self.tau))

    def _half_slope(self, t) -> np.ndarray:
        """Half the derivative of sigma^2."""
        t = checked_time(t)
        u = self.start / self.tau + self._span * t
        total = np.tanh(self.end / self.tau / 2) - np.tanh(self.start / self.tau / 2)  # 2 (S(end) - S(start))
        return self._span / (4.0 * np.cosh(u / 2) ** 2 * total)

    def d_alpha(self, t):
        with np.errstate(divide="ignore"):
            return -self._half_slope(t) / self.alpha(t)

    def d_sigma(self, t):
        with np.errstate(divide="ignore"):
            return self._half_slope(t) / self.sigma(t)

    def t_of_log_snr(self, log_snr):
        sigma = vp_of_log_snr(log_snr)[1]
        low, high = (1.0 / (1.0 + np.exp(-side / self.tau)) for side in (self.start, self.end))
        value = low + sigma * sigma * (high - low)
        return (np.log(value) - np.log1p(-value) - self.start / self.tau) / self._span


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
