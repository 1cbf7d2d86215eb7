"""ema_update over the weights of a DiT of 33 million parameters against torch's foreach lerp and the loop users write.

Two reads and one write per element.
"""

import torch

from genengine.benchmarks.harness import Benchmark, faster, within
from genengine.nets.dit import DiT, DiTConfig
from genengine.ops import ema_update

DECAY = 0.999


def weights(device):
    config = DiTConfig(image_size=32, patch_size=2, in_channels=4, dim=384, depth=12, num_heads=6, num_classes=1000)
    return [p.detach().clone().to(device) for p in DiT(config).parameters()]


def benchmarks(device):
    values = weights(device)
    averages = [torch.randn_like(value) for value in values]
    n = sum(value.numel() for value in values)

    def eager():
        for average, value in zip(averages, values, strict=True):
            average.mul_(DECAY).add_(value, alpha=1 - DECAY)

    def check():
        some = [t.clone() for t in averages[:20]]
        exact = [a.double() + (1 - DECAY) * (v.double() - a.double()) for a, v in zip(some, values, strict=False)]
        ema_update(some, values[:20], DECAY)
        for got, oracle in zip(some, exact, strict=True):
            assert (got - oracle).abs().max() <= 3e-7 * oracle.abs().max()

    variants = {
        "fused": lambda: ema_update(averages, values, DECAY),
        "eager, mul_ and add_": eager,
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(averages, values, 1 - DECAY),
    }
    goals = (faster("eager, mul_ and add_", 1.0), within(1.0, "torch._foreach_lerp_"))
    shape = f"{len(values)} tensors, {n}"
    yield Benchmark("ema_update", shape, "float32", variants, check, n, 12 * n, goals, device=device)
