"""Where the time of a function goes: kernels, bytes, gaps, host syncs, and what a fused op would remove.

    from genengine.profiling import profile

    report = profile(lambda: model(x, t))
    print(report.table())

`genengine profile TARGET` prints the same; docs/profiling.md says how to read it. `nvtx` names our kernels and the rows
of a sampling loop in Nsight Systems.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from genengine.ops._cost import Cost
from genengine.profiling import flame, fusions, timeline
from genengine.profiling._nvtx import nvtx
from genengine.profiling.record import Recording, Step, record
from genengine.profiling.report import Fusion, Gap, Kernel, Profile, Sync

__all__ = ["Fusion", "Gap", "Kernel", "Profile", "Sync", "nvtx", "profile"]

# Passes under the profiler: so many, if they fit into so many seconds and ops (each of which leaves about ten events).
MAX_REPEATS, PROFILED_SECONDS, PROFILED_OPS = 25, 1.0, 8000


def profile(
    function: Callable[[], object],
    *,
    device: torch.device | str | None = None,
    warmup: int = 2,
    repeats: int | None = None,
    ceilings: object = None,
    name: str = "function",
    trace: str | Path | None = None,
) -> Profile:
    """Run `function` and say where its time goes.

    After the warm-up: one untimed pass that records every op (its cost, operands, and the line that called it), then
    `repeats` passes timed as they are, then as many under torch.profiler. Reported is the pass of median length:

        bandwidth = bytes / seconds;    of_ceiling = floor(cost) / seconds

    function: takes no arguments, does the same work at every call. device: that its kernels run on, "cpu" or a CUDA
    device; default CUDA if a recorded op has a tensor there, else the CPU. warmup: passes before anything is looked at,
    >= 0. repeats: >= 1; default as many as fit into a second, 25 at most. ceilings: what
    `genengine.benchmarks.ceilings.measure` returns, or that function, which is then called with the device and the
    dtypes of the recorded products; None leaves out the percentages. name: how the report calls the function. trace:
    file to write the Chrome trace to, compressed if it ends in .gz.

    Returns a `Profile`. On a CPU a gap is time outside any op, and a host sync is what would wait on a GPU. Raises
    ValueError on bad arguments, or a device that no op ran on; RuntimeError if another profiler is active; and what
    `function` raises, and OSError if the trace cannot be written.
    """
    if warmup < 0 or (repeats is not None and repeats < 1):
        raise ValueError(f"profile: warmup must be >= 0 and repeats >= 1 or None, got {warmup} and {repeats}")
    if device is not None and torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"profile: device must be cpu or cuda, got {device}")
    if trace is not None:
        timeline.check_writable(trace)
    if torch.autograd._profiler_enabled():
        raise RuntimeError("profile: another profiler is active in this process; end it first")
    for _ in range(warmup):
        function()
    recording = record(function)
    device = _chosen(device, recording.steps)
    timeline.wait(device)
    once = timeline.seconds(function, device)
    if repeats is None:
        fit = min(PROFILED_SECONDS / max(once, 1e-6), PROFILED_OPS / max(len(recording.steps), 1))
        repeats = max(1, min(MAX_REPEATS, int(fit)))
    keys = [(step.name, step.first_shape) for step in recording.steps]
    times = timeline.measure(function, keys, device, repeats=repeats, trace=trace)
    if callable(ceilings):
        ceilings = ceilings(device, _product_dtypes(recording.steps))
    return _summary(recording, times, device, repeats, ceilings, name)


def _chosen(device, steps) -> torch.device:
    """The device asked for, if an op ran there; else where the ops ran."""
    kinds = {operand.device for step in steps for operand in step.reads + step.writes}
    if device is None:
        on_gpu = "cuda" in kinds if steps else torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")
    device = torch.device(device)
    if steps and (("cuda" in kinds) != (device.type == "cuda")):
        where = "cuda" if "cuda" in kinds else ", ".join(sorted(kinds))
        raise ValueError(
            f"profile: device is {device}, but the function's tensors are on {where}; ask for that, or None"
        )
    return device


def _product_dtypes(steps) -> list[torch.dtype]:
    """The dtypes of recorded matrix products, at least one."""
    found = {step.dtype for step in steps if step.cost.flops}
    return sorted(found or {torch.float32}, key=str)


def _summary(recording: Recording, times, device, repeats, ceilings, name) -> Profile:
    steps = recording.steps
    ran = [step for step in steps if step.index in times.durations]
    stray = [Kernel(key, "", "", calls, spent) for key, (calls, spent) in times.stray.items()]
    kernels = sorted(_kernels(ran, times.durations, ceilings) + stray, key=lambda kernel: -kernel.seconds)
    total = sum((step.cost for step in ran), Cost(0))
    return Profile(
        name=name, device=str(device), seconds=times.plain, profiled=times.profiled,
        busy=sum(kernel.seconds for kernel in kernels), bytes=total.bytes, flops=_products(ran), repeats=repeats,
        kernels=kernels, gaps=_gaps(steps, times.gaps, device), syncs=_syncs(steps, times.waits, device),
        fusions=fusions.find(recording, times.durations), missing=times.missing,
        notes=_notes(steps, times, device, ceilings),
        ceilings=ceilings, flame=flame.build(steps, times.durations, times.gaps, times.ranges, times.stray, name),
    )  # fmt: skip


def _kernels(steps, durations, ceilings):
    """One row for all calls of the same op on the same shapes and dtype."""
    groups = defaultdict(list)
    for step in steps:
        groups[step.name, step.shapes, step.dtype].append(step)
    rows = []
    for (key, shapes, dtype), members in groups.items():
        cost = sum((step.cost for step in members), Cost(0))
        known = ceilings is not None and all(_has_ceiling(step, ceilings) for step in members)
        floors = [ceilings.floor(step.cost, dtype) for step in members] if known else []
        rows.append(
            Kernel(
                key,
                shapes,
                str(dtype).removeprefix("torch."),
                len(members),
                sum(durations[step.index] for step in members),
                cost.bytes,
                cost.flops or None,
                sum(floor for floor, _ in floors) if floors else None,
                floors[0][1] if floors else None,
                sum(math.prod(operand.shape) for step in members for operand in step.writes),
                dict(Counter(step.line for step in members)),
            )  # fmt: skip
        )
    return rows


def _has_ceiling(step, ceilings) -> bool:
    """Not what waits, is copied to another device, or multiplies in a dtype whose products were not measured."""
    copies = step.name in ("aten::_to_copy", "aten::copy_")
    crosses = copies and len({operand.device for operand in step.reads + step.writes}) > 1
    measured = not step.cost.flops or str(step.dtype).removeprefix("torch.") in ceilings.matmul
    return measured and step.sync is None and not crosses


def _products(steps):
    return sum(step.cost.flops for step in steps if step.name.startswith("aten::"))


def _gaps(steps, gaps, device):
    nobody = {
        -1: "(a kernel of no recorded op)" if device.type == "cuda" else "(after the last op)",
        -2: "(compiled code)",
    }
    spent, counts = defaultdict(float), Counter()
    for length, step in gaps:
        line = steps[step].line if step >= 0 else nobody[step]
        spent[line] += length
        counts[line] += 1
    return sorted((Gap(line, counts[line], spent[line]) for line in spent), key=lambda gap: -gap.seconds)


def _syncs(steps, waits, device):
    """What waited on a GPU: recorded calls of GPU tensors, and any other CUDA call; on a CPU, what would wait."""
    on_gpu, spent, counts = device.type == "cuda", defaultdict(float), Counter()
    for step in steps:
        touches = any(operand.device == device.type for operand in step.reads)
        if step.sync and (touches or not on_gpu):
            counts[step.line, step.sync] += 1
    for length, call, index in waits:
        known = index >= 0 and steps[index].sync
        key = (steps[index].line if index >= 0 else "(outside any op)", steps[index].sync if known else call)
        spent[key] += length
        counts[key] += not known
    rows = [Sync(*key, count, spent[key] if on_gpu else None) for key, count in counts.items() if count]
    return sorted(rows, key=lambda sync: (-(sync.seconds or 0.0), -sync.count))


def _notes(steps: list[Step], times, device, ceilings):
    notes = []
    if not steps:
        notes.append("no op was recorded: the function calls none of torch's, or replays what it has captured")
    if any(name.startswith(timeline.COMPILED) for name in times.stray):
        notes.append(
            "what torch.compile compiled is one row; its bytes are not known, and it is left out of the fused ops"
        )
    elif times.stray:
        notes.append("kernels without operands are of no recorded op (a CUDA graph's, or compiled): no bytes are known")
    if times.missing + times.surplus > len(steps) / 50 and not times.stray:
        notes.append(
            f"{times.missing} of {len(steps)} recorded ops were not seen in the timed pass, and {times.surplus} ran "
            "that were not recorded: the function may not do the same work every time"
        )
    if ceilings is not None and device.type == "cpu" and torch.get_num_threads() > 1:
        notes.append(
            f"the ceilings are of one thread, the function may use {torch.get_num_threads()}: compare with one"
        )
    return notes
