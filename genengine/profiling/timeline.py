"""Timed passes under torch.profiler, read from its Chrome trace: when each recorded op ran, and when nothing did.

The trace is a public format that says the same of a CPU and of a GPU, where kernels name the op that launched them.
"""

from __future__ import annotations

import bisect
import gzip
import json
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from genengine.ops import _ranges

PASS, COMPILED = "genengine::pass", "Torch-Compiled Region"
_row = re.compile(r"^genengine::row \d+$")
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
Key = tuple[str, tuple[int, ...]]  # of an op that ran: its name and `Step.first_shape`


@dataclass(frozen=True)
class Event:
    """One interval of the trace, in microseconds.

    kind: "op", "range" (record_function), "kernel" (on a GPU, copies too) or "runtime" (a CUDA call of the host).
    lane: thread of the host, or stream of the GPU. external: the op that a kernel or CUDA call belongs to, -1 for none.
    shape: that of an op's first tensor of one or more dimensions.
    """

    name: str
    kind: str
    start: float
    end: float
    lane: object
    external: int = -1
    correlation: int = -1
    shape: tuple[int, ...] = ()

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """The pass of median length of a profiled function.

    plain: seconds of a pass without the profiler, the median; profiled: with it.
    durations: recorded step -> seconds on the device, of all steps on a CPU, of those that launched a kernel on a GPU.
    stray: name -> (calls, seconds) of kernels that belong to no recorded op: those of a CUDA graph, and compiled code.
    gaps: (seconds, index of the step that ended it; -1: of none, -2: compiled code). waits: (seconds, CUDA call, index
    of the step that made it, or -1). ranges: step -> the `record_function` ranges around it, outermost first.
    missing: steps that were not seen; surplus: ops of a recorded name that were seen and match no step.
    """

    plain: float
    profiled: float
    durations: dict[int, float]
    stray: dict[str, tuple[int, float]] = field(default_factory=dict)
    gaps: list[tuple[float, int]] = field(default_factory=list)
    waits: list[tuple[float, str, int]] = field(default_factory=list)
    ranges: dict[int, tuple[str, ...]] = field(default_factory=dict)
    missing: int = 0
    surplus: int = 0


def measure(
    function: Callable[[], object], keys: list[Key], device: torch.device, *, repeats: int, trace: str | Path | None
) -> Timeline:
    """Time `repeats` passes without the profiler, as many with it, and match what ran with the recorded keys."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its start and stop are announced on stderr
    plain = statistics.median(seconds(function, device) for _ in range(repeats))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler, _rows_named():
        function()  # the profiler's own first pass is slow
        wait(device)  # else its kernels run within the next
        for _ in range(repeats):
            with torch.profiler.record_function(PASS):
                function()
                wait(device)
    events = parse(_export(profiler, trace))
    return read(events, keys, plain)


def _rows_named():
    """The rows of a sampling loop as ranges of the profiler."""
    opened = []

    def push(label):
        opened.append(torch.profiler.record_function(label))
        opened[-1].__enter__()

    return _ranges.using(push, lambda: opened.pop().__exit__(None, None, None), around_kernels=False)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The wall time of a call, until the device is done."""
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Return when the device is done with all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_writable(path: str | Path) -> None:
    """Raise OSError now, not after the measurement, where a file cannot be written; make the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def _export(profiler, trace) -> dict:
    """The Chrome trace as a dict; also kept in the file `trace`, if one is named: compressed, if as .gz."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"  # by another ending the profiler would choose another format
        profiler.export_chrome_trace(str(path))
        content = path.read_bytes()
    if trace is not None:
        Path(trace).write_bytes(gzip.compress(content) if str(trace).endswith(".gz") else content)
    return json.loads(content)


def parse(trace: dict) -> list[Event]:
    """The events of a Chrome trace that matter here, by start; the longer first where two start together."""
    kinds = {"cpu_op": "op", "user_annotation": "range", "cuda_runtime": "runtime", "cuda_driver": "runtime"}
    kinds |= dict.fromkeys(_KERNELS, "kernel")
    found = []
    for entry in trace["traceEvents"]:
        kind = kinds.get(entry.get("cat"))
        if kind is None or entry.get("ph") != "X":
            continue
        extra = entry.get("args", {})
        lane = extra.get("stream", entry["tid"]) if kind == "kernel" else entry["tid"]
        start = float(entry["ts"])
        external = int(extra.get("External id", extra.get("external id", -1)))
        end, correlation = start + float(entry.get("dur", 0.0)), int(extra.get("correlation", -1))
        shape = _first_shape(extra.get("Input Dims", ()))
        found.append(Event(entry["name"], kind, start, end, lane, external, correlation, shape))
    return sorted(found, key=lambda event: (event.start, -event.end))


def _first_shape(shapes) -> tuple[int, ...]:
    """The first that is not []: a number's. Of lists of tensors the profiler leaves shapes out, here as in a `Step`."""
    return next((tuple(entry) for entry in shapes if entry and not isinstance(entry[0], list)), ())


def read(events: list[Event], keys: list[Key], plain: float) -> Timeline:
    """The timeline of parsed events: that of the pass of median length, whose parts add up. keys: of the recorded ops,
    in order."""
    passes = [event for event in events if event.kind == "range" and event.name == PASS]
    if not passes:
        raise RuntimeError("profile: torch.profiler recorded nothing; is another profiler active in this process?")
    window = sorted(passes, key=lambda event: event.duration)[(len(passes) - 1) // 2]
    found = _Pass(_within(events, window), keys, window)
    return Timeline(
        plain,
        window.duration * 1e-6,
        {step: micro * 1e-6 for step, micro in found.durations.items()},
        {name: (calls, micro * 1e-6) for name, (calls, micro) in found.stray.items()},
        [(micro * 1e-6, step) for micro, step in found.gaps],
        [(micro * 1e-6, call, step) for micro, call, step in found.waits],
        {step: found.ranges[event] for event, step in found.steps.items() if found.ranges[event]},
        len(keys) - len(found.steps),
        found.surplus,
    )


def _within(events, window):
    """The events of one pass; kernels by when they ran, as a pass ends with all work done."""
    first = bisect.bisect_left([event.start for event in events], window.start)
    found = []
    for event in events[first:]:
        if event.start > window.end:
            break
        found.append(event)
    return found


class _Pass:
    """One pass: recorded ops matched with events, time on the device per op, gaps and waits."""

    def __init__(self, events, keys, window):
        self.events = events
        self.steps, self.surplus = _match(events, keys)  # the op's event -> step
        self.ranges = _ranges_around(events, self.steps)
        self.durations, self.stray, self.gaps, self.waits = {}, {}, [], []
        kernels = [event for event in events if event.kind == "kernel"]
        if kernels:
            self._on_device(kernels)
        else:
            self._on_host(window)

    def _on_host(self, window):
        """On a CPU an op runs where it is called; a gap is what passes between one and the next."""
        matched = list(self.steps.items())
        for region, own in _regions(self.events, self.steps):
            calls, total = self.stray.get(region.name, (0, 0.0))
            self.stray[region.name] = calls + 1, total + own
            matched.append((region, -2))
        matched.sort(key=lambda pair: pair[0].start)
        last = window.start
        for event, step in matched:
            if step >= 0:
                self.durations[step] = event.duration
            if event.start > last:
                self.gaps.append((event.start - last, step))
            last = max(last, event.end)
        self.gaps.append((max(window.end - last, 0.0), -1))

    def _on_device(self, kernels):
        """On a GPU kernels name the op that launched them, and a gap is when no stream works."""
        owner = _Owners(self.events, self.steps)
        last = kernels[0].start
        for kernel in kernels:
            step = owner.of(kernel)
            if step < 0:
                calls, total = self.stray.get(kernel.name, (0, 0.0))
                self.stray[kernel.name] = calls + 1, total + kernel.duration
            else:
                self.durations[step] = self.durations.get(step, 0.0) + kernel.duration
            if kernel.start > last:
                self.gaps.append((kernel.start - last, step))
            last = max(last, kernel.end)
        copies = {kernel.correlation: kernel.name for kernel in kernels if kernel.name.startswith("Memcpy")}
        blocking = [event for event in self.events if event.kind == "runtime" and _blocks(event, copies)]
        if blocking and blocking[-1].name == "cudaDeviceSynchronize":
            blocking.pop()  # the wait for the pass to end, which is not the user's
        self.waits = [(event.duration, event.name, owner.of(event)) for event in blocking]


def _blocks(event, copies) -> bool:
    """A CUDA call that returns when the device is done: a synchronisation, or a copy to pageable memory."""
    if "Synchronize" in event.name:
        return True
    return event.name.startswith("cudaMemcpy") and "DtoH" in (name := copies.get(event.correlation, "")) and (
        "Pageable" in name or not event.name.startswith("cudaMemcpyAsync")
    )  # fmt: skip


def _regions(events, steps) -> list[tuple[Event, float]]:
    """The compiled regions outside recorded ops, each with the time that is not of the ops and regions within it."""
    opened, own = defaultdict(list), {}
    for event in events:
        compiled = event.name.startswith(COMPILED)
        if not compiled and event not in steps:
            continue
        around = opened[event.lane] = [other for other in opened[event.lane] if other.end > event.start]
        if around and around[-1] in own:
            own[around[-1]] -= event.duration
        if compiled and not (around and around[-1] in steps):
            own[event] = event.duration
        around.append(event)
    return list(own.items())


def _match(events: Iterable[Event], keys: list[Key]) -> tuple[dict[Event, int], int]:
    """Event -> recorded step, and how many ops of a recorded name matched none.

    The k-th recorded op of a name and shape is the k-th outermost event of them. Outermost: inside no other event that
    is matched. What a recorded op calls is part of it. An op and its in-place form are one name: autograd adds
    gradients up in place, but not while it is watched.
    """
    waiting = defaultdict(deque)
    for step, (name, shape) in enumerate(keys):
        waiting[name.rstrip("_"), shape].append(step)
    names = {name for name, _ in waiting}
    until, within, found, surplus = defaultdict(float), defaultdict(float), {}, 0
    for event in events:
        name = event.name.rstrip("_")
        if event.kind != "op" or event.start < until[event.lane] or name not in names:
            continue
        if queue := waiting.get((name, event.shape)):
            found[event] = queue.popleft()
            until[event.lane] = event.end
        elif event.start >= within[event.lane]:
            surplus += 1
            within[event.lane] = event.end
    return found, surplus


def _ranges_around(events, steps) -> dict[Event, tuple[str, ...]]:
    """The ranges that are open where each matched op runs; the rows of a loop are one range."""
    opened, around = defaultdict(list), {}
    for event in events:
        inside = opened[event.lane] = [other for other in opened[event.lane] if other.end > event.start]
        if event.kind == "range" and event.name != PASS:
            inside.append(event)
        elif event in steps:
            around[event] = tuple(_row.sub("genengine::row", other.name) for other in inside)
    return around


class _Owners:
    """Which recorded step a kernel or a CUDA call belongs to: that whose op, or an op within it, made the call."""

    def __init__(self, events, steps):
        inside, self._by_op, self._by_call = {}, {}, {}
        for event in events:
            if event.kind not in ("op", "runtime"):
                continue
            if event in steps:
                inside[event.lane] = (event.end, steps[event])
            end, step = inside.get(event.lane, (float("-inf"), -1))
            if event.start < end and event.kind == "op" and event.external > 0:
                self._by_op[event.external] = step
            elif event.start < end and event.correlation > 0:
                self._by_call[event.correlation] = step

    def of(self, event: Event) -> int:
        """The step; -1 for none. By the op that the event names, else by the call that it is, or was launched by."""
        step = self._by_op.get(event.external, -1)
        return step if step >= 0 else self._by_call.get(event.correlation, -1)
