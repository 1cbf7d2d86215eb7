"""Where a data set comes from: its name, a folder of images by class, an ADM archive, or any iterable."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from genengine.data import embedded, procedural
from genengine.data.dataset import Dataset, check_split, split
from genengine.data.pixels import to_levels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
ON_BAD = ("refuse", "skip")
MAX_CLASSES = 1 << 16


def load(source, part: str = "train", *, on_bad: str = "refuse", report=None) -> Dataset:
    """One split of a data set.

    Args:
        source: "digits"; "shapes-N" or "textures-N", drawn on the spot at N x N; a folder (`from_folder`); an .npz
            archive (`from_npz`); or a Dataset.
        part: "train", "test", "train_fit", "validation" or "all", see `split` and, for the digits, `split_indices`.
        on_bad: what to do about unreadable or odd-sized files of a folder, "refuse" or "skip".
        report: called with a line of text about what was skipped.
    Raises:
        ValueError: an unknown source or split, or data that does not fit; FileNotFoundError: no such path.
    """
    check_split(part)
    if isinstance(source, Dataset):
        return split(source, part)
    if source == "digits":
        return digits_dataset(part)
    if procedural.is_name(source):
        return split(procedural.dataset(source), part)
    path = Path(source)
    if path.is_dir():
        return split(from_folder(path, on_bad=on_bad, report=report), part)
    if path.suffix == ".npz":
        return split(from_npz(path), part)
    raise ValueError(
        f"data/load: data must be digits, {procedural.NAMES}, a folder of images or an .npz archive, "
        f"got {str(source)!r}{'' if path.exists() else ', which does not exist'}"
    )


def digits_dataset(part: str = "train") -> Dataset:
    """The embedded digits as a Dataset: 17 levels, ten classes."""
    images, labels = embedded.digits(part)
    levels = to_levels(images, embedded.NUM_LEVELS).to(torch.uint8)
    names = tuple(map(str, range(embedded.NUM_CLASSES)))
    return Dataset("digits", levels, labels, embedded.NUM_LEVELS, names, torch.from_numpy(embedded.split_indices(part)))


def from_folder(folder, *, on_bad: str = "refuse", report=None) -> Dataset:
    """Images of a folder, one class per subfolder in the order of their names; without subfolders, no classes.

    All files must be of one size, that of most of them; they are read as grey if every one is grey, else as RGB.
    Transparency is dropped; more than 8 bits per channel, and images beside the subfolders, count as bad.

    Args:
        folder: its name.
        on_bad: "refuse" raises a ValueError that counts and names the files that cannot be used; "skip" leaves them
            out and tells `report`.
    Raises:
        ValueError: bad files, or no images at all; FileNotFoundError: no such folder; RuntimeError: Pillow is missing.
    """
    folder = Path(folder)
    if on_bad not in ON_BAD:
        raise ValueError(f"data/from_folder: on_bad must be one of {', '.join(ON_BAD)}, got {on_bad!r}")
    if not folder.is_dir():
        raise FileNotFoundError(f"data/from_folder: folder must be an existing folder, got {folder}; check the name")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and _image_files(path))
    groups = [(label, _image_files(folder / name)) for label, name in enumerate(classes)] or [(0, _image_files(folder))]
    read, bad = [], [(file, "beside the class folders") for file in _image_files(folder)] if classes else []
    for label, files in groups:
        for file in files:
            try:
                read.append((file, label, _read(file)))
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of broken files
                bad.append((file, f"unreadable: {_first_line(error)}"))
    sizes = [array.shape[:2] for _, _, array in read]
    if sizes:
        common = max(sorted(set(sizes)), key=sizes.count)
        bad += [(f, f"{a.shape[1]}x{a.shape[0]} pixels, most are {common[1]}x{common[0]}") for f, _, a in read
                if a.shape[:2] != common]  # fmt: skip
        read = [entry for entry in read if entry[2].shape[:2] == common]
    _settle(folder, bad, on_bad, report)
    if not read:
        raise ValueError(f"data/from_folder: {folder} must hold images ({', '.join(IMAGE_SUFFIXES)}), got none")
    grey = all(array.ndim == 2 for _, _, array in read)
    stack = np.stack([array if grey else _rgb(array) for _, _, array in read])
    labels = torch.tensor([label for _, label, _ in read])
    files = tuple(str(file.relative_to(folder)) for file, _, _ in read)
    return Dataset(str(folder), _planes(stack), labels, 256, tuple(classes), files=files)


def from_npz(path) -> Dataset:
    """An archive as ADM writes it: arr_0 uint8 (N, H, W, C) or (N, H, W), arr_1 (N,) integer labels if there are any.

    Raises:
        ValueError: not such an archive; FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data/from_npz: path must be an existing file, got {path}; check the name")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data/from_npz: {path} must be a readable .npz archive, got {_first_line(error)}") from error
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4):
        got = "none" if images is None else f"{images.dtype} {images.shape}"
        raise ValueError(f"data/from_npz: {path} must hold arr_0, uint8 (N, H, W, C) or (N, H, W), got {got}")
    if labels is None:
        return Dataset(str(path), _planes(images), torch.zeros(len(images), dtype=torch.int64), 256)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"data/from_npz: arr_1 of {path} must be ({len(images)},) integer labels, got {labels.dtype} {labels.shape}"
        )
    return Dataset(str(path), _planes(images), torch.from_numpy(labels.astype(np.int64)), 256, _names(labels))


def from_iterable(pairs: Iterable, *, name: str = "iterable", num_levels: int = 256) -> Dataset:
    """Any iterable of (image, label), such as a torchvision or Hugging Face data set: read once, kept in memory.

    Args:
        pairs: of an image, which is a PIL image, a uint8 array or tensor (H, W), (H, W, C) or, a tensor, (C, H, W), or
            a floating-point tensor (C, H, W) in [0, 1]; and an int label, or None for all.
        num_levels: values of a pixel; uint8 images must be below it.
    Raises:
        ValueError: images of different shapes, values out of range, or no images, naming the first that is wrong.
    """
    planes, labels = [], []
    for index, (image, label) in enumerate(pairs):
        plane = _plane(image, index, num_levels)
        if planes and plane.shape != planes[0].shape:
            raise ValueError(
                f"data/from_iterable: images must be {tuple(planes[0].shape)} (C, H, W) like the first, got "
                f"{tuple(plane.shape)} at {index}; resize them"
            )
        planes.append(plane)
        labels.append(label)
    if not planes:
        raise ValueError("data/from_iterable: pairs must give at least one image, got none")
    if any((label is None) != (labels[0] is None) for label in labels):
        raise ValueError("data/from_iterable: labels must be ints or None for all images, got both")
    if labels[0] is None:
        return Dataset(name, torch.stack(planes), torch.zeros(len(planes), dtype=torch.int64), num_levels)
    labels = np.array([int(label) for label in labels], dtype=np.int64)
    return Dataset(name, torch.stack(planes), torch.from_numpy(labels), num_levels, _names(labels))


def _image_files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _read(file):
    """uint8 (H, W) of a grey image, (H, W, 3) of any other; ValueError of one with more than 8 bits."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError("reading images needs Pillow: pip install 'genengine[image]', or pass an .npz") from error
    with Image.open(file) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
            raise ValueError(f"{image.mode} pixels of more than 8 bits; convert them")
        return np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _settle(folder, bad, on_bad, report):
    if not bad:
        return
    named = "; ".join(f"{file.name} ({why})" for file, why in bad[:4]) + (" ..." if len(bad) > 4 else "")
    if on_bad == "refuse":
        raise ValueError(
            f"data/from_folder: {len(bad)} files of {folder} cannot be used: {named}; mend them or pass --on-bad skip"
        )
    if report is not None:
        report(f"skipped {len(bad)} files of {folder}: {named}")


def _plane(image, index, num_levels):
    """One image as a uint8 tensor (C, H, W) of levels."""
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        if image.ndim != 3 or not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(
                f"data/from_iterable: floating-point images must be (C, H, W) in [0, 1], got {tuple(image.shape)} from "
                f"{float(image.min()):g} to {float(image.max()):g} at {index}; rescale them"
            )
        return to_levels(2.0 * image - 1.0, num_levels).to(torch.uint8)
    planar = isinstance(image, torch.Tensor) and image.ndim == 3  # torch's own order
    array = np.asarray(image)
    if array.dtype == bool or array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(
            f"data/from_iterable: images must be uint8 (H, W) or (H, W, C), got {array.dtype} {array.shape} at {index}"
        )
    return torch.from_numpy(array.copy()) if planar else _planes(array[None])[0]


def _planes(images):
    """uint8 (N, H, W) or (N, H, W, C) to a tensor (N, C, H, W)."""
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _rgb(array):
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array


def _names(labels):
    """A name for every class up to the largest label."""
    if len(labels) and int(labels.max()) >= MAX_CLASSES:
        raise ValueError(f"data: labels must be classes 0 .. {MAX_CLASSES - 1}, got {int(labels.max())}; number them")
    return tuple(map(str, range(int(labels.max()) + 1))) if len(labels) and labels.min() >= 0 else ("0",)


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
