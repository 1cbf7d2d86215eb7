"""What runs here: versions, devices, and for every op the backend that would run and why the others would not."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Collection

import torch

from genengine.ops import EXTENSION, _fastest, _registry, _verify

RIGHT, WRONG, ABSENT, UNCHECKED = "right", "wrong", "not available", "not checked"


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


def verify(
    device: torch.device,
    report: Callable[[str], None] | None = None,
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
) -> list[dict]:
    """Run every kernel that can run on `device` against its reference, record each verdict, return one row each.

    report: called with a line for each kernel that ran, as it comes, and for each reason why others could not. only,
    skip: public names of ops; all but those to skip, if none are named. A kernel that takes the GPU down, as an illegal
    access does for the whole process, is wrong, and those after it are not checked. Raises ValueError on unknown names.
    """
    rows, report, lost = [], report or (lambda line: None), None
    ops = _chosen(only, skip)
    width = max((len(op.public) for op in ops), default=0)
    for op in ops:
        for backend in op.kernels:
            row = _verify_one(op, backend, device, lost)
            rows.append(row)
            if row["verdict"] in (RIGHT, WRONG):
                took = row["detail"] or f"{row['seconds']:.2f} s"
                report(f"{op.public:{width}} {backend:7} {row['verdict']:7} {took}")
                _verify.record(_verify.device_key(device), {f"{op.public}/{backend}": row["verdict"] == RIGHT})
                if row["verdict"] == WRONG and (error := _error_of(device)):
                    lost = f"{op.public} on {backend} took the GPU down ({error}); verify with --skip {op.public}"
    for verdict, are in ((ABSENT, "not available"), (UNCHECKED, "not checked")):
        reasons = Counter((row["backend"], row["detail"]) for row in rows if row["verdict"] == verdict)
        for (backend, reason), count in reasons.items():
            report(f"{count} {backend} kernel{'s' * (count > 1)} {are}: {reason}")
    return rows


def _chosen(only, skip):
    """The ops to verify, in order; a backward op goes with its forward."""
    public = {op.public for op in _registry.OPS.values()}
    if unknown := sorted({*only, *skip} - public):
        raise ValueError(f"there is no op {unknown[0]!r}; ops are {', '.join(sorted(public))}")
    named = lambda op: {op.public, op.public.split("_backward")[0]}  # noqa: E731
    ops = [op for _, op in sorted(_registry.OPS.items())]
    return [op for op in ops if named(op) & set(only or public) and not named(op) & set(skip)]


def _error_of(device):
    """What a GPU answers that has been lost to this process, or None."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _verify_one(op, backend, device, lost):
    row = {"op": op.public, "backend": backend, "device": str(device), "detail": "", "seconds": 0.0}
    if lost:
        return row | {"verdict": UNCHECKED, "detail": lost}
    reasons = [_registry.why_not(op, backend, device.type, dtype) for dtype in _registry.KERNEL_DTYPES]
    if all(reasons):
        return row | {"verdict": ABSENT, "detail": reasons[0]}
    start = time.perf_counter()
    problems = _verify.run(op, backend, device)
    row["seconds"] = time.perf_counter() - start
    if problems:
        return row | {"verdict": WRONG, "detail": "; ".join(problems[:3])}
    return row | {"verdict": RIGHT}
