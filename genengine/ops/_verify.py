"""Which kernels have been seen right on which device: the gate between a kernel that exists and the default.

A verdict belongs to (op, backend, device name, driver, versions of torch, triton and genengine). Verdicts come from
the table shipped with the package (`verified.json`, made from committed results), from the user's cache, or from
running the op's case set on the spot. Under torch.compile and CUDA-graph capture nothing is run: only known verdicts
count.
"""

from __future__ import annotations

import json
import os
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
    """What a verdict holds for."""
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
        return Path("/proc/driver/nvidia/version").read_text().split("Module")[1].split()[0]
    except (OSError, IndexError):
        return "unknown"


_verdicts: dict[str, dict[str, bool]] | None = None


def verdicts() -> dict[str, dict[str, bool]]:
    """device key -> "op/backend" -> seen right."""
    global _verdicts
    if _verdicts is None:
        _verdicts = {}
        for path in (SHIPPED, cache_path()):
            for key, entries in _read(path).items():
                _verdicts.setdefault(key, {}).update(entries)
    return _verdicts


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
    """Run the op's case set on one backend; returns what is wrong, an empty list if nothing is."""
    from genengine import testing

    found = []
    for case in testing.cases(op.name, device):
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
    key, name = device_key(where), f"{op_name}/{backend}"
    known = verdicts().get(key, {})
    if name in known:
        return known[name]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    print(f"genengine: checking the {backend} kernel of {op_name} against its reference, once ...", file=sys.stderr)
    problems = run(_registry.OPS[op_name], backend, where)
    for problem in problems[:3]:
        print(f"genengine: {op_name}/{backend} is not used: {problem}", file=sys.stderr)
    record(key, {name: not problems})
    return not problems
