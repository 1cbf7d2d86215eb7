"""How long it takes to read a scheduler of diffusers into a table, verification included.

The check runs the table through the sampler against the scheduler's own loop, on fresh tensors.
"""

from functools import partial

import torch

import genengine
from genengine.benchmarks.bench_diffusers import scheduler_class
from genengine.benchmarks.registry import Benchmark, Goal, register
from genengine.table import COLUMNS
from genengine.trace import trace

STEPS = 50
SCHEDULERS = ("DDPM", "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep", "LMSDiscrete")


def model(x, t):
    """An output that depends on x and t, of the size of noise."""
    return torch.tanh(x) + 1e-3 * t.view(-1, 1, 1, 1)


def scheduler_loop(scheduler, x):
    """diffusers' own loop, from x."""
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t.float().expand(len(x)))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def check(cls, table, steps):
    """The table's times are the scheduler's, and its samples too, with the same noise, within 1e-5 of the largest."""
    scheduler = cls()
    scheduler.set_timesteps(steps)
    times = torch.tensor(table.rows[:, 0, COLUMNS.index("t_model")], dtype=torch.float32)
    assert torch.equal(times, scheduler.timesteps.float()), f"model times {times.tolist()}"
    x = torch.randn(2, 3, 8, 8) * table.init_scale
    torch.manual_seed(0)
    expected = scheduler_loop(scheduler, x)
    torch.manual_seed(0)
    found = genengine.sample(model, table, x=x, noise=lambda row: torch.randn(x.shape))
    gap, largest = (found - expected).abs().max().item(), max(x.abs().max().item(), expected.abs().max().item())
    assert gap <= 1e-5 * largest, f"differs from the scheduler's loop by {gap}, of {largest}"


def build(name, case):
    """Shape: the number of steps."""
    (steps,) = case.shape
    cls = scheduler_class(name, case)
    read = lambda: trace(cls(), steps)  # noqa: E731
    half_a_second = Goal("ns", "fused", "", 0.5e9 / STEPS, False)
    return Benchmark({"fused": read}, lambda: check(cls, read(), steps), elements=steps, goals=(half_a_second,))


for _name in SCHEDULERS:
    register(
        f"trace {_name}", shapes={"50 steps": (STEPS,)}, group="trace", kind="peers", axes={"steps": 0},
        quick=None if _name == "DPMSolverMultistep" else (),
    )(partial(build, _name))  # fmt: skip
