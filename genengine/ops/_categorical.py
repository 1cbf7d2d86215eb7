"""A draw from a categorical distribution by its inverse CDF, one uniform to a draw, and the log-probability of what was
drawn: what the ops that sample autoregressive models share."""

from __future__ import annotations

import torch

from genengine.ops.normal import exp_ieee


def inverse_cdf(logits, u, temperature=1.0):
    """The level in which u falls.

        w_i = exp((l_i - max l) (1 / temperature))    float32, the polynomial exponential of `ops.normal`, so that the
        W_i = w_0 + ... + w_i                         bits are the same everywhere; sums in float64, in order
        level = #{i < L - 1 : W_i <= u W_{L-1}}

    Args:
        logits: (B, L, ...) float32.  u: (B, ...) float32 in (0, 1).
    Returns:
        (B, ...) int64 in 0 .. L - 1.
    """
    weights = exp_ieee((logits - logits.amax(1, keepdim=True)) * (1 / temperature))
    sums = weights.double().cumsum(1)
    return (sums[:, :-1] <= (u.double() * sums[:, -1])[:, None]).sum(1)


def log_prob(logits, level, temperature=1.0):
    """log softmax(l / temperature)_level, in the dtype of the logits.

    Args:
        logits: (B, L, ...).  level: (B, ...) int64.
    Returns:
        (B, ...).
    """
    return torch.log_softmax(logits / temperature, 1).gather(1, level[:, None])[:, 0]
