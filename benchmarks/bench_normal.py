"""normal against torch.randn: nanoseconds per normal, out-variants, float32."""

import numpy as np
import torch

from genengine import random
from genengine.benchmarks.harness import Benchmark, Goal, faster
from genengine.ops import normal

COUNT = 10**6


def benchmarks(device):
    out, other = torch.empty(1, COUNT, device=device), torch.empty(1, COUNT, device=device)
    seed = torch.tensor(1, device=device)

    def check():
        draw = normal(out.shape, seed=seed, out=out)[0, :10_000].cpu().numpy()
        assert np.array_equal(draw, random.normal(10_000, seed=1)), "bits differ from the specification"

    yield Benchmark(
        "normal", "10^6", "float32",
        {"fused": lambda: normal(out.shape, seed=seed, out=out),
         "torch.randn": lambda: torch.randn(other.shape, out=other)},
        check, COUNT, 4 * COUNT, (Goal("ns", "fused", "", 1.0, False), faster("torch.randn", 3.5)), device=device,
    )  # fmt: skip
