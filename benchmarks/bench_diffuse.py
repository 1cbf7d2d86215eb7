"""diffuse against eager: draw eps, noise the data, form the target. One read and two writes against many passes."""

import torch

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import diffuse

SHAPE = (64, 4, 64, 64)


def benchmarks(device):
    x0 = torch.randn(SHAPE, device=device)
    a, s, cx, ce = (torch.rand(SHAPE[0], device=device) for _ in range(4))
    column = lambda v: v[:, None, None, None]  # noqa: E731

    def eager():
        eps = torch.randn_like(x0)
        return column(a) * x0 + column(s) * eps, column(cx) * x0 + column(ce) * eps

    def check():
        run = lambda x: diffuse(x, a, s, cx, ce, seed=1, backend="reference")  # noqa: E731
        for got, plain, oracle in zip(diffuse(x0, a, s, cx, ce, seed=1), run(x0), run(x0.double()), strict=True):
            testing.assert_as_good_as_eager(got, plain, oracle)

    n = x0.numel()
    yield Benchmark(
        "diffuse", str(SHAPE), "float32",
        {"fused": lambda: diffuse(x0, a, s, cx, ce, seed=1), "eager, as written": eager},
        check, n, 12 * n, (faster("eager, as written", 3.0),), device=device,
    )  # fmt: skip
