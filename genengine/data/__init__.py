"""Data: the embedded digits, a user's own images, images drawn on the spot; levels, splits and the epoch order."""

from genengine.data.dataset import SPLITS, Dataset, split
from genengine.data.embedded import IMAGE_SHAPE, NUM_CLASSES, NUM_LEVELS, digits, split_indices
from genengine.data.order import batch_indices, epoch_order
from genengine.data.pixels import from_levels, from_uint8, to_levels, to_uint8
from genengine.data.sources import ON_BAD, from_folder, from_iterable, from_npz, load

__all__ = [
    "IMAGE_SHAPE", "NUM_CLASSES", "NUM_LEVELS", "ON_BAD", "SPLITS", "Dataset", "batch_indices", "digits",
    "epoch_order", "from_folder", "from_iterable", "from_levels", "from_npz", "from_uint8", "load", "split",
    "split_indices", "to_levels", "to_uint8",
]  # fmt: skip
