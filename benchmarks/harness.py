"""The one timing protocol: variants of one piece of work, interleaved in one process, accuracy asserted first.

On a CPU: one thread, process CPU time (the machine may be shared: a ratio is worth more than a time), wall time beside
it. On a GPU: CUDA events around batches of launches. Every sample repeats a variant often enough to last MIN_SAMPLE
seconds; variants take turns; the reported ratio is the median of paired ratios with a bootstrap confidence interval.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

SCHEMA_VERSION = 1
MIN_SAMPLE = 2e-3
# Without these, eager PyTorch at tens of MB mostly times page faults: set before the process starts, for every variant.
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Goal:
    """A figure to reach: quantity "ratio" is time(over) / time(under), "ns" is nanoseconds per element of `over`."""

    quantity: str
    over: str
    under: str
    bound: float
    at_least: bool

    def describe(self) -> str:
        sign = ">=" if self.at_least else "<="
        what = f"{self.over} / {self.under}" if self.quantity == "ratio" else f"ns per element, {self.over}"
        return f"{what} {sign} {self.bound:g}"


def faster(than: str, by: float, ours: str = "fused") -> Goal:
    """`ours` is at least `by` times faster than `than`."""
    return Goal("ratio", than, ours, by, True)


def within(factor: float, of: str, ours: str = "fused") -> Goal:
    """`ours` takes at most `factor` times as long as `of`."""
    return Goal("ratio", ours, of, factor, False)


@dataclass(frozen=True)
class Benchmark:
    """One piece of work and its variants.

    variants: name -> a function of no arguments; "fused" is ours. check: raises AssertionError unless ours is right.
    elements: for nanoseconds per element. bytes_moved: the floor of the op's documentation, for GB/s. goals: figures to
    reach, reported as reached or not, never enforced.
    """

    name: str
    shape: str
    dtype: str
    variants: dict[str, Callable[[], object]]
    check: Callable[[], None]
    elements: int
    bytes_moved: int | None = None
    goals: tuple[Goal, ...] = ()
    quick: bool = True
    device: str = "cpu"


@dataclass
class Timing:
    """Seconds per call over the samples of one variant."""

    samples: list[float] = field(repr=False)

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def summary(self) -> dict[str, float]:
        low, p20, median, p80 = np.quantile(self.samples, [0, 0.2, 0.5, 0.8])
        return {"min": float(low), "p20": float(p20), "median": float(median), "p80": float(p80)}


def time_variants(variants: dict[str, Callable], *, device: str = "cpu", budget: float = 2.0) -> dict[str, Timing]:
    """Time all variants in turn for about `budget` seconds; CPU seconds of this process, or GPU seconds."""
    run = _gpu_sample if device == "cuda" else _cpu_sample
    counts = {}
    for name, function in variants.items():
        function()
        function()
        once = max(run(function, 1), 1e-7)
        counts[name] = max(1, min(10_000, round(MIN_SAMPLE / once)))
    round_time = sum(run(function, counts[name]) * counts[name] for name, function in variants.items())
    rounds = int(min(400, max(9, budget / max(round_time, 1e-6))))
    samples = {name: [] for name in variants}
    names = list(variants)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:  # no variant always follows the same one
            samples[name].append(run(variants[name], counts[name]))
    return {name: Timing(values) for name, values in samples.items()}


def _cpu_sample(function, count):
    start = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - start) / count


def _gpu_sample(function, count):
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / count


def ratio(over: Timing, under: Timing, *, resamples: int = 500) -> tuple[float, float, float]:
    """Median of the paired ratios, and the ends of its 95 % bootstrap confidence interval."""
    paired = np.array(over.samples) / np.array(under.samples)
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(paired, size=(resamples, len(paired))), axis=1)
    return float(np.median(paired)), *(float(q) for q in np.quantile(medians, [0.025, 0.975]))


def run(benchmark: Benchmark, *, budget: float = 2.0) -> dict:
    """Check, then time one benchmark; returns a row of the result file. A failing check is a row too."""
    row = {"name": benchmark.name, "shape": benchmark.shape, "dtype": benchmark.dtype, "device": benchmark.device}
    try:
        benchmark.check()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    timings = time_variants(benchmark.variants, device=benchmark.device, budget=budget)
    row["variants"] = {name: timing.summary() for name, timing in timings.items()}
    row["samples"] = len(next(iter(timings.values())).samples)
    fused = timings.get("fused")
    if fused is not None:
        row["ratios"] = {
            name: dict(zip(("ratio", "low", "high"), ratio(timing, fused), strict=True))
            for name, timing in timings.items()
            if name != "fused"
        }
        row["ns_per_element"] = fused.median * 1e9 / benchmark.elements
        if benchmark.bytes_moved:
            row["GB_per_s"] = benchmark.bytes_moved / fused.median * 1e-9
    row["goals"] = [_judge(goal, timings, benchmark.elements) for goal in benchmark.goals]
    return row


def _judge(goal, timings, elements):
    if goal.quantity == "ratio":
        value = ratio(timings[goal.over], timings[goal.under])[0]
    else:
        value = timings[goal.over].median * 1e9 / elements
    reached = value >= goal.bound if goal.at_least else value <= goal.bound
    return {"goal": goal.describe(), "value": value, "reached": bool(reached)}


# ---- where it ran ------------------------------------------------------------------------------------------------


def environment(device: str) -> dict:
    """Device, versions, commit and load: what a figure means nothing without."""
    import genengine

    info = {
        "schema_version": SCHEMA_VERSION,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("GENENGINE_COMMIT") or _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "genengine": genengine.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "malloc": {name: os.environ.get(name) for name in MALLOC_SETTINGS},
    }
    if device == "cuda":
        info |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "gpu": _nvidia_smi()}
    else:
        from genengine import testing
        from genengine.ops import EXTENSION

        isa = testing.current_isa() if EXTENSION.loaded else "no extension"
        info |= {"device": _cpu_name(), "cores": os.cpu_count(), "isa": isa}
    return info


def _git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia_smi():
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,power.draw,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), (part.strip() for part in done.stdout.split("\n")[0].split(",")), strict=False))


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(report: dict, folder: Path) -> Path:
    """Write a report as <folder>/<device>/<date>-<commit>-<suite>.json, or without the suite if it is "all"."""
    device = "-".join(report["environment"]["device"].lower().replace("(r)", "").split())
    stamp = report["environment"]["time"][:10]
    suite = "" if report["suite"] == "all" else f"-{report['suite']}"
    path = folder / device / f"{stamp}-{report['environment']['commit'] or 'uncommitted'}{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


__all__ = [
    "Benchmark", "Goal", "MALLOC_SETTINGS", "Timing", "environment", "faster", "ratio", "replace", "run", "save",
    "time_variants", "within",
]  # fmt: skip
