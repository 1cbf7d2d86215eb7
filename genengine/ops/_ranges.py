"""Named ranges around our kernels and around the rows of a sampling loop, for profilers that show them.

`kernels` and `rows` are (push, pop), push(label) and pop(), or None: then each costs one test. A function that is
being compiled by torch.compile gets no ranges: they would be no part of its graph.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch

Pair = tuple[Callable[[str], object], Callable[[], object]]

kernels: Pair | None = None
rows: Pair | None = None


@contextlib.contextmanager
def using(push: Callable[[str], object], pop: Callable[[], object], *, around_kernels: bool = True) -> Iterator[None]:
    """Inside, ranges are opened with push(label) and closed with pop(), in every thread."""
    global kernels, rows
    previous = kernels, rows
    kernels, rows = ((push, pop) if around_kernels else kernels), (push, pop)
    try:
        yield
    finally:
        kernels, rows = previous


def around(pair: Pair, label: str, run: Callable) -> Callable:
    """`run` within a range."""
    if torch.compiler.is_compiling():
        return run
    push, pop = pair

    def ranged(*args):
        push(label)
        try:
            return run(*args)
        finally:
            pop()

    return ranged


def around_rows(pair: Pair, advance: Callable[[int], object]) -> Callable[[int], None]:
    """advance(row), each call within a range that names the row."""
    push, pop = pair

    def ranged(row):
        push(f"genengine::row {row}")
        try:
            advance(row)
        finally:
            pop()

    return ranged


def nvtx() -> Pair:
    """NVTX's push and pop. Raises RuntimeError where this build of torch has none."""
    try:
        torch.cuda.nvtx.range_push("genengine")
        torch.cuda.nvtx.range_pop()
    except RuntimeError as error:
        raise RuntimeError(
            f"NVTX ranges need a CUDA build of PyTorch, this is {torch.__version__} ({str(error).splitlines()[0]})"
        ) from error
    return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop


def from_environment() -> None:
    """GENENGINE_NVTX=1 turns NVTX ranges on for the process; where there is no NVTX, a warning says so."""
    global kernels, rows
    if os.environ.get("GENENGINE_NVTX", "0") != "1":
        return
    try:
        kernels = rows = nvtx()
    except RuntimeError as error:
        warnings.warn(f"GENENGINE_NVTX=1 does nothing: {error}", RuntimeWarning, stacklevel=2)
