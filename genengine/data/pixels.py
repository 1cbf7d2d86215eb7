"""Pixels on a grid of levels: level i of L stands for 2 i / (L - 1) - 1 in [-1, 1].

The digits have L = 17 levels, ordinary images 256. Every function takes arrays and tensors alike.
"""

from __future__ import annotations

import numpy as np
import torch


def from_levels(levels, num_levels=17):
    """2 level / (num_levels - 1) - 1, of any shape, to [-1, 1]; integers become float32."""
    step = 2.0 / (num_levels - 1)
    if isinstance(levels, torch.Tensor):
        return (levels if levels.is_floating_point() else levels.float()) * step - 1.0
    levels = np.asarray(levels)
    return (levels if np.issubdtype(levels.dtype, np.floating) else levels.astype(np.float32)) * step - 1.0


def to_levels(images, num_levels=17):
    """Nearest level, round((x + 1) (num_levels - 1) / 2) clipped to 0 .. num_levels - 1, of images in [-1, 1].

    Args:
        images: floating-point array or tensor of any shape.  num_levels: at least 2.
    Returns:
        same type, shape and dtype, holding whole numbers. Halves round to even.
    Raises:
        FloatingPointError: a pixel is not finite; it would pass for paper.
    """
    top = num_levels - 1.0
    if isinstance(images, torch.Tensor):
        _check_finite("to_levels", torch.isfinite(images))
        return ((images + 1.0) * (top / 2.0)).round().clamp(0.0, top)
    images = np.asarray(images)
    _check_finite("to_levels", np.isfinite(images))
    return np.clip(np.round((images + 1.0) * (top / 2.0)), 0.0, top)


def to_uint8(images, num_levels=17):
    """Images in [-1, 1] to uint8 0..255 for image files and ADM archives, through the levels of the data.

    Args:
        images: (N, C, H, W) tensor or array in [-1, 1]; values outside are clipped.  num_levels: 2 .. 256.
    Returns:
        (N, H, W, C) uint8 array, round(255 level / (num_levels - 1)).
    Raises:
        ValueError: not four dimensions.
        FloatingPointError: a pixel is not finite.
    """
    array = images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.ndim != 4:
        raise ValueError(f"data/to_uint8: images must be (N, C, H, W), got {array.shape}; add the missing axes")
    _check_finite("to_uint8", np.isfinite(array))
    levels = to_levels(array, num_levels).transpose(0, 2, 3, 1)
    return np.round(levels * (255.0 / (num_levels - 1))).astype(np.uint8)


def from_uint8(images, num_levels=17):
    """Inverse of `to_uint8`, exact on the levels: (N, H, W, C) uint8 to (N, C, H, W) float32 in [-1, 1].

    Raises:
        ValueError: not uint8 or not four dimensions.
    """
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(
            f"data/from_uint8: images must be uint8 (N, H, W, C), got {array.dtype} {array.shape}; "
            "an ADM archive holds them as arr_0"
        )
    scale = np.float32((num_levels - 1) / 255.0)
    levels = np.round(array.astype(np.float32) * scale).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(from_levels(levels, num_levels)))


def _check_finite(op, finite):
    if not finite.all():
        raise FloatingPointError(
            f"data/{op}: images must be finite, got {int((~finite).sum())} non-finite values; the model has "
            "diverged: sample with check_finite=True to see where"
        )
