"""guidance_moments against eager sums, as CFG rescale needs them (two standard deviations), and torch.compile.

One pass reads both branches; eager reads them for every standard deviation, and writes the guided output in between.
"""

import torch

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import guidance_moments
from genengine.ops.guidance_moments import reference

SHAPES = ((16, 4, 64, 64), (64, 4, 256, 256))
GUIDANCE = 4.0


def eager(u, c):
    """The standard deviations of the conditional and of the guided output."""
    m = u + GUIDANCE * (c - u)
    dims = list(range(1, u.dim()))
    return c.std(dims), m.std(dims)


def benchmarks(device):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            output = torch.randn(2 * shape[0], *shape[1:], device=device).to(dtype)
            u, c = output.chunk(2)
            compiled = torch.compile(eager)

            def check(output=output, u=u, c=c):
                got, plain, oracle = guidance_moments(output), reference(u, c), reference(u.double(), c.double())
                allowed = testing.tolerance(plain, oracle) + torch.finfo(torch.float32).eps * oracle.abs().max().item()
                assert testing.error(got, oracle) <= allowed

            yield Benchmark(
                "moments of two branches", str(shape), str(dtype).removeprefix("torch."),
                {
                    "fused": lambda output=output: guidance_moments(output), "eager": lambda u=u, c=c: eager(u, c),
                    "torch.compile": lambda u=u, c=c, compiled=compiled: compiled(u, c),
                },
                check, u.numel(), 2 * u.element_size() * u.numel(), (faster("eager", 2.0),), device=device,
            )  # fmt: skip
