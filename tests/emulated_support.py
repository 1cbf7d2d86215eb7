"""What tests of GPU blocks of threads run on a CPU (tests/emulated) share: their build, and tensors with guards."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GUARD = 512  # elements around what a kernel may write


def build(source: str, folder: Path) -> Path:
    """The library of tests/emulated/<source>, whose includes of cuda/ find the emulation before the kernels' own."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++, which builds the emulation")
    library = folder / f"{source}.so"
    includes = [f"-I{ROOT / path}" for path in ("tests/emulated", "csrc/include", "csrc")]
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=alignment",
         "-fsanitize-undefined-trap-on-error", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
         "-Wno-unknown-pragmas", *includes, "-o", library, ROOT / "tests/emulated" / source],
        check=True,
    )  # fmt: skip
    return library


class Guarded:
    """A tensor to be written, of `value`, between elements that must stay as they are."""

    def __init__(self, shape, dtype, value=float("nan")):
        count = torch.Size(shape).numel()
        self.whole = torch.full((count + 2 * GUARD,), -77.0, dtype=dtype)
        self.tensor = self.whole[GUARD : GUARD + count].fill_(value).view(shape)

    def checked(self):
        assert (self.whole[:GUARD] == -77).all() and (self.whole[-GUARD:] == -77).all()
        return self.tensor.clone()


def packed(batch, tokens, heads, dim, dtype, count=3):
    """Tensors (B, N, H, D) in one projection, all of whose other elements are NaN."""
    whole = torch.full((batch + 1, tokens + 3, count, heads + 1, dim // 8 * 8 + 8), float("nan"), dtype=dtype)
    inner = whole[:batch, 1 : tokens + 1, :, 1:, :dim]
    inner.copy_(torch.randn(inner.shape))
    return inner.unbind(2)


def tensors(queries, keys, dim, dtype, batch=1, heads=1):
    """q, k and v of attention, packed: into one projection where they are equally long."""
    q, k, v = packed(batch, queries, heads, dim, dtype)
    return (q, k, v) if keys == queries else (q, *packed(batch, keys, heads, dim, dtype, 2))
