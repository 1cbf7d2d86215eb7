"""The progress bar of everything that samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(progress: bool | str, total: int, title: str, unit: str) -> Iterator[Any]:
    """A tqdm bar on stderr of `total` units, or None if `progress` is False; a text takes the title's place."""
    if not progress:
        yield None
        return
    from tqdm import tqdm

    title = progress if isinstance(progress, str) else title
    with tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True) as bar:
        yield bar
