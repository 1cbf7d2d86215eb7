"""ema_update over all weights of a DiT against torch's foreach lerp and the loop users write; two reads, one write.

Averages are float32; the dtype of a row is the weights'. Its shape is (blocks, width).
"""

import torch

from genengine import testing
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, within
from genengine.nets.dit import DiT, DiTConfig
from genengine.ops import _registry, ema_update

DECAY, CHECKED = 0.999, 20


def weights(case):
    depth, dim = case.shape
    config = DiTConfig(image_size=32, patch_size=2, in_channels=4, dim=dim, depth=depth, num_heads=1, num_classes=1000)
    with torch.device("meta"):  # shapes alone
        return [case.randn(*p.shape) for p in DiT(config).parameters()]


def eager(averages, values):
    for average, value in zip(averages, values, strict=True):
        average.mul_(DECAY).add_(value, alpha=1 - DECAY)
    return averages


@register(
    "ema_update", shapes={"DiT-S/2": (12, 384), "DiT-B/2": (12, 768)},
    cuda_shapes={"DiT-L/2": (24, 1024), "DiT-XL/2": (28, 1152)}, dtypes=("float32", "bfloat16"),
    axes={"depth": 0, "width": 1},
)  # fmt: skip
def make(case):
    values = weights(case)
    averages = [case.randn(*value.shape, dtype=torch.float32) for value in values]

    def check():
        reference, some = _registry.OPS["ema_update"].overloads["reference"], values[:CHECKED]
        ours, plain, exact = ([a.to(dtype, copy=True) for a in averages[:CHECKED]] for dtype in _DTYPES)
        ema_update(ours, some, DECAY)
        reference(plain, some, 1 - DECAY)
        reference(exact, [value.double() for value in some], 1 - DECAY)
        for got, rounded, oracle in zip(ours, plain, exact, strict=True):
            testing.assert_as_good_as_eager(got, rounded, oracle, "ema_update")

    def fused():
        ema_update(averages, values, DECAY)
        return averages

    variants = {
        "fused": fused,
        "eager, mul_ and add_": lambda: eager(averages, values),
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(averages, values, 1 - DECAY),
    }
    stated = case.label == "DiT-S/2" and case.dtype == torch.float32
    return Benchmark(
        variants, check, inputs=(averages, values, DECAY), cost=calls.cost("ema_update", averages, values, 1 - DECAY),
        elements=sum(value.numel() for value in values),
        goals=(faster("eager, mul_ and add_", 1.0), within(1.0, "torch._foreach_lerp_")) if stated else (),
    )  # fmt: skip


_DTYPES = (torch.float32, torch.float32, torch.float64)
