"""bias_gelu at a DiT MLP's shape and bias_act at a GAN's, against eager as written, in place, and torch.compile."""

import math

import torch
import torch.nn.functional as F

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster
from genengine.ops import bias_act, bias_gelu

TOKENS, IMAGES = (4096, 1536), (16, 128, 64, 64)
GAIN = math.sqrt(2)


def benchmarks(device):
    for dtype, approximate in (
        (torch.bfloat16, "none"),
        (torch.bfloat16, "tanh"),
        (torch.float32, "none"),
        (torch.float32, "tanh"),
    ):
        yield gelu(dtype, approximate, device)
    for dtype, backward in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        yield lrelu(dtype, backward, device)


def gelu(dtype, approximate, device):
    x, bias = (torch.randn(*shape, device=device).to(dtype) for shape in (TOKENS, TOKENS[1:]))
    eager = lambda x, bias: F.gelu(x + bias, approximate=approximate)  # noqa: E731
    compiled, scratch = torch.compile(eager), torch.empty_like(x)
    variants = {
        "fused": lambda: bias_gelu(x, bias, approximate=approximate),
        "copy_": lambda: scratch.copy_(x),
        "eager, as written": lambda: eager(x, bias),
        "eager, in place": lambda: F.gelu(torch.add(x, bias, out=scratch), approximate=approximate),
        "torch.compile": lambda: compiled(x, bias),
    }

    def check():
        oracle = bias_gelu(x.double(), bias.double(), approximate=approximate)
        testing.assert_as_good_as_eager(variants["fused"](), eager(x, bias), oracle)

    goals = (faster("eager, as written", 2.0),) if dtype == torch.bfloat16 and approximate == "none" else ()
    label = str(dtype).removeprefix("torch.")
    moved = 2 * x.numel() * x.element_size()
    return Benchmark(
        f"bias_gelu, {approximate}", str(TOKENS), label, variants, check, x.numel(), moved, goals, device=device
    )


def lrelu(dtype, backward, device):
    """Forward alone, or with the gradients of x and bias, in one call."""
    x, bias, grad = (torch.randn(*shape, device=device).to(dtype) for shape in (IMAGES, IMAGES[1:2], IMAGES))

    def eager(x, bias):
        return F.leaky_relu(x + bias[:, None, None], 0.2) * GAIN

    def fused(x, bias):
        return bias_act(x, bias, activation="lrelu", gain=GAIN)

    def both(function, x=x, bias=bias, grad=grad):
        if not backward:
            return (function(x, bias),)
        leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
        with torch.enable_grad():
            y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    def check():
        wide = [t.double() for t in (x, bias, grad)]
        oracle = both(eager, *wide)
        for got, plain, exact in zip(both(fused), both(eager), oracle, strict=True):
            testing.assert_as_good_as_eager(got, plain, exact)

    compiled, scratch = torch.compile(eager), torch.empty_like(x)
    variants = {
        "fused": lambda: both(fused),
        "copy_": lambda: scratch.copy_(x),
        "eager, as written": lambda: both(eager),
        "torch.compile": lambda: both(compiled),
    }
    goals = (faster("eager, as written", 2.5),) if backward and dtype == torch.float32 else ()
    name = "bias_act, lrelu" + (", forward and backward" if backward else "")
    label, moved = str(dtype).removeprefix("torch."), (5 if backward else 2) * x.numel() * x.element_size()
    return Benchmark(name, str(IMAGES), label, variants, check, x.numel(), moved, goals, device=device)
