"""Sampling again and again: what an engine keeps from call to call, against setting up, and capturing, in every call.

A tiny DiT, guidance, ten Euler steps; labels and seed are others in every call. On a GPU "fused" replays one graph of
the loop, "fused, graph of a row" one of a row, and "sample" captures a row in every call; on a CPU nothing is captured,
and what is kept are buffers. "eager" is the loop as people write it with the same network.
"""

import itertools

import torch

import genengine
from genengine import paths, schedules, solvers
from genengine.benchmarks.bench_flow import eager_pipeline, filled
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.nets.dit import DiT
from genengine.ops import normal

STEPS, GUIDANCE = 10, 2.0


@register(
    f"repeated calls, {STEPS} steps", group="engine", kind="samplers", quick=(),
    shapes={"1 image": (1, 1, 8, 8), "16 images": (16, 1, 8, 8)},
)  # fmt: skip
def repeated(case):
    net = filled(DiT.from_config("tiny")).to(case.device, case.dtype).eval()
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(STEPS), prediction="velocity")
    batch, device = case.batch_of((1, 8, 8)), case.device
    null = torch.full((batch,), net.null_class, device=device)
    labels = [(torch.arange(batch, device=device) + shift) % 10 for shift in range(4)]
    calls = {name: itertools.cycle(enumerate(labels)) for name in ("fused", "fused, graph of a row", "sample", "eager")}

    def ours(name, sample):
        def run():
            seed, y = next(calls[name])
            return sample(
                table, case.shape, cond={"y": y}, uncond={"y": null}, guidance=GUIDANCE, seed=seed, device=device
            )

        return run

    def eager():
        seed, y = next(calls["eager"])
        return eager_pipeline(net, normal(case.shape, seed=seed, device=device), y, null, STEPS, GUIDANCE)

    variants = {
        "fused": ours("fused", genengine.Engine(net).sample),
        "fused, graph of a row": ours("fused, graph of a row", genengine.Engine(net, max_loop_rows=0).sample),
        "sample": ours("sample", lambda *args, **kwargs: genengine.sample(net, *args, **kwargs)),
        "eager": eager,
    }

    def check():
        for _ in range(len(labels)):
            found = {name: run() for name, run in variants.items()}
            for name, x in found.items():
                gap, largest = (x - found["fused"]).abs().max().item(), x.abs().max().item()
                assert gap <= 1e-4 * largest, f"{name} differs by {gap}, of {largest}"

    goals = (faster("eager", 1.0), *([faster("sample", 2.0)] if torch.device(device).type == "cuda" else []))
    return Benchmark(variants, check, goals=goals)
