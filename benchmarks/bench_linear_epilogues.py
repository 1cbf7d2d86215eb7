"""Linear layers of DiT's blocks and what follows them: fc1 with bias and GELU, and the projections with a bias.

Shapes are (rows, D, features). "fused" is what the networks run; "fused, product then bias_gelu" and, on a GPU, "fused,
epilogue" are the two it chooses from (`nets.layers.GELU_EPILOGUE`). A projection is torch's own, bias included.
"""

import torch
import torch.nn.functional as F

from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.nets.layers import linear_gelu
from genengine.ops import bias_gelu
from genengine.ops._cost import Cost, traffic

HIDDEN = {"DiT-S/2": (512, 384, 1536), "DiT-XL/2": (512, 1152, 4608)}
WIDE_HIDDEN = {
    "DiT-S/2, B = 64": (32_768, 384, 1536), "DiT-B/2, B = 64": (32_768, 768, 3072),
    "DiT-XL/2, B = 8": (4096, 1152, 4608), "DiT-XL/2, B = 64": (32_768, 1152, 4608), "Flux": (4608, 3072, 12_288),
}  # fmt: skip
PROJECTIONS = {"DiT-XL/2, proj": (512, 1152, 1152), "DiT-XL/2, fc2": (512, 4608, 1152)}
WIDE_PROJECTIONS = {"DiT-XL/2, B = 64, proj": (32_768, 1152, 1152), "DiT-XL/2, B = 64, fc2": (32_768, 4608, 1152)}
COMMON = {"dtypes": ("bfloat16", "float32"), "group": "linear_epilogues", "axes": {"rows": 0}, "quick": ()}


def eager_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def eager_bias(x, weight, bias):
    return F.linear(x, weight) + bias


def product_then_bias_gelu(x, weight, bias):
    return bias_gelu(F.linear(x, weight), bias, approximate="tanh")


def epilogue(x, weight, bias):
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _layer(case):
    rows, dim, features = case.shape
    return case.randn(rows, dim), case.randn(features, dim) / dim**0.5, case.randn(features)


def _benchmark(fused, eager, others, inputs, goals=(), *, flops=1, exps=0):
    """flops, exps: per output, beside the product's."""
    (rows, dim), features = inputs[0].shape, len(inputs[1])
    outputs = rows * features
    moved = traffic(inputs) + outputs * inputs[0].element_size()
    functions = {"fused": fused, **others, "eager, as written": eager}
    return Benchmark(
        {name: lambda run=function: run(*inputs) for name, function in functions.items()},
        lambda: calls.check_function(fused, eager, inputs, "linear"), inputs=inputs, oracle=eager,
        compiles=(eager, inputs), cost=Cost(moved, outputs * (2 * dim + flops), outputs * exps), elements=outputs,
        goals=goals,
    )  # fmt: skip


@register("fc1 + GELU", shapes=HIDDEN, cuda_shapes=WIDE_HIDDEN, **COMMON)
def hidden(case):
    others = {"fused, product then bias_gelu": product_then_bias_gelu}
    goals = ()
    if torch.device(case.device).type == "cuda":
        others["fused, epilogue"] = epilogue
        goals = (faster("fused, product then bias_gelu", 1.0),) if case.dtype == torch.bfloat16 else ()
    return _benchmark(linear_gelu, eager_gelu, others, _layer(case), goals, flops=10, exps=1)


@register("projection + bias", shapes=PROJECTIONS, cuda_shapes=WIDE_PROJECTIONS, **COMMON)
def projection(case):
    return _benchmark(F.linear, eager_bias, {}, _layer(case))
