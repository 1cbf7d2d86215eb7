"""Builds what runs a GPU's block of threads on a CPU (tests/emulated)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
