"""diffuse at the latents of known models against eager and torch.compile: draw eps, noise the data, form the target.

One read and two writes against many passes. Eager draws its own noise, so results are not compared with it.
"""

from functools import partial

import torch

from genengine import testing
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import diffuse
from genengine.ops._cost import Cost, traffic

SHAPES = {
    "SD": (64, *calls.SD), "SDXL": (16, *calls.SDXL), "SD3, Flux": (16, *calls.SD3), "CogVideoX-5B": (2, *calls.VIDEO),
}  # fmt: skip
COMMON = {"shapes": SHAPES, "dtypes": ("float32", "bfloat16"), "group": "diffuse", "axes": {"batch": 0, "channels": 1}}
COMMON |= {"cuda_shapes": calls.MANY}


def eager(x0, alpha, sigma, c_x0, c_eps):
    a, s, cx, ce = (v.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1)) for v in (alpha, sigma, c_x0, c_eps))
    eps = torch.randn_like(x0)
    return a * x0 + s * eps, cx * x0 + ce * eps


def preallocated(x0, alpha, sigma, c_x0, c_eps, eps, x_t, target):
    """A draw and four passes, nothing of x0's size allocated."""
    a, s, cx, ce = (v.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1)) for v in (alpha, sigma, c_x0, c_eps))
    torch.randn(x0.shape, out=eps)
    torch.mul(x0, a, out=x_t).addcmul_(eps, s)
    torch.mul(x0, cx, out=target).addcmul_(eps, ce)
    return x_t, target


class Work:
    def __init__(self, case):
        self.x0, self.grad_x_t, self.grad_target = (case.randn() for _ in range(3))
        self.buffers = tuple(torch.empty_like(self.x0) for _ in range(3))
        self.coefficients = tuple(torch.rand(case.shape[0], device=case.device) for _ in range(4))
        self.inputs = (self.x0, *self.coefficients)
        self.arguments = (*self.inputs, torch.tensor(1, device=case.device), None, 0, None)

    def fused(self, x0, *coefficients):
        return diffuse(x0, *coefficients, seed=self.arguments[5])

    def check(self):
        """What is timed against the reference in float64, with the same noise."""
        reference = partial(diffuse, seed=self.arguments[5], backend="reference")
        calls.check_function(self.fused, reference, self.inputs, "diffuse")

    def cost(self):
        return calls.cost("diffuse", *self.arguments)


@register("diffuse", **COMMON, gate=True)
def forward(case):
    work = Work(case)
    variants = {
        "fused": lambda: work.fused(*work.inputs),
        "eager, as written": lambda: eager(*work.inputs),
        "eager, preallocated": lambda: preallocated(*work.inputs, *work.buffers),
    }
    return Benchmark(
        variants, work.check, inputs=work.inputs, compiles=(eager, work.inputs), cost=work.cost(),
        elements=work.x0.numel(), goals=(faster("eager, as written", 3.0),) * _stated(case),
    )  # fmt: skip


@register("diffuse, forward and backward", **COMMON, quick=())
def forward_and_backward(case):
    """Where the data are an encoder's latents and train it, too; the backward is dx0 = alpha dx_t + c_x0 dtarget."""
    work = Work(case)
    x0, grads = calls.leaves(work.x0), (work.grad_x_t, work.grad_target)
    fused, plain = (
        calls.both(lambda x, f=function: f(x, *work.coefficients), *grads) for function in (work.fused, eager)
    )

    def check():
        work.check()
        alpha, _, c_x0, _ = (c.view(-1, *[1] * (work.x0.dim() - 1)) for c in work.coefficients)
        exact = alpha.double() * work.grad_x_t.double() + c_x0.double() * work.grad_target.double()
        rounded = (alpha * work.grad_x_t).to(work.x0.dtype) + (c_x0 * work.grad_target).to(work.x0.dtype)
        testing.assert_as_good_as_eager(fused(*x0)[2], rounded, exact, "d x0")

    grad_cost = Cost(traffic(*grads, work.x0), 3 * work.x0.numel())
    return Benchmark(
        {"fused": lambda: fused(*x0), "eager, as written": lambda: plain(*x0)}, check, compiles=(plain, x0),
        cost=work.cost() + grad_cost, elements=work.x0.numel(),
    )  # fmt: skip


def _stated(case):
    """Whether the goals were stated for this case."""
    return case.label == "SD" and case.dtype == torch.float32
