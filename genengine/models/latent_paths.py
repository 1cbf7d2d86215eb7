"""Paths between latents: straight lines, and arcs of the sphere on which Gaussian latents lie."""

from __future__ import annotations

import torch


def lerp(a, b, w):
    """(1 - w) a + w b.

    Args:
        a, b: (..., D).  w: a number, or a tensor that broadcasts against the leading dimensions (...).
    """
    w = _weights(a, w)
    return (1 - w) * a + w * b


def slerp(a, b, w):
    """The arc from a to b: with the angle theta between them,

        sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b

    The line where theta is 0 or 180 degrees, which have no arc of their own. Between independent Gaussian latents it
    keeps their length, where a line cuts through a middle that is improbably short (Shoemake 1985; White 2016).

    Args:
        a, b: (..., D), not zero.  w: a number, or a tensor that broadcasts against the leading dimensions (...).
    """
    w = _weights(a, w)
    cosine = (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True))
    theta = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(theta)
    straight = sine < 1e-4
    sine = torch.where(straight, 1.0, sine)
    weight_a = torch.where(straight, 1 - w, torch.sin((1 - w) * theta) / sine)
    weight_b = torch.where(straight, w, torch.sin(w * theta) / sine)
    return weight_a * a + weight_b * b


def _weights(a, w):
    w = torch.as_tensor(w, dtype=a.dtype, device=a.device)
    return w[..., None]
