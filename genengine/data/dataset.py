"""A labelled image set in memory, whatever it was read from."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property

import torch

from genengine.data.pixels import from_levels

SPLITS = ("train", "test", "train_fit", "validation", "all")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images as whole levels, with labels and indices.

    Args:
        name: what it is, as the user named it.
        levels: (N, C, H, W) uint8, 0 .. num_levels - 1.
        labels: (N,) int64, 0 .. num_classes - 1.
        num_levels: values of a pixel, 2 .. 256.
        class_names: one per class; () for images without classes, whose labels are all 0.
        sample_ids: (N,) int64, the images' indices in the whole set, which the training noise depends on; default
            0 .. N-1.
        files: the images' names, or ().
    Raises:
        ValueError: shapes, dtypes or values that do not fit, by name.
    """

    name: str
    levels: torch.Tensor
    labels: torch.Tensor
    num_levels: int
    class_names: tuple[str, ...] = ()
    sample_ids: torch.Tensor | None = None
    files: tuple[str, ...] = ()

    def __post_init__(self):
        n = len(self.levels)
        if self.sample_ids is None:
            object.__setattr__(self, "sample_ids", torch.arange(n))
        if self.levels.ndim != 4 or self.levels.dtype != torch.uint8:
            got = f"{self.levels.dtype} {tuple(self.levels.shape)}"
            raise ValueError(f"data/Dataset: levels must be uint8 (N, C, H, W), got {got}; see data.from_iterable")
        for name in ("labels", "sample_ids"):
            value = getattr(self, name)
            if value.dtype != torch.int64 or tuple(value.shape) != (n,):
                raise ValueError(
                    f"data/Dataset: {name} must be int64 ({n},), got {value.dtype} {tuple(value.shape)}; give one "
                    "per image"
                )
        if n and int(self.levels.max()) >= self.num_levels:
            raise ValueError(
                f"data/Dataset: levels must be below num_levels = {self.num_levels}, got {int(self.levels.max())}"
            )
        classes = max(1, self.num_classes)
        if n and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            wrong = int(self.labels.min()) if self.labels.min() < 0 else int(self.labels.max())
            raise ValueError(f"data/Dataset: labels must be in 0 .. {classes - 1}, got {wrong}")

    def __len__(self):
        return len(self.levels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.levels.shape[1:])

    @property
    def images(self) -> torch.Tensor:
        """All images, (N, C, H, W) float32 in [-1, 1]."""
        return from_levels(self.levels, self.num_levels)

    def batch(self, pick) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(x0 float32 in [-1, 1], labels or None without classes, sample_ids) of the images at `pick`."""
        labels = self.labels[pick] if self.num_classes else None
        return from_levels(self.levels[pick], self.num_levels), labels, self.sample_ids[pick]

    def subset(self, pick) -> Dataset:
        """The images at `pick`, which keep their sample_ids."""
        parts = {name: getattr(self, name)[pick] for name in ("levels", "labels", "sample_ids")}
        files = tuple(self.files[i] for i in torch.as_tensor(pick).tolist()) if self.files else ()
        return dataclasses.replace(self, **parts, files=files)

    def with_levels(self, num_levels: int) -> Dataset:
        """The same images on another number of levels, each pixel at the nearest."""
        if num_levels == self.num_levels:
            return self
        scale = (num_levels - 1) / (self.num_levels - 1)
        return dataclasses.replace(
            self, levels=(self.levels.float() * scale).round().to(torch.uint8), num_levels=num_levels
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of pixels, labels and indices, so that a resumed run knows its data."""
        digest = hashlib.sha256()
        for value in (self.levels, self.labels, self.sample_ids):
            digest.update(str(tuple(value.shape)).encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def split(dataset: Dataset, name: str) -> Dataset:
    """A split of any data set: test is a fifth of every class, validation a fifth of the rest.

    The images of a class are ordered by uniform(seed = 0, sample = 0, step = 0, "data_order", element = sample_id), so
    a split depends on nothing but the number of images and their labels.

    Raises:
        ValueError: unknown split.
    """
    check_split(name)
    if name == "all":
        return dataset
    if name in ("train", "test"):
        return dataset.subset(_fifth(dataset, rest=name == "train"))
    train = split(dataset, "train")
    return train.subset(_fifth(train, rest=name == "train_fit"))


def check_split(name: str) -> None:
    if name not in SPLITS:
        raise ValueError(f"data/split: split must be one of {', '.join(SPLITS)}, got {name!r}")


def _fifth(dataset, *, rest):
    """Indices of a fifth of each class, or of the rest, in the data set's order."""
    from genengine import ops  # here, so that reading the data loads no kernels

    size = int(dataset.sample_ids.max()) + 1 if len(dataset) else 0
    u = ops.uniform((1, size), seed=0, stream="data_order")[0, dataset.sample_ids]
    chosen = torch.zeros(len(dataset), dtype=torch.bool)
    for label in dataset.labels.unique():
        members = (dataset.labels == label).nonzero()[:, 0]
        order = members[torch.argsort(u[members], stable=True)]
        chosen[order[: len(order) // 5]] = True
    return (~chosen if rest else chosen).nonzero()[:, 0]
