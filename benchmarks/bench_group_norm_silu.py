"""group_norm_silu at the feature maps of known U-Nets against copy_, eager as written and in place, and torch.compile.

The forward moves one read and one write per element where a group (C order) or a sample (channels_last) stays in the
cache between its two passes; the backward reads x and grad twice and writes once. add_group_norm_silu also reads a
residual branch and writes the sum; its backward reads that sum's gradient.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, register_baseline
from genengine.ops import add_group_norm_silu, group_norm_silu

GROUPS, EPS = 32, 1e-5
SHAPES = {
    "DDPM, 32 px": (8, 128, 32, 32), "DDPM, 16 px": (8, 256, 16, 16), "ADM, 64 px": (4, 192, 64, 64),
    "ADM, 8 px": (4, 768, 8, 8), "SD, 64 px": (2, 320, 64, 64), "SD, 32 px": (2, 640, 32, 32),
    "SD, 16 px": (2, 1280, 16, 16), "SD decoder, 256 px": (1, 256, 256, 256),
}  # fmt: skip
CUDA_SHAPES = {
    "DDPM, CIFAR-10": (64, 128, 32, 32), "SDXL, 128 px": (2, 320, 128, 128), "SD decoder, 512 px": (1, 128, 512, 512),
    "SDXL, 128 px, 16 images": (16, 320, 128, 128),
}  # fmt: skip
FORMATS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}


def eager(x, weight, bias, scale=None, shift=None):
    u = F.group_norm(x, GROUPS, weight, bias, EPS)
    return F.silu(u if scale is None else u * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def fused(x, weight, bias, scale=None, shift=None):
    return group_norm_silu(x, weight, bias, GROUPS, scale, shift, EPS)


def eager_add(x, branch, weight, bias):
    x = x + branch
    return x, eager(x, weight, bias)


def one_after_the_other(x, branch, weight, bias):
    x = x + branch
    return x, fused(x, weight, bias)


def fused_add(x, branch, weight, bias):
    return add_group_norm_silu(x, branch, weight, bias, GROUPS, eps=EPS)


class Work:
    """Inputs of one case and memory format; scale and shift are views into one table."""

    def __init__(self, case, memory_format, modulated):
        batch, channels = case.shape[:2]
        self.x, self.grad = (case.randn().contiguous(memory_format=memory_format) for _ in range(2))
        self.out = torch.empty_like(self.x)
        self.weight, self.bias = 1 + 0.1 * case.randn(channels), case.randn(channels)
        self.modulation = case.randn(batch, 2 * channels).chunk(2, dim=1) if modulated else ()
        self.inputs = (self.x, self.weight, self.bias, *self.modulation)
        self.channels_last = memory_format == torch.channels_last

    def copy(self):
        self.out.copy_(self.x)

    def in_place(self):
        u = F.group_norm(self.x, GROUPS, self.weight, self.bias, EPS)
        if self.modulation:
            scale, shift = (t[:, :, None, None] for t in self.modulation)
            if self.channels_last:
                torch.addcmul(shift, u, 1 + scale, out=u)
            else:  # rows that are broadcast along the innermost dimension make addcmul slower than two passes
                u.mul_(1 + scale).add_(shift)
        return F.silu(u, inplace=True)

    def arguments(self):
        """Of the dispatcher's op: x as (B, C, S), or (B, S, C) in channels_last."""
        rows = self.modulation or (None, None)
        return self._flat(self.x), self.weight, self.bias, *rows, GROUPS, EPS, True, self.channels_last

    def backward_arguments(self):
        _, mean, rstd = calls.kernel("group_norm_silu", self.x)(*self.arguments())
        x, *rows, groups, _, silu, channels_last = self.arguments()
        return self._flat(self.grad), x, *rows, mean, rstd, groups, silu, channels_last

    def _flat(self, tensor):
        return tensor.movedim(1, -1).flatten(1, 2) if self.channels_last else tensor.flatten(2)


def forward(memory_format, modulated, stated, case):
    work = Work(case, memory_format, modulated)
    variants = {
        "fused": lambda: fused(*work.inputs),
        "copy_": work.copy,
        "eager, as written": lambda: eager(*work.inputs),
        "eager, in place": work.in_place,
    }
    return Benchmark(
        variants, lambda: calls.check_function(fused, eager, work.inputs, "group_norm_silu"),
        inputs=work.inputs, oracle=eager,
        compiles=(eager, work.inputs), cost=calls.cost("group_norm_silu", *work.arguments()), elements=work.x.numel(),
        goals=GOALS[case.dtype] if stated and case.label == "DDPM, 32 px" else (),
    )  # fmt: skip


def backward(memory_format, modulated, case):
    work = Work(case, memory_format, modulated)
    leaves = calls.leaves(*work.inputs)
    variants = {
        "fused": calls.backward(fused, leaves, work.grad),
        "copy_": work.copy,
        "eager, autograd": calls.backward(eager, leaves, work.grad),
    }
    return Benchmark(
        variants, lambda: calls.check_both(fused, eager, leaves, work.grad, label="group_norm_silu"),
        cost=calls.cost("group_norm_silu_backward", *work.backward_arguments()), elements=work.x.numel(),
        goals=(faster("eager, autograd", 1.0),) * (case.label == "DDPM, 32 px" and not modulated),
    )  # fmt: skip


def add_forward(memory_format, case):
    """A residual sum and the norm of it: in one op, and one after the other."""
    work = Work(case, memory_format, False)
    inputs = (work.x, work.grad, work.weight, work.bias)  # the gradient's numbers serve as a branch
    branch, (x, *rest) = work._flat(work.grad), work.arguments()
    variants = {
        "fused": lambda: fused_add(*inputs),
        "add, then group_norm_silu": lambda: one_after_the_other(*inputs),
        "eager, as written": lambda: eager_add(*inputs),
    }
    return Benchmark(
        variants, lambda: calls.check_function(fused_add, eager_add, inputs, "add_group_norm_silu"), inputs=inputs,
        oracle=eager_add, compiles=(eager_add, inputs), elements=work.x.numel(),
        cost=calls.cost("add_group_norm_silu", x, branch, *rest),
    )  # fmt: skip


def add_both(memory_format, case):
    """Forward and backward in one call, with gradients of the sum and of its norm."""
    work = Work(case, memory_format, False)
    leaves, grads = calls.leaves(work.x, work.grad, work.weight, work.bias), (work.grad, work.grad)
    functions = {"fused": fused_add, "add, then group_norm_silu": one_after_the_other, "eager, as written": eager_add}
    runs = {name: calls.both(function, *grads) for name, function in functions.items()}
    return Benchmark(
        {name: lambda run=run: run(*leaves) for name, run in runs.items()},
        lambda: calls.check_both(fused_add, eager_add, leaves, *grads, label="add_group_norm_silu"),
        compiles=(runs["eager, as written"], leaves), elements=work.x.numel(),
    )  # fmt: skip


GOALS = {
    torch.float32: (faster("eager, as written", 3.5), faster("torch.compile", 5.0)),
    torch.bfloat16: (faster("eager, as written", 5.0), faster("torch.compile", 5.0)),
}
_common = {
    "shapes": SHAPES, "cuda_shapes": CUDA_SHAPES, "dtypes": ("float32", "bfloat16"), "group": "group_norm_silu",
    "axes": {"batch": 0, "height": 2},
}  # fmt: skip
for _layout, _format in FORMATS.items():
    for _modulated, _kind in ((False, ""), (True, ", AdaGN")):
        _stated = bool(_layout) and not _modulated  # the goals, and the quick row
        register(f"group_norm_silu{_kind}{_layout}", **_common, quick=None if _stated else ())(
            partial(forward, _format, _modulated, _stated)
        )
        register(f"group_norm_silu_backward{_kind}{_layout}", **_common, quick=())(
            partial(backward, _format, _modulated)
        )

    register(f"add_group_norm_silu{_layout}", **_common, quick=())(partial(add_forward, _format))
    register(f"add_group_norm_silu, forward and backward{_layout}", **_common, quick=())(partial(add_both, _format))


@register_baseline("group_norm_silu, channels_last", "apex", requires="apex")
def apex_group_norm(x, weight, bias):
    norm = _apex_norm(x.shape[1], x.dtype, x.device)
    norm.weight.data, norm.bias.data = weight, bias
    return norm(x)


@cache
def _apex_norm(channels, dtype, device):
    from apex.contrib.group_norm import GroupNorm

    return GroupNorm(GROUPS, channels, EPS, device=device, dtype=dtype, act="silu")


@register_baseline("group_norm_silu", "Liger, then silu", requires="liger_kernel")
def liger_group_norm(x, weight, bias):
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    return F.silu(LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], GROUPS, EPS), inplace=True)
