"""Sample sets on disk: a PNG grid for the eye, an ADM-style .npz for other programs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".npz")


def grid(images: np.ndarray, columns: int = 10, scale: int = 8, gap: int = 2, invert: bool = False) -> np.ndarray:
    """uint8 (N, H, W, C) to one picture, row by row, each pixel `scale` pixels wide, `gap` pixels between images."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    canvas = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255 if invert else 32, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * cell_h + gap, (i % columns) * cell_w + gap
        big = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale] = 255 - big if invert else big
    return canvas


def save(path: str | Path, images: np.ndarray, labels: np.ndarray | None = None, columns: int = 10) -> Path:
    """Write uint8 images (N, H, W, C) as a grid (.png) or an archive (.npz: arr_0 images, arr_1 labels, as ADM does).

    The file appears whole or not at all. Raises ValueError on another suffix or a grid of no images, RuntimeError if
    Pillow is missing, OSError if it cannot be written.
    """
    path = Path(path)
    check_suffix(path, len(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        temporary = Path(file.name)
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".npz":
                np.savez_compressed(file, **_archive(images, labels))
            else:
                pillow().fromarray(_drop_single_channel(grid(images, columns))).save(file, format="PNG")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already unless something failed
    return path


def check_suffix(path: str | Path, count: int | None = None) -> None:
    """Refuse a name that cannot be written, or a picture of 0 images, before hours are spent on the content."""
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"--out must end in .png or .npz, got {str(path)!r}")
    if suffix == ".png":
        if count == 0:
            raise ValueError(f"--out {str(path)!r}: there is nothing to draw with 0 images; write .npz or ask for more")
        pillow()


def _archive(images, labels):
    return {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}


def _drop_single_channel(canvas):
    return canvas[..., 0] if canvas.shape[-1] == 1 else canvas


def pillow():
    """The Pillow module `Image`, or a RuntimeError that says how to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError("writing PNG needs Pillow: pip install 'genengine[image]', or write .npz") from error
    return Image
