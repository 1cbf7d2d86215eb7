"""Activation functions with their first and second derivatives, eager: the references of bias_act and glu."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Activation:
    """act, act' and act'' of (u, alpha), act'' None where it is zero; at a kink the derivative from below.

    flops, exps: of act, act' and act'' at one u, counted as in `_cost.Cost`; a sigmoid is 3 with 1 exponential.
    """

    value: Callable
    slope: Callable
    curvature: Callable | None = None
    flops: tuple[int, int, int] = (0, 0, 0)
    exps: tuple[int, int, int] = (0, 0, 0)

    def work(self, *orders: int) -> tuple[int, int]:
        """(flops, exps) of the derivatives of these orders at one u, which share exponentials and nothing else."""
        shared = max(self.exps[order] for order in orders)
        return sum(self.flops[order] - self.exps[order] for order in orders) + shared, shared


def _step(u, below):
    """below where u <= 0, else 1, in u's dtype: of float64 not a float32's 0.2."""
    return torch.where(u <= 0, torch.full_like(u, below), torch.ones_like(u))


def _silu_slope(u, alpha):
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _silu_curvature(u, alpha):
    s = torch.sigmoid(u)
    return s * (1 - s) * (2 + u * (1 - 2 * s))


def _normal_density(u):
    return torch.exp(-0.5 * u * u) * (1 / math.sqrt(2 * math.pi))


def _gelu_slope(u, alpha):
    return 0.5 * (1 + torch.erf(u * math.sqrt(0.5))) + u * _normal_density(u)


def _gelu_curvature(u, alpha):
    return _normal_density(u) * (2 - u * u)


def _gelu_tanh_inner(u):
    """w(u), w'(u), w''(u) of gelu_tanh(u) = u (1 + tanh w) / 2."""
    scale = math.sqrt(2 / math.pi)
    return scale * (u + 0.044715 * u**3), scale * (1 + 3 * 0.044715 * u**2), scale * 6 * 0.044715 * u


def _gelu_tanh_slope(u, alpha):
    w, dw, _ = _gelu_tanh_inner(u)
    t = torch.tanh(w)
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * dw


def _gelu_tanh_curvature(u, alpha):
    w, dw, ddw = _gelu_tanh_inner(u)
    t = torch.tanh(w)
    return (1 - t * t) * (dw + u * (0.5 * ddw - t * dw * dw))


ACTIVATIONS = {
    "linear": Activation(lambda u, alpha: u, lambda u, alpha: torch.ones_like(u)),
    "relu": Activation(lambda u, alpha: F.relu(u), lambda u, alpha: _step(u, 0.0)),
    "lrelu": Activation(lambda u, alpha: F.leaky_relu(u, alpha), lambda u, alpha: _step(u, alpha), flops=(1, 0, 0)),
    "silu": Activation(lambda u, alpha: F.silu(u), _silu_slope, _silu_curvature, flops=(4, 7, 10), exps=(1, 1, 1)),
    "gelu": Activation(lambda u, alpha: F.gelu(u), _gelu_slope, _gelu_curvature, flops=(5, 10, 7), exps=(1, 2, 1)),
    "gelu_tanh": Activation(
        lambda u, alpha: F.gelu(u, approximate="tanh"),
        _gelu_tanh_slope,
        _gelu_tanh_curvature,
        flops=(9, 17, 19),
        exps=(1, 1, 1),
    ),
    "tanh": Activation(
        lambda u, alpha: torch.tanh(u),
        lambda u, alpha: 1 - torch.tanh(u) ** 2,
        lambda u, alpha: -2 * torch.tanh(u) * (1 - torch.tanh(u) ** 2),
        flops=(1, 3, 5),
        exps=(1, 1, 1),
    ),
    "sigmoid": Activation(
        lambda u, alpha: torch.sigmoid(u),
        lambda u, alpha: torch.sigmoid(u) * (1 - torch.sigmoid(u)),
        lambda u, alpha: torch.sigmoid(u) * (1 - torch.sigmoid(u)) * (1 - 2 * torch.sigmoid(u)),
        flops=(3, 5, 8),
        exps=(1, 1, 1),
    ),
}


def gelu_name(op: str, approximate: str) -> str:
    """The activation that F.gelu's `approximate` means."""
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in names:
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return names[approximate]
