"""geglu and swiglu over one packed projection (tokens, gate and value), forward and backward, against eager and peers.

Two reads and one write per element of the result. "eager, preallocated" writes the activation into its output and
multiplies there. Liger's GEGLU is the tanh form, so it stands in that row.
"""

from functools import partial

import torch
import torch.nn.functional as F

from genengine import ops
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, register_baseline

SHAPES = {
    "DiT-S/2": (4096, 2 * 1536), "SD": (8192, 2 * 1280), "SDXL": (2048, 2 * 5120), "Llama 8B": (1024, 2 * 14_336),
    "SD3": (4096, 2 * 6144),
}  # fmt: skip
CUDA_SHAPES = {"Llama 8B": (8192, 2 * 14_336), "Flux": (4608, 2 * 12_288), "CogVideoX-5B": (17_776, 2 * 12_288)}
KINDS = {  # row -> the op, its activation, the name that the dispatcher takes
    "geglu": (ops.geglu, F.gelu, "gelu"),
    "geglu, tanh": (partial(ops.geglu, approximate="tanh"), partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "swiglu": (ops.swiglu, F.silu, "silu"),
}


def eager(x, act):
    gate, value = x.chunk(2, -1)
    return act(gate) * value


def preallocated(x, activation, out):
    """Two passes, nothing allocated."""
    gate, value = x.chunk(2, -1)
    if activation == "silu":
        return torch.ops.aten.silu.out(gate, out=out).mul_(value)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu.out(gate, approximate=approximate, out=out).mul_(value)


def forward(name, case):
    (fused, act, activation), x = KINDS[name], case.randn()
    plain, arguments = partial(eager, act=act), (x[None], None, activation, True)
    out = x.new_empty(case.shape[0], case.shape[1] // 2)
    variants = {
        "fused": lambda: fused(x),
        "eager, as written": lambda: plain(x),
        "eager, preallocated": lambda: preallocated(x, activation, out),
    }
    return Benchmark(
        variants, lambda: calls.check_function(fused, plain, (x,), name),
        inputs=(x,), oracle=plain, compiles=(plain, (x,)), cost=calls.cost("glu", *arguments),
        elements=x.numel() // 2, goals=_goals(case) if name != "geglu, tanh" else (),
    )  # fmt: skip


def forward_and_backward(name, case):
    (fused, act, activation), x = KINDS[name], case.randn()
    grad, leaves, written = case.randn(case.shape[0], case.shape[1] // 2), calls.leaves(x), partial(eager, act=act)
    ours, plain, arguments = calls.both(fused, grad), calls.both(written, grad), (x[None], None, activation, True)
    return Benchmark(
        {"fused": lambda: ours(*leaves), "eager, as written": lambda: plain(*leaves)},
        lambda: calls.check_both(fused, written, leaves, grad, label=name), compiles=(plain, leaves),
        cost=calls.cost("glu", *arguments) + calls.cost("glu_backward", grad[None], *arguments), elements=grad.numel(),
        goals=_goals(case) if name == "geglu" and case.dtype == torch.float32 else (),
    )  # fmt: skip


def _goals(case):
    return (faster("eager, as written", 1.5),) * (case.label == "DiT-S/2")


for _name in KINDS:
    _common = {"shapes": SHAPES, "cuda_shapes": CUDA_SHAPES, "group": "glu", "axes": {"tokens": 0, "width": 1}}
    _quick = {} if _name == "geglu" else {"quick": ()}
    register(_name, **_common, **_quick, dtypes=("bfloat16", "float32"))(partial(forward, _name))
    register(f"{_name}, forward and backward", **_common, quick=(), dtypes=("float32", "bfloat16"))(
        partial(forward_and_backward, _name)
    )


@register_baseline("geglu, tanh", "Liger", requires="liger_kernel")
def liger_geglu(x):
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(*x.chunk(2, -1))


@register_baseline("swiglu", "Liger", requires="liger_kernel")
def liger_swiglu(x):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(*x.chunk(2, -1))


@register_baseline("swiglu", "Liger, packed", requires="liger_kernel")
def liger_packed_swiglu(x):
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(x)
