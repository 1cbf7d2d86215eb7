"""Straight and spherical paths between latent points, for interpolation."""

from __future__ import annotations

import torch

PATHS = ("lerp", "slerp")


def lerp(a, b, t):
    """(1 - t) a + t b for every t: a, b (B, ...), t (T,) -> (B, T, ...)."""
    weight = _weights(a, t)
    return (1 - weight) * a[:, None] + weight * b[:, None]


def slerp(a, b, t):
    """The great circle from a to b:

        x_t = sin((1 - t) omega) / sin(omega) a + sin(t omega) / sin(omega) b,  cos(omega) = <a, b> / (|a| |b|)

    per sample over all its elements, a, b (B, ...), t (T,) -> (B, T, ...). Ends are met exactly; where a and b are
    (anti)parallel or zero the path is `lerp`. Shoemake 1985; for latents White 2016.
    """
    flat_a, flat_b = (x.reshape(len(x), x.shape[1:].numel()).double() for x in (a, b))
    norms = flat_a.norm(dim=1) * flat_b.norm(dim=1)
    cosine = ((flat_a * flat_b).sum(1) / norms.clamp_min(1e-300)).clamp(-1, 1)
    omega = torch.acos(cosine)[:, None]
    sine = torch.sin(omega)
    times = t.to(a.device).double()[None]
    straight = (sine < 1e-4) | (norms == 0)[:, None]
    safe = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - times, torch.sin((1 - times) * omega) / safe)
    second = torch.where(straight, times, torch.sin(times * omega) / safe)
    view = (*first.shape, *[1] * (a.ndim - 1))
    return first.to(a.dtype).view(view) * a[:, None] + second.to(a.dtype).view(view) * b[:, None]


def path(kind, a, b, steps):
    """`steps` points from a to b, ends included, by "lerp" or "slerp": (B, steps, ...).

    Raises:
        ValueError: another kind, fewer than two steps, shapes that differ.
    """
    if kind not in PATHS:
        raise ValueError(f"models/latent_paths: kind must be one of {', '.join(PATHS)}, got {kind!r}")
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"models/latent_paths: steps must be an int >= 2, got {steps!r}")
    if a.shape != b.shape:
        raise ValueError(f"models/latent_paths: b must be {tuple(a.shape)} like a, got {tuple(b.shape)}")
    t = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (lerp if kind == "lerp" else slerp)(a, b, t)


def _weights(a, t):
    return t.to(a.device, a.dtype).view(1, -1, *[1] * (a.ndim - 1))
