"""The demo's sampler, whole: tiny DiT, guidance, 50 Euler steps, against the pipeline as people write it in PyTorch.

The eager pipeline has the same network and weights, its ops in plain PyTorch (`eager.ops`): layer norm, modulation and
gates as separate operations, every modulation computed in every step, guidance and the Euler update by hand.

    python -m genengine.benchmarks.bench_flow        # where our own time goes, operation by operation, one thread
"""

import functools

import torch

from genengine import ops, paths, schedules, solvers
from genengine.benchmarks import eager
from genengine.benchmarks.harness import Benchmark, faster
from genengine.benchmarks.training import TrainingStep
from genengine.models.flow import FlowMatching
from genengine.nets.dit import DiT
from genengine.sampler import sample

STEPS, GUIDANCE = 50, 2.0


def eager_pipeline(model, x, y, null, steps=STEPS, guidance=GUIDANCE):
    """Flow matching by Euler's method with classifier-free guidance."""
    grid = torch.linspace(1, 0, steps + 1).tolist()
    both = torch.cat([null, y])
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        times = torch.full((len(both),), t, device=x.device)
        u, c = model(torch.cat([x, x]), times, both).chunk(2)
        x = x + (t_next - t) * (u + guidance * (c - u))
    return x


def build(device):
    """Flow matching with a tiny DiT, whose every weight has something to do: a fresh DiT is the zero function."""
    net = DiT.from_config("tiny").to(device)
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            noise = ops.normal((1, parameter.numel()), seed=index, device=device).view(parameter.shape)
            parameter.add_(noise, alpha=0.02)
    return FlowMatching(net)


def plain_loss(net, model, x0, y, draw=None):
    """Flow matching on the straight path with hidden labels; draw: (seed, step) of our numbers, else torch's."""
    if draw is None:
        t, eps = torch.randn(len(x0), device=x0.device).sigmoid(), torch.randn_like(x0)
        labels = torch.where(torch.rand(len(x0), device=x0.device) < model.class_drop, 10, y)
    else:
        t, eps = model.draw_times(len(x0), **draw).to(x0.device), ops.normal(x0.shape, stream="diffuse", **draw)
        eps, labels = eps.to(x0.device), model.drop_labels(y.cpu(), **draw).to(x0.device)
    s = t.view(-1, 1, 1, 1)
    return torch.nn.functional.mse_loss(net((1 - s) * x0 + s * eps, t, labels), eps - x0)


class Work:
    """One batch size of the demo's sampler."""

    def __init__(self, batch, device):
        self.net = build(device).net.eval()
        config = self.net.config
        self.shape = (batch, config.in_channels, config.image_size, config.image_size)
        self.y = torch.arange(batch, device=device) % config.num_classes
        self.null = torch.full_like(self.y, self.net.null_class)
        self.table = solvers.euler(
            paths.RectifiedFlow(), schedules.uniform(STEPS), prediction="velocity", guidance_scale=GUIDANCE
        )
        self.eager_net, self.compiled_net = eager.calling(self.net.forward), None
        self.x = ops.normal(self.shape, seed=0, device=device)

    def fused(self):
        return sample(self.net, self.table, self.shape, cond={"y": self.y}, uncond={"y": self.null}, seed=0)

    def eager(self):
        return eager_pipeline(self.eager_net, self.x, self.y, self.null)

    def compiled(self):
        if self.compiled_net is None:
            self.compiled_net = torch.compile(self.eager_net)
        return eager_pipeline(self.compiled_net, self.x, self.y, self.null)

    def check(self):
        difference = (self.fused() - self.eager()).abs().max().item()
        assert difference < 1e-4 * self.eager().abs().max().item(), f"pipelines differ by {difference}"


def benchmarks(device):
    for batch in (4, 100):
        work = Work(batch, device)
        yield Benchmark(
            "flow sampler, tiny DiT, CFG", f"{batch} images, {STEPS} steps", "float32",
            {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled},
            work.check, STEPS * batch, None, (faster("eager", 1.0), faster("torch.compile", 1.0)), quick=batch == 4,
            device=device,
        )  # fmt: skip
    work = TrainingStep(functools.partial(build, device), plain_loss, 128)
    yield Benchmark(
        "flow training step, tiny DiT", "128 images", "float32",
        {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled},
        work.check, 128, None, (faster("eager", 1.0), faster("torch.compile", 1.0)), quick=False, device=device,
    )  # fmt: skip


def breakdown(batch: int, rows: int = 8) -> str:
    """The shares of the CPU time of our sampler, by operation, largest first."""
    work = Work(batch, "cpu")
    with torch.no_grad():
        work.fused()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work.fused()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"{batch} images, {total * 1e-3:.0f} ms under the profiler"]
    for event in events[:rows]:
        lines.append(f"  {event.self_cpu_time_total / total:6.1%}  {event.key} ({event.count} calls)")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in (4, 100):
        print(breakdown(size))
