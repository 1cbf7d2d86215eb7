"""How long it takes to read a scheduler of diffusers into a table, verification included."""

import functools

from genengine.benchmarks.bench_diffusers import scheduler_classes
from genengine.benchmarks.harness import Benchmark, Goal
from genengine.trace import trace

STEPS = 50
SCHEDULERS = ("DDPM", "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep", "LMSDiscrete")
HALF_A_SECOND = Goal("ns", "fused", "", 0.5e9 / STEPS, False)


def benchmarks(device):
    for name, cls in scheduler_classes("trace", SCHEDULERS, device).items():
        read = functools.partial(_read, cls)
        yield Benchmark(
            f"trace {name}", f"{STEPS} steps", "float64", {"fused": read}, read, STEPS, None, (HALF_A_SECOND,),
            name == "DPMSolverMultistep", device,
        )  # fmt: skip


def _read(cls):
    return trace(cls(), STEPS)
