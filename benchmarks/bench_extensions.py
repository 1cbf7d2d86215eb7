"""A sampling step with an extension against the loop as people write it, and compiled step by step by torch.compile.

The model costs nothing (its output is there already), so that what is timed is the loop: guidance, the extension, the
update, and the next input of both branches.
"""

from functools import partial

import torch

import genengine
from genengine import extensions, paths, schedules, solvers
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import normal

STEPS, GUIDANCE, PATH = 10, 4.0, paths.VPLinear()
GRID = schedules.uniform(STEPS, t_max=0.99, t_min=0.01)
DIMS = (1, 2, 3)


def rescaled(m, c, x0, phi=0.7):
    factor = c.std(DIMS, keepdim=True) / m.std(DIMS, keepdim=True)
    return phi * m * factor + (1 - phi) * m, x0


def thresholded(m, c, x0, quantile=0.995):
    r = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1.0).reshape(-1, 1, 1, 1)
    return m, torch.maximum(torch.minimum(x0, r), -r) / r


class Work:
    """One extension: our run, and the loop by hand with its formula; a DDIM step on eps."""

    def __init__(self, case, extension, clip):
        self.shape, self.device, self.extension = case.shape, case.device, extension
        self.output = case.randn(2 * case.shape[0], *case.shape[1:])
        self.table = solvers.ddim(PATH, GRID, prediction="eps", clip=clip)
        self.y = torch.zeros(case.shape[0], device=case.device)

    def fused(self):
        return genengine.sample(
            lambda x, t, y: self.output, self.table, self.shape, cond={"y": self.y}, uncond={"y": self.y},
            guidance=GUIDANCE, seed=0, device=self.device, extensions=(self.extension,),
        )  # fmt: skip

    def by_hand(self, step):
        def run():
            x = normal(self.shape, seed=0, device=self.device)
            for t, t_next in zip(GRID[:-1], GRID[1:], strict=True):
                coefficients = (*PATH.coefficients(t)[:2], *PATH.coefficients(t_next)[:2])
                x, model_in = step(x, *self.output.chunk(2), *(torch.tensor(c, dtype=x.dtype) for c in coefficients))
            return x, model_in

        return run

    def check(self, run):
        expected = run()[0]
        assert (self.fused() - expected).abs().max() < 1e-4 * expected.abs().max()


def eager_step(modify, clipped):
    """x' and the model's next input, of x, both outputs and alpha, sigma at either end of the step."""

    def step(x, u, c, alpha, sigma, alpha_next, sigma_next):
        m = u + GUIDANCE * (c - u)
        if not clipped:
            m, _ = modify(m, c, None)
        x0 = (x - sigma * m) / alpha
        if clipped:
            _, x0 = modify(m, c, x0)
            m = (x - alpha * x0) / sigma
        x = alpha_next * x0 + sigma_next * m
        return x, torch.cat([x, x])

    return step


def build(extension, modify, clip, case):
    work, step = Work(case, extension, clip), eager_step(modify, clip is not None)
    eager, compiled = work.by_hand(step), work.by_hand(torch.compile(step))
    return Benchmark(
        {"fused": work.fused, "eager": eager, "torch.compile": compiled}, lambda: work.check(eager),
        elements=STEPS * work.output.numel() // 2, goals=(faster("eager", 3.0), faster("torch.compile", 1.0)),
    )  # fmt: skip


for _name, _extension, _modify, _clip in (
    ("rescaled guidance", extensions.Rescale(0.7), rescaled, None),
    ("dynamic threshold", extensions.DynamicThreshold(0.995), thresholded, 1.0),
):
    register(
        f"{_name}, {STEPS} steps", shapes={"SD": (16, 4, 64, 64)}, group="extensions", kind="samplers", quick=(),
        axes={"batch": 0},
    )(partial(build, _extension, _modify, _clip))  # fmt: skip
