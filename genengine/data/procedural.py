"""Colour images drawn on the spot, at any size: shapes of known classes, and textures. Nothing is downloaded.

They are for trying families on colour and on larger sizes; every pixel is a function of (kind, size, index).
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import torch

from genengine import random
from genengine.data.dataset import Dataset

NUM_IMAGES = 1000
NAMES = "shapes-N, textures-N (N the size, 8 .. 128)"
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("stripes", "checks", "waves", "dots")


def is_name(source) -> bool:
    """True for "shapes-32", "textures-64" and their like."""
    return isinstance(source, str) and re.fullmatch(r"(shapes|textures)-\d+", source) is not None


@lru_cache(maxsize=4)
def dataset(name: str, num: int = NUM_IMAGES) -> Dataset:
    """num images (3, N, N) of 256 levels with balanced classes.

    shapes: one filled figure of a random place, size, turn and colour on a dim ground of another. textures: two
    colours mixed by a periodic pattern of a random period, turn and phase.

    Raises:
        ValueError: a size outside 8 .. 128.
    """
    kind, _, digits = name.partition("-")
    size = int(digits)
    if not 8 <= size <= 128:
        raise ValueError(f"data/procedural: size must be 8 .. 128, got {size} in {name!r}")
    classes = SHAPES if kind == "shapes" else TEXTURES
    draws = [random.uniform(10, seed=0, sample=i, step=len(classes), stream="model") for i in range(num)]
    labels = np.arange(num) % len(classes)
    paint = _shape if kind == "shapes" else _texture
    images = np.stack([paint(classes[label], size, u) for label, u in zip(labels, draws, strict=True)])
    levels = np.round(255.0 * images).astype(np.uint8).transpose(0, 3, 1, 2)
    return Dataset(name, torch.from_numpy(np.ascontiguousarray(levels)), torch.from_numpy(labels), 256, classes)


def _plane(size, u):
    """Coordinates in [-1, 1], turned by an angle."""
    line = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
    y, x = np.meshgrid(line, line, indexing="ij")
    angle = 2.0 * np.pi * u
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _mix(weight, u):
    """Two colours, the second brighter, mixed by weight (H, W)."""
    ground, figure = 0.45 * u[:3], 0.55 + 0.45 * u[3:6]
    return ground + (figure - ground) * np.clip(weight, 0.0, 1.0)[..., None]


def _shape(kind, size, u):
    x, y = _plane(size, 0.25 * u[6] if kind in ("square", "cross") else u[6])
    x, y = x - 0.5 * (u[7] - 0.5), y - 0.5 * (u[8] - 0.5)
    radius = 0.4 + 0.25 * u[9]
    distance = {
        "disc": np.hypot(x, y) - radius,
        "ring": np.abs(np.hypot(x, y) - 0.8 * radius) - 0.25 * radius,
        "square": np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius,
        "triangle": np.maximum(np.maximum(0.866 * x + 0.5 * y, -0.866 * x + 0.5 * y), -y) - 0.6 * radius,
        "cross": np.minimum(
            np.maximum(np.abs(x) - radius, np.abs(y) - 0.3 * radius),
            np.maximum(np.abs(y) - radius, np.abs(x) - 0.3 * radius),
        ),
    }[kind]
    return _mix(0.5 - 0.5 * size * distance, u)  # an edge one pixel wide


def _texture(kind, size, u):
    x, y = _plane(size, u[6])
    rate, phase = np.pi * (3.0 + 4.0 * u[7]), 2.0 * np.pi * u[8]
    wave = {
        "stripes": np.sin(rate * x + phase),
        "checks": 2.0 * np.sin(rate * x + phase) * np.sin(rate * y),
        "waves": np.sin(rate * x + 2.0 * np.sin(0.5 * rate * y + phase)),
        "dots": 1.2 * (np.cos(rate * x) + np.cos(rate * y)) - 0.8,
    }[kind]
    return _mix(0.5 + 0.8 * wave, u)
