"""The sampling loop's own cost per step, beside the model: tiny tensors, guidance, a model that does nothing."""

import torch

import genengine
from genengine import paths, schedules, solvers
from genengine.benchmarks.harness import Benchmark, Goal

STEPS = 1000


def benchmarks(device):
    shape = (2, 1, 4, 4)
    y = torch.zeros(2, device=device)
    output = torch.zeros(4, 1, 4, 4, device=device)
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(STEPS), prediction="velocity", guidance_scale=2.0)
    setup = solvers.euler(paths.RectifiedFlow(), schedules.uniform(1), prediction="velocity", guidance_scale=2.0)

    def run(table):
        return genengine.sample(
            lambda x, t, y: output, table, shape, cond={"y": y}, uncond={"y": y}, seed=0, device=device
        )

    def eager():
        """The loop as people write it, with the same model."""
        x = torch.randn(shape, device=device)
        grid = torch.linspace(1, 0, STEPS + 1, device=device)
        for i in range(STEPS):
            model_in, t = torch.cat([x, x]), grid[i].expand(4)
            u, c = output.chunk(2)
            x = x + (grid[i + 1] - grid[i]) * (u + 2.0 * (c - u))
        return x, model_in, t

    def check():
        assert torch.equal(run(table), genengine.ops.normal(shape, seed=0, device=device))

    yield Benchmark(
        "loop overhead per step", f"{shape}, {STEPS} steps", "float32",
        {"fused": lambda: run(table), "setup alone": lambda: run(setup), "eager, as written": eager},
        check, STEPS, None, (Goal("ns", "fused", "", 10_000, False),), device=device,
    )  # fmt: skip
