"""The one timing protocol: variants of one piece of work, interleaved in one process, accuracy asserted first.

On a CPU: one thread, process CPU time (the machine may be shared: a ratio is worth more than a time), wall time beside
it. On a GPU: CUDA events around replays of a captured graph, or around plain launches where capture fails; "cold" with
inputs rotated over at least three times the second-level cache, "hot" with the same inputs again and again. Every
sample repeats a variant often enough to last MIN_SAMPLE seconds; variants take turns; the reported ratio is the median
of paired ratios with a bootstrap confidence interval. docs/measuring.md says why.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from genengine import backend, testing
from genengine.benchmarks import calls, machine, timers
from genengine.benchmarks.registry import Case, Entry

MIN_SAMPLE = 2e-3
MAX_ROUNDS, MIN_ROUNDS, PASSES = 400, 9, 3
COLD_FACTOR, MAX_SETS = 3, 16  # how many times the second-level cache the rotated inputs take, in how many sets at most
COMPILE_MODES = {"default": "torch.compile", "max-autotune": "torch.compile, max-autotune"}


@dataclass
class Timing:
    """Seconds per call over the samples of one variant: of the protocol's clock, and of the clock on the wall.

    passes: how many samples each pass over fresh inputs has; what differs between passes differs between runs.
    reason: on a GPU, why no graph could be timed, if none could.
    """

    samples: list[float] = field(repr=False)
    wall: list[float] = field(repr=False, default_factory=list)
    clock: str = "process time"
    passes: list[int] = field(default_factory=list)
    reason: str | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    def on_the_wall(self) -> Timing:
        return Timing(self.wall, self.wall, "time on the wall", self.passes)

    def times(self, count: int) -> Timing:
        """Of a whole whose `count` equal parts take as long as this each."""
        scaled = [[value * count for value in values] for values in (self.samples, self.wall)]
        return Timing(*scaled, self.clock, self.passes, self.reason)

    def summary(self) -> dict:
        low, p20, median, p80 = (float(q) for q in np.quantile(self.samples, [0, 0.2, 0.5, 0.8]))
        summary = {"min": low, "p20": p20, "median": median, "p80": p80, "clock": self.clock}
        summary |= {"wall": float(np.median(self.wall))} if self.wall else {}
        return summary | ({"reason": self.reason} if self.reason else {})

    def __add__(self, other: Timing) -> Timing:
        """Another pass behind this one."""
        passes = [part for timing in (self, other) for part in timing.passes or [len(timing.samples)]]
        return Timing(self.samples + other.samples, self.wall + other.wall, self.clock, passes, self.reason)


def time_variants(
    variants: Mapping[str, list[Callable]],
    *,
    device: str = "cpu",
    budget: float = 2.0,
    min_rounds: int = MIN_ROUNDS,
    skipped: dict[str, str] | None = None,
    graphs: bool = True,
) -> dict[str, Timing]:
    """Time all variants in turn for about `budget` seconds, in at least `min_rounds` rounds of a sample each.

    variants: name -> functions that do the same work on different inputs, taken in rotation. skipped: takes the names
    of variants that raise as their clock is made, and why; without it, and of "fused", that raises RuntimeError.
    graphs: whether to capture them, on a GPU.
    Returns seconds per call.
    """
    samplers, failures = timers.samplers(variants, device, graphs=graphs)
    if failures and (skipped is None or "fused" in failures):
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failures.items()))
    (skipped if skipped is not None else {}).update(failures)
    counts = {}
    for name, sample in samplers.items():
        once = max(sample(1)[0], 1e-7) * sample.calls
        counts[name] = max(1, min(10_000, math.ceil(MIN_SAMPLE / once)))
    start = time.perf_counter()
    for name, sample in samplers.items():
        sample(counts[name])
    rounds = int(min(MAX_ROUNDS, max(min_rounds, budget / max(time.perf_counter() - start, 1e-6))))
    timings = {name: Timing([], [], sample.clock, [], sample.reason) for name, sample in samplers.items()}
    names, shuffle = list(samplers), np.random.default_rng(0)
    for _ in range(rounds):
        for index in shuffle.permutation(len(names)):  # no variant always follows the same one
            name = names[index]
            seconds, wall = samplers[name](counts[name])
            timings[name].samples.append(seconds)
            timings[name].wall.append(wall)
    return timings


def ratio(over: Timing, under: Timing, *, resamples: int = 500) -> tuple[float, float, float]:
    """Median of the paired ratios, and the ends of its 95 % bootstrap confidence interval.

    Of several passes, passes are drawn first, then their samples: those of one pass share where its inputs lie.
    """
    paired = np.array(over.samples) / np.array(under.samples)
    parts = np.split(paired, np.cumsum(under.passes)[:-1]) if under.passes else [paired]
    generator = np.random.default_rng(0)

    def resampled():
        drawn = [parts[i] for i in generator.integers(len(parts), size=len(parts))]
        return np.median(np.concatenate([generator.choice(part, size=len(part)) for part in drawn]))

    medians = [resampled() for _ in range(resamples)]
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
        torch.manual_seed(zlib.crc32(repr(row).encode()))  # a check that fails fails again
        with timers.stream_of(case.device):
            benchmark = entry.make(case)
            row |= {"accuracy": _checked(benchmark)}
            row |= _timed(_passes(entry, case, benchmark), entry, case, compile_modes, budget)
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


def _passes(entry, case, benchmark):
    """The sets of inputs to time: a list of passes, each a list of sets taken in rotation.

    On a GPU one pass over so many sets that no call finds its own in the cache. On a CPU several passes over a set
    each: where tensors lie in memory moves a ratio more than noise does, and another process would have them elsewhere.
    A model is one set: its parameters and compiled code take longest to make.
    """
    if case.device == "cuda":
        return [[benchmark, *(entry.make(case) for _ in range(_sets_beyond_the_cache(case, benchmark) - 1))]]
    if entry.kind == "models":
        return [[benchmark]]
    return [[benchmark], *([entry.make(case)] for _ in range(PASSES - 1))]


def _sets_beyond_the_cache(case, benchmark):
    if benchmark.cost is None:
        return 1
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    return min(MAX_SETS, -(-COLD_FACTOR * cache // max(benchmark.cost.bytes, 1)))


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


def _missing(benchmark, entry, compile_modes):
    """What cannot be timed at all, and why."""
    found = {baseline.name: why for baseline in entry.baselines if (why := baseline.missing())}
    if benchmark.compiles is None and "torch.compile" in benchmark.variants and "max-autotune" in compile_modes:
        found[COMPILE_MODES["max-autotune"]] = "this row compiles in the default mode alone"
    return found


def _compiled(function, arguments, mode):
    compiled = torch.compile(function, mode=None if mode == "default" else "max-autotune-no-cudagraphs")
    return lambda: compiled(*arguments)


def _runnable(sets, entry, compile_modes, skipped, first_call):
    """The variants that run, each with its functions of all sets.

    Notes in `skipped` why others do not, and in `first_call` how long the first call of each took.
    """
    runnable, variants = {}, [_variants(benchmark, entry, compile_modes) for benchmark in sets]
    for name in variants[0]:
        if name in skipped:
            continue
        functions, start = [found[name] for found in variants], time.perf_counter()
        try:
            result = functions[0]()
            first_call.setdefault(name, time.perf_counter() - start)
            if name in entry.baseline_names:
                _meets_oracle(name, result, sets[0])
        except Exception as error:
            if name == "fused":
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            runnable[name] = functions
    return runnable


def on_backends(names, entry, case, count, skipped):
    """ "fused" on each of these backends, as "fused, NAME": functions on `count` sets of inputs of their own.

    They are held to the row's check, too. Notes in `skipped` why a backend does not run or is not right.
    """
    found = {}
    for name in names:
        try:
            with backend(name):
                made = [entry.make(case) for _ in range(count)]
                made[0].check()
        except Exception as error:
            skipped[f"fused, {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            found[f"fused, {name}"] = [_within(name, benchmark.variants["fused"]) for benchmark in made]
    return found


def _within(name, run):
    def call():
        with backend(name):
            return run()

    return call


def _meets_oracle(name, result, benchmark):
    """A registered baseline is held to the rule that ours is held to."""
    if benchmark.oracle is None:
        return
    calls.check_function(lambda *_: result, benchmark.oracle, benchmark.inputs, name)


def _timed(passes, entry, case, compile_modes, budget):
    benchmark = passes[0][0]
    before, skipped, first_call = _state(case.device), _missing(benchmark, entry, compile_modes), {}
    found, hot = [], {}
    for sets in passes:
        runnable = _runnable(sets, entry, compile_modes, skipped, first_call)
        if case.device == "cuda" and entry.kind == "ops":
            runnable |= on_backends(("cuda", "triton"), entry, case, len(sets), skipped)
        share = {
            "device": case.device, "budget": budget / len(passes), "min_rounds": -(-MIN_ROUNDS // len(passes)),
            "skipped": skipped, "graphs": not benchmark.own_graphs,
        }  # fmt: skip
        found.append(time_variants(runnable, **share))
        if case.device == "cuda" and len(sets) > 1:
            hot = time_variants({name: functions[:1] for name, functions in runnable.items()}, **share)
    timings = {
        name: functools.reduce(operator.add, [timed[name] for timed in found]).times(benchmark.repeats.get(name, 1))
        for name in found[0]
        if all(name in timed for timed in found)
    }
    first_call.pop("fused", None)  # its check has run it before
    row = {
        "variants": {name: timing.summary() for name, timing in timings.items()},
        "samples": len(timings["fused"].samples), "sets": len(passes[0]), "ratios": _ratios(timings),
        "goals": [_judge(goal, timings, benchmark.elements) for goal in benchmark.goals if _can_judge(goal, timings)],
        "skipped": skipped, "first_call": first_call,
        "unchecked": [] if benchmark.oracle else [name for name in entry.baseline_names if name in timings],
    }  # fmt: skip
    if repeats := {name: count for name, count in benchmark.repeats.items() if count > 1 and name in timings}:
        row["repeats"] = repeats
    if benchmark.published:
        row["published"] = [_published(curve) for curve in benchmark.published]
    if hot:
        hot = {name: timing.times(benchmark.repeats.get(name, 1)) for name, timing in hot.items()}
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


def _published(curve):
    sizes = {str(size): float(value) for size, value in curve.speedups.items()}
    return {"label": curve.label, "axis": curve.axis, "over": curve.over, "speedups": sizes}


def _can_judge(goal, timings):
    return goal.over in timings and (not goal.under or goal.under in timings)


def _judge(goal, timings, elements):
    if goal.quantity == "ratio":
        value = ratio(timings[goal.over], timings[goal.under])[0]
    elif goal.quantity == "wall":
        value = ratio(timings[goal.over].on_the_wall(), timings[goal.under].on_the_wall())[0]
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
        footprint = cost.bytes * row["sets"] if row["sets"] > 1 else None  # cold
        floor, name = ceilings.floor(cost, case.dtype, footprint=footprint)
        found["ceiling"] = {"name": name, "seconds": floor, "percent": 100 * floor / seconds}
    return found
