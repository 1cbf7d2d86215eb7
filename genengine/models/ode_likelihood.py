"""Likelihood of a model that moves data to noise along dx/dt = velocity(x, t).

The density follows the change of variables d log p_t(x(t))/dt = -div velocity, so

    log p_s(x) = log N(x(1); 0, scale^2) + integral from s to 1 of div velocity(x(t), t) dt,    x(s) = x.

Chen et al. 2018 (neural ODEs); Grathwohl et al. 2019 (FFJORD: Hutchinson's estimate); Song et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genengine import ops

METHODS = ("heun", "rk4")
DIVERGENCES = ("exact", "hutchinson")
DEQUANTISATIONS = ("path", "uniform")


def log_density(
    velocity: Callable[[Tensor, float], Tensor], x: Tensor, grid: np.ndarray, *, method: str = "rk4",
    probes: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """log p(x) at the first time of the grid, in nats.

    Args:
        velocity: velocity(x, t) -> (B, ...), t a float; each sample's must depend on that sample alone.
        x: (B, ...) floating point.
        grid: (num_steps + 1,) strictly rising times, from that of x to that of the noise.
        method: "rk4" (four evaluations a step, fourth order) or "heun" (two, second order).
        probes: (K, B, ...) of +-1 for Hutchinson's unbiased estimate of the divergence; None for the exact one, which
            costs as many backward passes as x has elements.
        scale: standard deviation of the noise at the last time.
    Returns:
        (B,) float64.
    """
    if method not in METHODS:
        raise ValueError(f"models/ode_likelihood: method must be one of {', '.join(METHODS)}, got {method!r}")
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for now, end in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        h, mid = end - now, 0.5 * (now + end)
        k1, d1 = _slope(velocity, x, now, probes)
        if method == "heun":
            k2, d2 = _slope(velocity, x + h * k1, end, probes)
            x, total = x + 0.5 * h * (k1 + k2), total + 0.5 * h * (d1 + d2)
            continue
        k2, d2 = _slope(velocity, x + 0.5 * h * k1, mid, probes)
        k3, d3 = _slope(velocity, x + 0.5 * h * k2, mid, probes)
        k4, d4 = _slope(velocity, x + h * k3, end, probes)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    noise = (x.double() / scale).flatten(1)
    return total - 0.5 * noise.square().sum(1) - noise.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(scale))


def _slope(velocity, x, t, probes):
    """(velocity, its divergence in float64) at (x, t)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = velocity(x, t)
        divergence = _exact(out, x) if probes is None else _hutchinson(out, x, probes)
    return out.detach(), divergence


def _exact(out, x):
    """sum_i d out_i / d x_i, one backward pass for each element of a sample."""
    flat = out.flatten(1)
    total, last = torch.zeros(len(x), dtype=torch.float64, device=x.device), flat.shape[1] - 1
    for i in range(last + 1):
        (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=i < last)
        total += row.flatten(1)[:, i].double()
    return total


def _hutchinson(out, x, probes):
    """mean_k probe_k . (J probe_k), J = d out / d x."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for k, probe in enumerate(probes):
        (row,) = torch.autograd.grad((out * probe).sum(), x, retain_graph=k + 1 < len(probes))
        total += (row.double() * probe).flatten(1).sum(1)
    return total / len(probes)


def rademacher(shape, num, *, seed, sample_ids, device, dtype):
    """(num, B, ...) of +-1: the sign of uniform(seed, sample, step k, stream "model") - 1/2."""
    draws = [
        ops.uniform(shape, seed=seed, sample_ids=sample_ids, step=k, stream="model", device=device) for k in range(num)
    ]
    return torch.stack([torch.where(u < 0.5, -1.0, 1.0) for u in draws]).to(dtype)


def dequantise_uniform(x0, num_levels, *, seed, sample_ids):
    """(x, log-weight (B,) float64): x0 with its level spread evenly, and D log(level width).

    log P(x0) >= E log p(x) + D log w, w = 2/(num_levels - 1). Theis et al. 2016.
    """
    width = 2.0 / (num_levels - 1)
    u = ops.uniform(x0.shape, seed=seed, sample_ids=sample_ids, stream="uniform", device=x0.device)
    weight = math.log(width) * math.prod(x0.shape[1:])
    return x0 + width * (u.to(x0.dtype) - 0.5), torch.full((len(x0),), weight, dtype=torch.float64, device=x0.device)


def dequantise_path(x0, alpha, sigma, num_levels, *, seed, sample_ids):
    """(x_t, log-weight (B,) float64): the path's own noise, read back level by level.

    log P(x0) >= E log p_t(x_t) + log P(x0 | x_t) - log q(x_t | x0), x_t = alpha x0 + sigma eps, P(level | x_t)
    proportional to exp(-(x_t - alpha level)^2/(2 sigma^2)). Kingma et al. 2021, section 3.1.
    """
    eps = ops.normal(x0.shape, seed=seed, sample_ids=sample_ids, stream="diffuse", device=x0.device).double()
    clean = x0.double()
    x_t = alpha * clean + sigma * eps
    levels = torch.linspace(-1.0, 1.0, num_levels, dtype=torch.float64, device=x0.device)
    log_mass = torch.empty_like(x_t)
    for b in range(len(x0)):  # (..., L) of one image at a time
        distance = ((x_t[b, ..., None] - alpha * levels) / sigma).square()
        log_mass[b] = -0.5 * eps[b].square() - torch.logsumexp(-0.5 * distance, -1)
    entropy = 0.5 * eps.square() + math.log(sigma) + 0.5 * math.log(2 * math.pi)
    return x_t.to(x0.dtype), (log_mass + entropy).flatten(1).sum(1)
