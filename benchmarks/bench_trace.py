"""How long it takes to read a scheduler of diffusers into a table, verification included."""

import functools
import sys

from genengine.benchmarks.harness import Benchmark, Goal
from genengine.trace import trace

STEPS = 50
SCHEDULERS = ("DDPM", "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep", "LMSDiscrete")
HALF_A_SECOND = Goal("ns", "fused", "", 0.5e9 / STEPS, False)


def benchmarks(device):
    try:
        import diffusers
    except ImportError as error:
        print(f"bench trace: skipped, {error}; pip install genengine[interop]", file=sys.stderr)
        return
    if device != "cpu":
        print("bench trace: skipped, it runs on the host", file=sys.stderr)
        return
    for name in SCHEDULERS:
        read = functools.partial(_read, getattr(diffusers, f"{name}Scheduler"))
        yield Benchmark(
            f"trace {name}", f"{STEPS} steps", "float64", {"fused": read}, read, STEPS, None, (HALF_A_SECOND,),
            name == "DPMSolverMultistep", device,
        )  # fmt: skip


def _read(cls):
    return trace(cls(), STEPS)
