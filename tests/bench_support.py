"""A clock that only moves when the work says so, and made-up rows."""

import torch

from genengine.benchmarks import registry
from genengine.benchmarks.ceilings import Ceilings
from genengine.benchmarks.registry import Benchmark, Case


class Clock:
    """Stands in for the module `time`: every call of `work(seconds)` takes exactly that long."""

    def __init__(self):
        self.now = 0.0

    def process_time(self):
        return self.now

    perf_counter = process_time

    def work(self, seconds):
        def run():
            self.now += seconds

        return run


RATES = {1 << 15: 4e10, 1 << 20: 2e10, 1 << 25: 1e10}
CEILINGS = Ceilings("cpu", RATES, {size: rate / 2 for size, rate in RATES.items()}, {"float32": 1e11}, 1e9, 1e-6)


def entry(make, name="made up", **options):
    """An entry that is in no registry's way: register, take it out again."""
    registry.register(name, **({"shapes": {"small": (4, 8)}} | options))(make)
    return registry.ENTRIES.pop(name)


def case(shape=(4, 8), dtype=torch.float32):
    return Case(shape, dtype, "cpu", "small")


def of_durations(clock, **seconds):
    """make(case) of variants that take these seconds."""
    return lambda case: Benchmark({name: clock.work(s) for name, s in seconds.items()}, lambda: None)


def row(name="adaln", ratio=3.0, width=0.02, **extra):
    """A timed row whose only baseline is eager, with a relative half width of its interval."""
    timing = {"min": 1e-3, "p20": 1e-3, "median": 1e-3, "p80": 1e-3, "wall": 1e-3, "clock": "process time"}
    interval = {"ratio": ratio, "low": ratio * (1 - width), "high": ratio * (1 + width)}
    work = {"name": name, "group": name, "kind": "ops", "label": "small", "shape": [4, 8], "dtype": "float32"}
    timed = {
        "device": "cpu", "variants": {"fused": timing, "eager": timing}, "samples": 9, "goals": [], "skipped": {},
        "accuracy": None, "ratios": {"eager": interval}, "first_call": {"eager": 0.1}, "sets": 1, "unchecked": [],
        "state": [{"load": 0.0}, {"load": 0.5}],
    }  # fmt: skip
    return work | timed | extra


def report(*rows, **extra):
    environment = {
        "device": "made-up CPU", "time": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab", "dirty": False,
        "torch": "2.13.0", "python": "3.11.7", "threads": 1,
    }  # fmt: skip
    return {
        "schema_version": 2, "suite": "quick", "options": {}, "environment": environment, "ceilings": None,
        "rows": list(rows),
    } | extra  # fmt: skip
