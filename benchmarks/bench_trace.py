"""How long it takes to read a scheduler of diffusers into a table, verification included."""

from functools import partial

from genengine.benchmarks.bench_diffusers import scheduler_class
from genengine.benchmarks.registry import Benchmark, Goal, register
from genengine.trace import trace

STEPS = 50
SCHEDULERS = ("DDPM", "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep", "LMSDiscrete")


def build(name, case):
    """Shape: the number of steps."""
    (steps,) = case.shape
    cls = scheduler_class(name, case)
    read = lambda: trace(cls(), steps)  # noqa: E731
    half_a_second = Goal("ns", "fused", "", 0.5e9 / STEPS, False)
    return Benchmark({"fused": read}, read, elements=steps, goals=(half_a_second,))


for _name in SCHEDULERS:
    register(
        f"trace {_name}", shapes={"50 steps": (STEPS,)}, group="trace", kind="peers", axes={"steps": 0},
        quick=None if _name == "DPMSolverMultistep" else (),
    )(partial(build, _name))  # fmt: skip
