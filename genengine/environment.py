"""What runs here: versions, devices, and for every op the backend that would run and why the others would not."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable

import torch

from genengine.ops import EXTENSION, _fastest, _registry, _verify

RIGHT, WRONG, ABSENT = "right", "wrong", "not available"


def report() -> dict:
    """Everything `genengine env` shows, as JSON-ready data."""
    import genengine

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "genengine": genengine.__version__,
        "torch": torch.__version__,
        "triton": _verify._version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "extension": _extension(),
        "devices": {name: _device(name) for name in devices},
        "verified": str(_verify.cache_path()),
        "ops": {name: {device: _choices(op, torch.device(device)) for device in devices} for name, op in _public_ops()},
    }


def _extension():
    found = {"loaded": EXTENSION.loaded, "path": str(EXTENSION.path), "reason": EXTENSION.reason}
    if EXTENSION.loaded:
        from genengine import testing

        found["isa"] = testing.current_isa()
    return found


def _device(name):
    device = torch.device(name)
    if device.type == "cpu":
        return {"name": platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}


def _public_ops():
    return [(op.public, op) for name, op in sorted(_registry.OPS.items()) if not name.endswith("_backward")]


def _choices(op, device):
    """The backend taken by default for float32, and the reason against every other."""
    against = {}
    for name in _registry.BACKENDS:
        reason = _registry.why_not(op, name, device.type, torch.float32)
        if reason is None and device.type == "cuda" and name in ("cuda", "triton"):
            reason = _doubt(op, name, device)
        if reason:
            against[name] = reason
    order = ("cpu",) if device.type == "cpu" else _fastest.order(op.name, device, torch.float32)
    default = next(name for name in (*order, "reference") if name not in against)
    return {"default": default, "unavailable": against}


def _doubt(op, name, device):
    """Why `_registry.automatic` would not take a GPU kernel that can run: it, or its backward, was not seen right."""
    known = _verify.known(device)
    for part in _registry.with_backward(op):
        whose = "" if part is op else "its backward: "
        if reason := _registry.why_not(part, name, device.type, torch.float32):
            return whose + reason
        verdict = known.get(_verify.entry(part, name))
        if not verdict:
            return whose + ("not yet verified here (genengine verify)" if verdict is None else "found wrong here")
    return None


def text(found: dict) -> str:
    """The report for a reader: reasons that many ops share are stated once."""
    lines = [
        f"genengine {found['genengine']}, torch {found['torch']}, triton {found['triton']}, "
        f"CUDA {found['cuda'] or 'none'}, Python {found['python']}",
        f"{found['platform']}",
        _extension_line(found["extension"]),
        f"verdicts of `genengine verify`: {found['verified']}",
    ]
    for device, entry in found["devices"].items():
        lines += ["", f"{device}: " + ", ".join(f"{key} {value}" for key, value in entry.items())]
        ops = found["ops"]
        width = max(map(len, ops))
        reasons: dict[str, str] = {}
        for name, by_device in ops.items():
            choice = by_device[device]
            notes = [f"{other} [{_note(reasons, reason)}]" for other, reason in choice["unavailable"].items()]
            lines.append(f"  {name:{width}}  runs on {choice['default']:9}  not on: {', '.join(notes) or '-'}")
        lines += [f"  [{mark}] {reason}" for reason, mark in reasons.items()]
    return "\n".join(lines)


def _note(reasons, reason):
    return reasons.setdefault(reason, str(len(reasons) + 1))


def _extension_line(extension):
    if extension["loaded"]:
        return f"compiled kernels: loaded, CPU instruction set {extension['isa']}"
    return f"compiled kernels: MISSING, {extension['reason']}"


def verify(device: torch.device, report: Callable[[str], None] | None = None) -> list[dict]:
    """Run every kernel that can run on `device` against its reference, record the verdicts, return one row each.

    report: called with a line for each kernel that ran, as it comes, and for each reason why others could not.
    """
    rows, report = [], report or (lambda line: None)
    width = max(len(op.public) for op in _registry.OPS.values())
    for _, op in sorted(_registry.OPS.items()):
        for backend in op.kernels:
            row = _verify_one(op, backend, device)
            rows.append(row)
            if row["verdict"] != ABSENT:
                took = row["detail"] or f"{row['seconds']:.2f} s"
                report(f"{op.public:{width}} {backend:7} {row['verdict']:7} {took}")
    absent = Counter((row["backend"], row["detail"]) for row in rows if row["verdict"] == ABSENT)
    for (backend, reason), count in absent.items():
        report(f"{count} {backend} kernel{'s' * (count > 1)} not available: {reason}")
    entries = {f"{row['op']}/{row['backend']}": row["verdict"] == RIGHT for row in rows if row["verdict"] != ABSENT}
    _verify.record(_verify.device_key(device), entries)
    return rows


def _verify_one(op, backend, device):
    row = {"op": op.public, "backend": backend, "device": str(device), "detail": "", "seconds": 0.0}
    reasons = [_registry.why_not(op, backend, device.type, dtype) for dtype in _registry.KERNEL_DTYPES]
    if all(reasons):
        return row | {"verdict": ABSENT, "detail": reasons[0]}
    start = time.perf_counter()
    problems = _verify.run(op, backend, device)
    row["seconds"] = time.perf_counter() - start
    if problems:
        return row | {"verdict": WRONG, "detail": "; ".join(problems[:3])}
    return row | {"verdict": RIGHT}
