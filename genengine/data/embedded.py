"""The embedded digits: 1,797 real 8x8 images and their fixed splits.

Optical Recognition of Handwritten Digits (test part), E. Alpaydin & C. Kaynak, UCI Machine Learning
Repository, CC BY 4.0; see assets/LICENSE-digits.txt. Pixels have 17 levels, 0 (paper) to 16 (ink).
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

import numpy as np
import torch

from genengine.data.dataset import check_split
from genengine.data.pixels import from_levels

NUM_LEVELS = 17
NUM_CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)


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
    check_split(split)
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
