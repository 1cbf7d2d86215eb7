"""The variational view of DDPM: the posterior of each step, and the terms of the bound.

    -log p(x0) <= KL(q(x_T | x0) || N(0, I)) + sum_t KL(q(x_s | x_t, x0) || p(x_s | x_t)) - log p(x0 | x_1)

with t = (n + 1)/T and s = n/T. Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, section 3.1; Kingma et al. 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """The T steps of a variance-preserving path, float64 (T,) each; index n is the step from t = (n+1)/T to s = n/T.

    The posterior q(x_s | x_t, x0) is N(c_x x_t + c_x0 x0, exp(log_small)). With k = alpha_t sigma_s/(alpha_s sigma_t),
    c_x = k sigma_s/sigma_t, c_x0 = alpha_s (1 - k^2), exp(log_small) = sigma_s^2 (1 - k^2), "beta tilde", and
    exp(log_large) = sigma_t^2 (1 - k^2), "beta". log_small[0], -inf, is replaced by log_small[1] (log_large[0] where
    T = 1), as only the decoder is without a posterior.

    Attributes: t; alpha, sigma, d_alpha, d_sigma at t; c_x, c_x0; log_small, log_large.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    d_alpha: np.ndarray
    d_sigma: np.ndarray
    c_x: np.ndarray
    c_x0: np.ndarray
    log_small: np.ndarray
    log_large: np.ndarray

    @classmethod
    def of(cls, path, num_timesteps) -> Steps:
        """The steps of a path cut in num_timesteps."""
        times = np.arange(num_timesteps + 1) / num_timesteps
        alpha, sigma, d_alpha, d_sigma = path.coefficients(times[1:])
        alpha_s, sigma_s = path.alpha(times[:-1]), path.sigma(times[:-1])
        k = alpha * sigma_s / (alpha_s * sigma)
        kept = (1.0 - k) * (1.0 + k)
        with np.errstate(divide="ignore"):
            log_small, log_large = np.log(sigma_s**2 * kept), np.log(sigma**2 * kept)
        log_small[0] = log_small[1] if num_timesteps > 1 else log_large[0]
        return cls(times[1:], alpha, sigma, d_alpha, d_sigma, k * sigma_s / sigma, alpha_s * kept, log_small, log_large)


class VariationalTerms(NamedTuple):
    """The terms of the bound in nats per image, sums over pixels.

    prior: (B,), KL(q(x_T | x0) || N(0, I)).  diffusion: (B, T - 1), column n - 1 the KL of step n.
    decoder: (B,), -log p(x0 | x_1) of the discrete image.
    """

    prior: Tensor
    diffusion: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """(B,): an upper bound of -log p(x0)."""
        return self.prior + self.diffusion.sum(1) + self.decoder


def prior_kl(x0, alpha, sigma):
    """KL(N(alpha x0, sigma^2) || N(0, 1)) summed over pixels, (B,), for floats alpha and sigma."""
    constant = 0.5 * (sigma * sigma - 1.0) - math.log(sigma)
    return (0.5 * alpha * alpha * x0.square() + constant).flatten(1).sum(1)


def gaussian_kl(error, log_var_q, log_var_p):
    """KL(N(m_q, e^log_var_q) || N(m_p, e^log_var_p)), elementwise, error = m_q - m_p:

    (log_var_p - log_var_q + exp(log_var_q - log_var_p) + error^2 exp(-log_var_p) - 1) / 2
    """
    gap = log_var_q - log_var_p
    return 0.5 * (torch.exp(gap) - gap - 1.0 + error.square() * torch.exp(-log_var_p))


def discretised_gaussian(x0, mean, log_var, num_levels):
    """log of the mass that N(mean, e^log_var) gives to the level of x0, elementwise.

    log(Phi((x0 + w/2 - mean)/std) - Phi((x0 - w/2 - mean)/std)) with w = 2/(num_levels - 1); the lowest level takes
    everything below, the highest everything above. Ho et al. 2020, eq. 13.

    Args:
        x0: levels in [-1, 1].  mean, log_var: broadcast with x0.
    """
    half = 1.0 / (num_levels - 1)
    scale = torch.exp(-0.5 * log_var)
    far = 1e4  # infinity without its 0 * inf in gradients: log Phi(-1e4) = -5e7
    upper = torch.where(x0 > 1.0 - half, far, (x0 + half - mean) * scale)
    lower = torch.where(x0 < half - 1.0, -far, (x0 - half - mean) * scale)
    flip = lower > 0  # of the two tails take the one with the digits: Phi(b) - Phi(a) = Phi(-a) - Phi(-b)
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    ratio = torch.exp((log_lower - log_upper).clamp(max=-1e-6))
    return log_upper + torch.log1p(-ratio)
