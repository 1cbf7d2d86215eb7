"""normal and uniform against torch's generator and torch.compile: nanoseconds per draw, out-variants, float32.

One sample of a million, and latents of known models (samples, elements of each).
"""

import math
from functools import partial

import numpy as np
import torch

from genengine import ops, random
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, Goal, faster, register

MILLION = "10^6"
SHAPES = {
    MILLION: (1, 10**6), "SD": (16, math.prod(calls.SD)), "SDXL": (16, math.prod(calls.SDXL)),
    "SD3, Flux": (16, math.prod(calls.SD3)), "CogVideoX-5B": (2, math.prod(calls.VIDEO)),
}  # fmt: skip
TORCHS = {
    "normal": ("torch.randn", torch.randn, torch.randn_like),
    "uniform": ("torch.rand", torch.rand, torch.rand_like),
}
GOALS = {"normal": (Goal("ns", "fused", "", 1.0, False), faster("torch.randn", 3.5))}
CHECKED = 10_000  # elements of the first and of the last sample: the specification in NumPy is slow


def make(name, case):
    op, (torchs, draw, draw_like) = getattr(ops, name), TORCHS[name]
    out, other = (torch.empty(case.shape, device=case.device) for _ in range(2))
    seed = torch.tensor(1, device=case.device)

    def check():
        drawn = op(case.shape, seed=seed, out=out)[:, :CHECKED]
        for sample in {0, case.shape[0] - 1}:
            expected = getattr(random, name)(drawn.shape[1], seed=1, sample=sample)
            assert np.array_equal(drawn[sample].cpu().numpy(), expected), "bits differ from the specification"

    variants = {
        "fused": lambda: op(case.shape, seed=seed, out=out),
        torchs: lambda: draw(case.shape, out=other),
    }
    stream = random.stream_id("init" if name == "normal" else "uniform")
    ids = torch.arange(case.shape[0], device=case.device)
    return Benchmark(
        variants, check, compiles=(draw_like, (other,)), elements=out.numel(),
        cost=calls.cost(f"{name}_out", out, seed, ids, 0, stream),
        goals=GOALS.get(name, ()) if case.label == MILLION else (),
    )  # fmt: skip


for _name in TORCHS:
    register(
        _name, shapes=SHAPES, cuda_shapes={"SDXL, 1,024 images": (1024, math.prod(calls.SDXL))}, group="normal",
        axes={"batch": 0, "elements": 1},
    )(partial(make, _name))  # fmt: skip
