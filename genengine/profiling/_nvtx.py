"""NVTX ranges, for Nsight Systems."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from genengine.ops import _ranges


@contextlib.contextmanager
def nvtx() -> Iterator[None]:
    """Name our kernels and the rows of `genengine.sample` in Nsight Systems, without changing the program.

        with genengine.profiling.nvtx():            or the environment variable GENENGINE_NVTX=1
            images = genengine.sample(...)          nsys profile -t cuda,nvtx python program.py

    Ranges are called "genengine::adaln [cuda]", after op and backend, "genengine::adaln backward", and
    "genengine::row 3". They are opened on the host where the kernel is launched: the replay of a CUDA graph shows rows
    (a graph of the whole loop: none), and code compiled by torch.compile no kernels. In every thread of the process.

    Raises RuntimeError where PyTorch was built without CUDA; GENENGINE_NVTX=1 then warns, and does nothing.
    """
    with _ranges.using(*_ranges.nvtx()):
        yield
