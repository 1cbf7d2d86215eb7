"""adaln and gated_adaln at the token shapes of DiT, SD3, Flux and a video model, forward and backward.

Against copy_, eager as written and in place, torch.compile, and autograd through eager.
"""

from functools import partial

import torch
import torch.nn.functional as F

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, within

SHAPES = {
    "DiT-XL/2": (16, 256, 1152), "DiT-S/2": (16, 256, 384), "DiT-B/2": (16, 256, 768), "DiT-L/2": (16, 256, 1024),
    "SD3": (2, 4096, 1536), "Flux": (1, 4608, 3072),
}  # fmt: skip
CUDA_SHAPES = {"CogVideoX-5B": (2, 17_776, 3072)}
DTYPES, AXES, EPS = ("float32", "bfloat16"), {"batch": 0, "tokens": 1}, 1e-6


def eager_adaln(x, scale, shift, eps=EPS):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def eager_gated_adaln(x, branch, gate, scale, shift, eps=EPS):
    x = x + gate[:, None] * branch
    return x, eager_adaln(x, scale, shift, eps)


EAGER = {"adaln": eager_adaln, "gated_adaln": eager_gated_adaln}


class Work:
    """Inputs and preallocated outputs of one case; the modulations are views into one table."""

    def __init__(self, case):
        batch, _, dim = case.shape
        self.x, self.branch, self.grad_x, self.grad_h = (case.randn() for _ in range(4))
        self.gate, self.scale, self.shift = case.randn(batch, 6 * dim).chunk(6, dim=1)[:3]
        self.out = torch.empty_like(self.x)
        x_out = torch.addcmul(self.x, self.gate[:, None], self.branch)
        self.args = {
            "adaln": (self.x, self.scale, self.shift),
            "gated_adaln": (self.x, self.branch, self.gate, self.scale, self.shift),
            "adaln_backward": (self.grad_h, self.x, self.scale),
            "gated_adaln_backward": (self.grad_x, self.grad_h, x_out, self.branch, self.gate, self.scale),
        }

    def fused(self, name):
        kernel = calls.kernel(name, self.x)
        return lambda: kernel(*self.args[name], EPS)

    def copy(self):
        self.out.copy_(self.x)

    def in_place(self, name):
        """x' preallocated, the modulation in place in one pass: the fewest passes that eager takes."""
        x = self.x
        if name == "gated_adaln":
            x = torch.addcmul(self.x, self.gate[:, None], self.branch, out=self.out)
        h = F.layer_norm(x, x.shape[-1:], eps=EPS)
        torch.addcmul(self.shift[:, None], h, 1 + self.scale[:, None], out=h)
        return h if name == "adaln" else (x, h)

    def eager_backward(self, name):
        """autograd through eager as written, its forward outside the timing."""
        grads = (self.grad_x, self.grad_h) if name == "gated_adaln" else (self.grad_h,)
        return calls.backward(EAGER[name], calls.leaves(*self.args[name]), *grads)


GOALS = {
    ("adaln", torch.float32): (within(1.5, "copy_"),),
    ("adaln", torch.bfloat16): (within(2.5, "copy_"),),
    ("gated_adaln", torch.float32): (faster("eager, as written", 2.7), faster("torch.compile", 1.5)),
    ("gated_adaln", torch.bfloat16): (faster("eager, as written", 2.3), faster("torch.compile", 1.5)),
}


def forward(name, case):
    work = Work(case)
    variants = {
        "fused": work.fused(name),
        "copy_": work.copy,
        "eager, as written": lambda: EAGER[name](*work.args[name]),
        "eager, in place": lambda: work.in_place(name),
    }
    return Benchmark(
        variants, lambda: calls.check(name, *work.args[name], EPS), inputs=work.args[name], oracle=EAGER[name],
        compiles=(EAGER[name], work.args[name]), cost=calls.cost(name, *work.args[name], EPS), elements=work.x.numel(),
        goals=GOALS[name, case.dtype] if case.label == "DiT-XL/2" else (),
    )  # fmt: skip


def backward(name, case):
    work, op = Work(case), f"{name}_backward"
    variants = {"fused": work.fused(op), "copy_": work.copy, "eager, autograd": work.eager_backward(name)}
    return Benchmark(
        variants, lambda: calls.check(op, *work.args[op], EPS), cost=calls.cost(op, *work.args[op], EPS),
        elements=work.x.numel(), goals=(faster("eager, autograd", 1.0),),
    )  # fmt: skip


for _name in EAGER:
    _common = {"shapes": SHAPES, "cuda_shapes": CUDA_SHAPES, "dtypes": DTYPES, "group": "adaln", "axes": AXES}
    register(_name, **_common)(partial(forward, _name))
    register(f"{_name}_backward", **_common, quick=())(partial(backward, _name))
