"""geglu and swiglu over one packed projection, forward and backward, against eager as written and torch.compile."""

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import geglu, swiglu

SHAPE = (4096, 2 * 1536)
KINDS = {"geglu": (geglu, F.gelu), "swiglu": (swiglu, F.silu)}


def benchmarks(device):
    for dtype in (torch.bfloat16, torch.float32):
        for name in KINDS:
            yield benchmark(name, dtype, False, device)
    yield benchmark("geglu", torch.float32, True, device)


def benchmark(name, dtype, backward, device):
    fused, act = KINDS[name]
    x = torch.randn(SHAPE, device=device).to(dtype)
    grad = torch.randn(SHAPE[0], SHAPE[1] // 2, device=device).to(dtype)

    def eager(x):
        gate, value = x.chunk(2, -1)
        return act(gate) * value

    def both(function, x=x, grad=grad):
        if not backward:
            return (function(x),)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = function(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, grad)

    def check():
        oracle = both(eager, x.double(), grad.double())
        for got, plain, exact in zip(both(fused), both(eager), oracle, strict=True):
            testing.assert_as_good_as_eager(got, plain, exact)

    compiled = torch.compile(eager)
    variants = {
        "fused": lambda: both(fused),
        "eager, as written": lambda: both(eager),
        "torch.compile": lambda: both(compiled),
    }
    n, size = grad.numel(), x.element_size()
    title = name + (", forward and backward" if backward else "")
    goals = (faster("eager, as written", 1.5),)
    moved = (8 if backward else 3) * n * size
    return Benchmark(
        title, str(SHAPE), str(dtype).removeprefix("torch."), variants, check, n, moved, goals, device=device
    )
