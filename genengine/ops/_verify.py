"""Which kernels have been seen right on which device: the gate between a kernel that exists and the default.

A verdict belongs to (op, backend, device name, driver, versions of torch, triton and genengine, build). The build is a
hash of the loaded extension, the Triton sources and the case sets, so no verdict survives a rebuild.

Verdicts come from the user's cache, from the table shipped with the package (`verified.json`, made from committed
results), or from running the op's case set on the spot. The shipped table is made on another machine, whose compiler
gives other bytes: its keys hold no build, and stand for the sources of the released genengine version they name. The
user's own verdict on the present build goes before it, so in a changed checkout run `genengine verify`.

Under torch.compile and CUDA-graph capture nothing is run: only known verdicts count.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from genengine.ops import _registry

SHIPPED = Path(__file__).with_name("verified.json")


def cache_path() -> Path:
    """The user's verdicts; GENENGINE_CACHE moves the folder."""
    root = os.environ.get("GENENGINE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "genengine"
    )
    return Path(root) / "verified.json"


@lru_cache
def device_key(device: torch.device) -> str:
    """What a verdict of the user's cache holds for."""
    return f"{release_key(device)}, build {build_hash()}"


@lru_cache
def release_key(device: torch.device) -> str:
    """What a shipped verdict holds for: everything but the build."""
    parts = [f"torch {torch.__version__}", f"triton {_version('triton')}", f"genengine {_version('genengine')}"]
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), f"driver {_driver()}", *parts]
    else:
        parts = [device.type, *parts]
    return ", ".join(parts)


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _driver():
    try:
        return driver_version(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "unknown"


def driver_version(text: str) -> str:
    """The version in /proc/driver/nvidia/version, of the closed ("Kernel Module  535.1") and the open kernel module
    ("Open Kernel Module for x86_64  570.1")."""
    found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\b", text)
    return found[1] if found else "unknown"


@lru_cache
def build_hash() -> str:
    """Eight hex digits of what a verdict depends on beside versions: extension, Triton sources, case sets."""
    from genengine.ops import EXTENSION

    files = [EXTENSION.path] if EXTENSION.loaded else []
    package = importlib.util.find_spec("genengine.kernels")
    for folder in (package and package.submodule_search_locations) or ():
        files += sorted(Path(folder).glob("*.py"))
    return _hash([*files, *sorted((Path(__file__).parents[1] / "testing").glob("*.py"))])


def _hash(files):
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


_verdicts: dict[str, dict[str, bool]] | None = None


def verdicts() -> dict[str, dict[str, bool]]:
    """The user's cache: device key -> "op/backend" -> seen right."""
    global _verdicts
    if _verdicts is None:
        _verdicts = _read(cache_path())
    return _verdicts


def known(device: torch.device) -> dict[str, bool]:
    """The verdicts that hold on this device: the user's own, else the shipped ones."""
    shipped = _shipped().get(release_key(device), {})
    return {**shipped, **verdicts().get(device_key(device), {})}


@lru_cache
def _shipped():
    return _read(SHIPPED)


def entry(op, backend: str) -> str:
    """How a verdict is filed."""
    return f"{op.public}/{backend}"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print(f"genengine: ignoring {path}: {error}; `genengine verify` rewrites it", file=sys.stderr)
        return {}


def record(key: str, entries: dict[str, bool]) -> None:
    """Remember verdicts, in this process and in the user's cache (atomically; an unwritable cache is no error)."""
    verdicts().setdefault(key, {}).update(entries)
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = _read(path)
        stored.setdefault(key, {}).update(entries)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(stored, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        print(f"genengine: could not write {path}: {error}", file=sys.stderr)


def run(op, backend: str, device: torch.device) -> list[str]:
    """Run the op's case set on one backend; returns what is wrong, an empty list if nothing is.

    Under Triton's interpreter, which takes a second for what a GPU does in a microsecond, the set is thinned: its
    verdict is no GPU's, and decides nothing.
    """
    from genengine import testing

    found = []
    for case in testing.cases(op.name, device, thin=backend == "triton" and _registry.triton_interpreted()):
        if op.limits(backend, case.dtypes[0], case.args):  # such arguments are never given to it
            continue
        try:
            problem = testing.check_case(op, backend, case)
        except Exception as error:  # a kernel that cannot run at all is a verdict too
            problem = f"{case.label}: {type(error).__name__}: {error}"
        if problem:
            found.append(problem)
    return found


@torch._dynamo.assume_constant_result  # while torch.compile traces, a verdict is looked up, not traced
def verified(op_name: str, backend: str, device: str) -> bool:
    """Whether the kernel has been seen right on this device; checked now if that is unknown and can be found out."""
    where = torch.device(device)
    op = _registry.OPS[op_name]
    name, found = entry(op, backend), known(where)
    if name in found:
        return found[name]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    print(f"genengine: checking the {backend} kernel of {op.public} against its reference, once ...", file=sys.stderr)
    problems = run(op, backend, where)
    for problem in problems[:3]:
        print(f"genengine: {name} is not used: {problem}", file=sys.stderr)
    record(device_key(where), {name: not problems})
    return not problems
