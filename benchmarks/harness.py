"""The one timing protocol: variants of one piece of work, interleaved in one process, accuracy asserted first.

On a CPU: one thread, process CPU time (the machine may be shared: a ratio is worth more than a time), wall time beside
it. On a GPU: CUDA events around replays of a captured graph, or around plain launches where capture fails; "cold" with
inputs rotated over at least three times the second-level cache, "hot" with the same inputs again and again. Every
sample repeats a variant often enough to last MIN_SAMPLE seconds; variants take turns; the reported ratio is the median
of paired ratios with a bootstrap confidence interval. docs/measuring.md says why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from genengine import testing
from genengine.benchmarks import machine
from genengine.benchmarks.registry import Benchmark, Case, Entry, Goal
from genengine.benchmarks.timers import sampler

MIN_SAMPLE = 2e-3
MAX_ROUNDS, MIN_ROUNDS = 400, 9
COLD_FACTOR, MAX_SETS = 3, 16  # how many times the second-level cache the rotated inputs take, in how many sets at most
COMPILE_MODES = {"default": "torch.compile", "max-autotune": "torch.compile, max-autotune"}


@dataclass
class Timing:
    """Seconds per call over the samples of one variant: of the protocol's clock, and of the clock on the wall."""

    samples: list[float] = field(repr=False)
    wall: list[float] = field(repr=False, default_factory=list)
    clock: str = "process time"

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def summary(self) -> dict:
        low, p20, median, p80 = (float(q) for q in np.quantile(self.samples, [0, 0.2, 0.5, 0.8]))
        summary = {"min": low, "p20": p20, "median": median, "p80": p80, "clock": self.clock}
        return summary | ({"wall": float(np.median(self.wall))} if self.wall else {})


def time_variants(
    variants: Mapping[str, list[Callable]], *, device: str = "cpu", budget: float = 2.0
) -> dict[str, Timing]:
    """Time all variants in turn for about `budget` seconds.

    variants: name -> functions that do the same work on different inputs, taken in rotation. Returns seconds per call.
    """
    samplers = {name: sampler(functions, device) for name, functions in variants.items()}
    counts = {}
    for name, sample in samplers.items():
        once = max(sample(1)[0], 1e-7) * sample.calls
        counts[name] = max(1, min(10_000, round(MIN_SAMPLE / once)))
    start = time.perf_counter()
    for name, sample in samplers.items():
        sample(counts[name])
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, budget / max(time.perf_counter() - start, 1e-6))))
    timings = {name: Timing([], [], sample.clock) for name, sample in samplers.items()}
    names = list(variants)
    for index in range(rounds):
        start = index % len(names)  # no variant always follows the same one
        for name in names[start:] + names[:start]:
            seconds, wall = samplers[name](counts[name])
            timings[name].samples.append(seconds)
            timings[name].wall.append(wall)
    return timings


def ratio(over: Timing, under: Timing, *, resamples: int = 500) -> tuple[float, float, float]:
    """Median of the paired ratios, and the ends of its 95 % bootstrap confidence interval."""
    paired = np.array(over.samples) / np.array(under.samples)
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(paired, size=(resamples, len(paired))), axis=1)
    return float(np.median(paired)), *(float(q) for q in np.quantile(medians, [0.025, 0.975]))


# ---- one row of a report -----------------------------------------------------------------------------------------


def run(entry: Entry, case: Case, *, budget: float = 2.0, compile_modes=("default",), ceilings=None) -> dict:
    """Check, then time one benchmark at one case; returns a row of the result file.

    A benchmark that cannot be built, fails its check or raises is a row with an `error`; a variant that cannot run is
    named in `skipped` with the reason. compile_modes: of torch.compile, "default" and "max-autotune". ceilings: what
    the device can do (`ceilings.measure`), for the percentage of the one that binds.
    """
    row = describe(entry, case)
    try:
        benchmark = entry.make(case)
        row |= {"accuracy": _checked(benchmark)}
        sets = [_variants(b, entry, compile_modes) for b in (benchmark, *_further_sets(entry, case, benchmark))]
        runnable, row["skipped"], row["first_call"] = _runnable(sets, benchmark, entry)
        row |= _timed(runnable, benchmark, case, budget)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | _throughput(row, benchmark, case, ceilings)


def describe(entry: Entry, case: Case) -> dict:
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        "name": entry.name, "group": entry.group, "kind": entry.kind, "label": case.label, "shape": list(case.shape),
        "dtype": dtype, "device": case.device,
    }  # fmt: skip


def _checked(benchmark):
    """Runs the check; the largest error it met against the float64 reference, and what was allowed."""
    with testing.recorded_errors() as errors:
        benchmark.check()
    if not errors:
        return None
    worst = max(errors, key=lambda entry: entry.error / entry.allowed if entry.allowed else entry.error)
    return {"error": worst.error, "allowed": worst.allowed, "of": worst.label}


def _further_sets(entry, case, benchmark):
    """More sets of inputs, so that on a GPU no call finds its own in the cache."""
    if case.device != "cuda" or benchmark.cost is None:
        return []
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    wanted = min(MAX_SETS, -(-COLD_FACTOR * cache // max(benchmark.cost.bytes, 1)))
    return [entry.make(case) for _ in range(wanted - 1)]


def _variants(benchmark, entry, compile_modes):
    found = dict(benchmark.variants)
    if "default" not in compile_modes:
        found.pop("torch.compile", None)
    if benchmark.compiles is not None:
        function, arguments = benchmark.compiles
        for mode in compile_modes:
            found[COMPILE_MODES[mode]] = _compiled(function, arguments, mode)
    for baseline in entry.baselines:
        if not baseline.missing():
            found[baseline.name] = lambda f=baseline.function: f(*benchmark.inputs)
    return found


def _compiled(function, arguments, mode):
    compiled = torch.compile(function, mode=None if mode == "default" else "max-autotune-no-cudagraphs")
    return lambda: compiled(*arguments)


def _runnable(sets, benchmark, entry):
    """The variants that run, each with its functions of all sets; why the others do not; and how long the first call of
    each took, compilation included."""
    first_call = {}
    skipped = {baseline.name: why for baseline in entry.baselines if (why := baseline.missing())}
    runnable = {}
    for name in sets[0]:
        functions, start = [variants[name] for variants in sets], time.perf_counter()
        try:
            result = functions[0]()
            first_call[name] = time.perf_counter() - start
            if name in {baseline.name for baseline in entry.baselines}:
                _meets_oracle(name, result, benchmark)
        except Exception as error:
            if name == "fused":
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            runnable[name] = functions
    return runnable, skipped, {name: seconds for name, seconds in first_call.items() if name in runnable}


def _meets_oracle(name, result, benchmark):
    """A registered baseline is held to the rule that ours is held to."""
    if benchmark.oracle is None:
        return
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in benchmark.inputs]
    expected, plain = _tuple(benchmark.oracle(*wide)), _tuple(benchmark.oracle(*benchmark.inputs))
    for got, eager, oracle in zip(_tuple(result), plain, expected, strict=True):
        testing.assert_as_good_as_eager(got, eager, oracle, name)


def _tuple(result):
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _timed(runnable, benchmark, case, budget):
    before = _state(case.device)
    timings = time_variants(runnable, device=case.device, budget=budget)
    row = {
        "variants": {name: timing.summary() for name, timing in timings.items()},
        "samples": len(timings["fused"].samples),
        "ratios": _ratios(timings),
        "goals": [_judge(goal, timings, benchmark.elements) for goal in benchmark.goals if _can_judge(goal, timings)],
    }
    if case.device == "cuda":
        hot = time_variants({name: functions[:1] for name, functions in runnable.items()}, device="cuda", budget=budget)
        row["hot"] = {"variants": {name: timing.summary() for name, timing in hot.items()}, "ratios": _ratios(hot)}
    return row | {"state": [before, _state(case.device)]}


def _ratios(timings):
    ours = timings["fused"]
    return {
        name: dict(zip(("ratio", "low", "high"), ratio(timing, ours), strict=True))
        for name, timing in timings.items()
        if name != "fused"
    }


def _state(device):
    """The load of the machine and, of a GPU, clocks, power and temperature: read before and after every row."""
    load = {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    return load | ({"gpu": machine.gpu_state()} if device == "cuda" else {})


def _can_judge(goal, timings):
    return goal.over in timings and (goal.quantity != "ratio" or goal.under in timings)


def _judge(goal, timings, elements):
    if goal.quantity == "ratio":
        value = ratio(timings[goal.over], timings[goal.under])[0]
    else:
        value = timings[goal.over].median * 1e9 / elements
    reached = value >= goal.bound if goal.at_least else value <= goal.bound
    return {"goal": goal.describe(), "value": value, "reached": bool(reached)}


def _throughput(row, benchmark, case, ceilings):
    """Work per second of "fused", and its share of the ceiling that binds it."""
    seconds, found = row["variants"]["fused"]["median"], {}
    if benchmark.elements:
        found["ns_per_element"] = seconds * 1e9 / benchmark.elements
    if (cost := benchmark.cost) is None:
        return found
    found["cost"] = {"bytes": cost.bytes, "flops": cost.flops, "exps": cost.exps}
    found |= {"GB_per_s": cost.bytes / seconds * 1e-9, "TFLOP_per_s": cost.flops / seconds * 1e-12}
    if ceilings is not None:
        floor, name = ceilings.floor(cost, case.dtype)
        found["ceiling"] = {"name": name, "seconds": floor, "percent": 100 * floor / seconds}
    return found


__all__ = ["Benchmark", "Goal", "Timing", "describe", "ratio", "replace", "run", "time_variants"]
