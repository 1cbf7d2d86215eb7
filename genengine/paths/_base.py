"""What all paths share: the base classes and the checks of their arguments."""

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


class VariancePreserving(Path):
    """Base of paths with alpha^2 + sigma^2 = 1, given by log alpha(t) and its rate d log alpha / dt."""

    def _log_alpha(self, t: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _rate(self, t: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def alpha(self, t):
        return np.exp(self._log_alpha(checked_time(t)))

    def sigma(self, t):
        return np.sqrt(0.0 - np.expm1(2.0 * self._log_alpha(checked_time(t))))  # 0.0 - : no negative zero

    def d_alpha(self, t):
        return self._rate(checked_time(t)) * self.alpha(t)

    def d_sigma(self, t):
        with np.errstate(divide="ignore"):
            return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def prior_scale(self, t):
        return 1.0


def checked_time(t: ArrayLike) -> np.ndarray:
    """t as float64 (a scalar stays one), refused outside [0, 1]."""
    t = np.asarray(t, dtype=np.float64)[()]
    if not np.all((t >= 0.0) & (t <= 1.0)):
        raise ValueError(
            f"path: t must be in [0, 1] (0 is data, 1 is noise), got {t!r}; "
            "convert training steps or noise levels to that time first"
        )
    return t


def vp_of_log_snr(log_snr: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 and the given log(alpha^2 / sigma^2)."""
    log_snr = np.asarray(log_snr, dtype=np.float64)
    return np.exp(-0.5 * np.logaddexp(0.0, -log_snr)), np.exp(-0.5 * np.logaddexp(0.0, log_snr))


def ordered(path: str, low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0.0 < low < high < np.inf:
        raise ValueError(f"{path}: needs 0 < {low_name} < {high_name}, got {low_name}={low!r}, {high_name}={high!r}")
