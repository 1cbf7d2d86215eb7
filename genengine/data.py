"""The embedded digits: 1,797 real 8x8 images, their fixed splits, pixel conversions and the epoch order.

Optical Recognition of Handwritten Digits (test part), E. Alpaydin & C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0; see assets/LICENSE-digits.txt. Pixels have 17 levels, 0 (paper) to 16 (ink).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

import numpy as np
import torch

NUM_CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)
SPLITS = ("train", "test", "train_fit", "validation", "all")


@lru_cache(maxsize=1)
def _archive():
    path = resources.files("genengine").joinpath("assets/digits.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def split_indices(split="train"):
    """Indices of a split in the data set's own order 0..1796.

    train (1,437) and test (360) are scikit-learn's `train_test_split(np.arange(1797), test_size=360,
    stratify=y, random_state=0)`; train_fit (1,149) and validation (288) divide train the same way
    (`test_size=0.2, stratify=y[train], random_state=0`). All four are shipped, so no version of any library
    can move them. Make choices on validation; read test once, at the end.

    Args:
        split: one of "train", "test", "train_fit", "validation", "all".
    Returns:
        (N,) int64 array; the position of an index in it is the image's `sample_id` in training.
    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"data/split_indices: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if split == "all":
        return np.arange(len(_archive()["labels"]))
    return _archive()[split].astype(np.int64)


def digits(split="train"):
    """Images and labels of one split of the digits.

    Args:
        split: one of "train", "test", "train_fit", "validation", "all"; see `split_indices`.
    Returns:
        images (N, 1, 8, 8) float32, level / 8 - 1 in [-1, 1]; labels (N,) int64, 0..9. Fresh copies.
    Raises:
        ValueError: unknown split.
    """
    index = split_indices(split)
    images = torch.from_numpy(_archive()["images"][index].astype(np.float32))
    labels = torch.from_numpy(_archive()["labels"][index].astype(np.int64))
    return from_levels(images).reshape(-1, *IMAGE_SHAPE), labels


def from_levels(levels):
    """level / 8 - 1: levels 0..16 of any shape (array or tensor) to [-1, 1]; integers become float32."""
    if isinstance(levels, torch.Tensor):
        return (levels if levels.is_floating_point() else levels.float()) / 8.0 - 1.0
    levels = np.asarray(levels)
    return (levels if np.issubdtype(levels.dtype, np.floating) else levels.astype(np.float32)) / 8.0 - 1.0


def to_levels(images):
    """Nearest level, round(8 (x + 1)) clipped to 0..16, of images in [-1, 1].

    Args:
        images: floating-point array or tensor of any shape.
    Returns:
        same type, shape and dtype, holding whole numbers 0..16. Halves round to even.
    Raises:
        FloatingPointError: a pixel is not finite; it would pass for paper.
    """
    if isinstance(images, torch.Tensor):
        _check_finite("to_levels", torch.isfinite(images))
        return ((images + 1.0) * 8.0).round().clamp(0.0, 16.0)
    images = np.asarray(images)
    _check_finite("to_levels", np.isfinite(images))
    return np.clip(np.round((images + 1.0) * 8.0), 0.0, 16.0)


def _check_finite(op, finite):
    if not finite.all():
        raise FloatingPointError(
            f"data/{op}: images must be finite, got {int((~finite).sum())} non-finite values; the model has "
            "diverged: sample with check_finite=True to see where"
        )


def to_uint8(images):
    """Images in [-1, 1] to uint8 0..255 for image files and ADM archives, through the 17 levels.

    Args:
        images: (N, C, H, W) tensor or array in [-1, 1]; values outside are clipped.
    Returns:
        (N, H, W, C) uint8 array, round(255 level / 16).
    Raises:
        ValueError: not four dimensions.
        FloatingPointError: a pixel is not finite.
    """
    array = images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.ndim != 4:
        raise ValueError(f"data/to_uint8: images must be (N, C, H, W), got {array.shape}; add the missing axes")
    _check_finite("to_uint8", np.isfinite(array))
    return np.round(to_levels(array).transpose(0, 2, 3, 1) * (255.0 / 16.0)).astype(np.uint8)


def from_uint8(images):
    """Inverse of `to_uint8`, exact on the 17 levels: (N, H, W, C) uint8 to (N, C, H, W) float32 in [-1, 1].

    Raises:
        ValueError: not uint8 or not four dimensions.
    """
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(
            f"data/from_uint8: images must be uint8 (N, H, W, C), got {array.dtype} {array.shape}; "
            "an ADM archive holds them as arr_0"
        )
    levels = np.round(array.astype(np.float32) * np.float32(16.0 / 255.0)).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(from_levels(levels)))


def epoch_order(num, epoch, *, seed=0):
    """The order in which epoch `epoch` visits `num` images: a pure function of its arguments.

    order = stable argsort of u, u_i = uniform(seed, sample=0, step=epoch, stream="data_order", element=i).

    Args:
        num: number of images.  epoch: 0, 1, ...  seed: int in [0, 2^64).
    Returns:
        (num,) int64 tensor, a permutation.
    Raises:
        ValueError: num < 1 or epoch < 0.
    """
    if num < 1 or epoch < 0:
        raise ValueError(f"data/epoch_order: num must be >= 1 and epoch >= 0, got num={num}, epoch={epoch}")
    from genengine import ops  # here, so that reading the data loads no kernels

    u = ops.uniform((1, num), seed=seed, step=epoch, stream="data_order")
    return torch.argsort(u[0], stable=True)


def batch_indices(num, batch_size, step, *, seed=0):
    """Indices of training batch `step`, dropping the last, short batch of every epoch.

    A function of the step alone, so a resumed run continues at the right place with nothing stored.

    Args:
        num: number of images.  batch_size: 1..num.  step: 0, 1, ...  seed: int in [0, 2^64).
    Returns:
        (batch_size,) int64 tensor.
    Raises:
        ValueError: batch_size outside 1..num.
    """
    if not 1 <= batch_size <= num:
        raise ValueError(f"data/batch_indices: batch_size must be 1..{num} (the number of images), got {batch_size}")
    epoch, place = divmod(step, num // batch_size)
    return _order(num, epoch, seed)[place * batch_size : (place + 1) * batch_size].clone()


@lru_cache(maxsize=2)
def _order(num, epoch, seed):
    return epoch_order(num, epoch, seed=seed)  # once per epoch, not once per batch
