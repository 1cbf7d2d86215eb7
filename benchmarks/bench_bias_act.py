"""bias_gelu in the MLPs of transformers and bias_act in a GAN's layers, against eager and torch.compile.

Forward: one read, one write. The MLP's shape is (tokens, hidden width), the GAN's (B, C, H, W).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.ops import bias_act, bias_gelu

MLPS = {
    "DiT-S/2": (4096, 1536), "DiT-B/2": (4096, 3072), "DiT-L/2": (4096, 4096), "DiT-XL/2": (4096, 4608),
    "SD3": (8192, 6144),
}  # fmt: skip
WIDE_MLPS = {"Flux": (4608, 12_288), "CogVideoX-5B": (35_552, 12_288)}
IMAGES = {
    "GAN, 64 px": (16, 128, 64, 64),
    "StyleGAN2, 64 px": (4, 512, 64, 64),
    "StyleGAN2, 256 px": (4, 128, 256, 256),
}
GAIN, SLOPE = math.sqrt(2), 0.2


def eager_gelu(x, bias, approximate):
    return F.gelu(x + bias, approximate=approximate)


def eager_lrelu(x, bias):
    return F.leaky_relu(x + bias[:, None, None], SLOPE) * GAIN


def fused_lrelu(x, bias):
    return bias_act(x, bias, activation="lrelu", alpha=SLOPE, gain=GAIN)


class Work:
    """x and its bias, the last dimension's or the channels', and the op's arguments: x as (outer, C, inner)."""

    def __init__(self, case, activation, dim, gain):
        self.x, self.grad, self.bias = case.randn(), case.randn(), case.randn(case.shape[dim])
        self.inputs, self.scratch = (self.x, self.bias), torch.empty_like(self.x)
        outer, inner = math.prod(case.shape[:dim]), math.prod(case.shape[dim:][1:])
        flat = [t.view(outer, case.shape[dim], inner) for t in (self.x, self.grad)]
        self.forward = (flat[0], self.bias, activation, SLOPE, gain, None)
        self.backward = (flat[1], *self.forward)

    def copy(self):
        self.scratch.copy_(self.x)


def forward(fused, eager, activation, dim, gain, stated, case):
    work = Work(case, activation, dim, gain)
    variants = {
        "fused": lambda: fused(*work.inputs),
        "copy_": work.copy,
        "eager, as written": lambda: eager(*work.inputs),
        "eager, in place": lambda: in_place(work, activation),
    }
    return Benchmark(
        variants, lambda: calls.check_function(fused, eager, work.inputs, "bias_act"), inputs=work.inputs, oracle=eager,
        compiles=(eager, work.inputs), cost=calls.cost("bias_act", *work.forward), elements=work.x.numel(),
        goals=_goals(stated, case),
    )  # fmt: skip


def in_place(work, activation):
    """The bias into preallocated memory, the activation in place."""
    if activation == "lrelu":
        torch.add(work.x, work.bias[:, None, None], out=work.scratch)
        return F.leaky_relu_(work.scratch, SLOPE).mul_(GAIN)
    torch.add(work.x, work.bias, out=work.scratch)
    return torch.ops.aten.gelu_(work.scratch, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward_and_backward(fused, eager, activation, dim, gain, stated, case):
    """With the gradients of x and bias, in one call."""
    work = Work(case, activation, dim, gain)
    leaves, ours, plain = calls.leaves(*work.inputs), calls.both(fused, work.grad), calls.both(eager, work.grad)
    return Benchmark(
        {"fused": lambda: ours(*leaves), "copy_": work.copy, "eager, as written": lambda: plain(*leaves)},
        lambda: calls.check_both(fused, eager, leaves, work.grad, label="bias_act"), compiles=(plain, leaves),
        cost=calls.cost("bias_act", *work.forward) + calls.cost("bias_act_backward", *work.backward),
        elements=work.x.numel(), goals=_goals(stated, case),
    )  # fmt: skip


def _goals(stated, case):
    """Of a goal (label, dtype, factor over eager), where it was stated for this case."""
    return (faster("eager, as written", stated[2]),) if stated and (case.label, case.dtype) == stated[:2] else ()


for _kind, _activation in (("none", "gelu"), ("tanh", "gelu_tanh")):
    _work = (
        partial(bias_gelu, approximate=_kind), partial(eager_gelu, approximate=_kind), _activation, -1, 1.0,
    )  # fmt: skip
    _stated = ("DiT-S/2", torch.bfloat16, 2.0) if _kind == "none" else None
    _common = {"dtypes": ("bfloat16", "float32"), "group": "bias_act", "axes": {"tokens": 0, "width": 1}}
    register(f"bias_gelu, {_kind}", shapes=MLPS, cuda_shapes=WIDE_MLPS, **_common, gate=_kind == "tanh")(
        partial(forward, *_work, _stated)
    )
    register(f"bias_gelu, {_kind}, forward and backward", shapes=MLPS, cuda_shapes=WIDE_MLPS, **_common, quick=())(
        partial(forward_and_backward, *_work, None)
    )

_work = (fused_lrelu, eager_lrelu, "lrelu", 1, GAIN)
_common = {"dtypes": ("float32", "bfloat16"), "group": "bias_act", "axes": {"batch": 0, "channels": 1}}
register("bias_act, lrelu", shapes=IMAGES, **_common, quick=())(partial(forward, *_work, None))
register("bias_act, lrelu, forward and backward", shapes=IMAGES, **_common)(
    partial(forward_and_backward, *_work, ("GAN, 64 px", torch.float32, 2.5))
)
