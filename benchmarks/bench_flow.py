"""The demo's sampler, whole: tiny DiT, guidance, 50 Euler steps, against the pipeline as people write it in PyTorch.

The eager pipeline has the same network and weights, its ops in plain PyTorch (`eager.ops`): layer norm, modulation and
gates as separate operations, every modulation computed in every step, guidance and the Euler update by hand.

`genengine profile flow.sample` shows where our own time goes.
"""

import copy
from functools import partial

import torch

from genengine import ops, paths, schedules, solvers, testing
from genengine.benchmarks import eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.benchmarks.training import TrainingStep
from genengine.models.flow import FlowMatching
from genengine.nets.dit import DiT, DiTConfig
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
    return FlowMatching(filled(DiT.from_config("tiny")).to(device))


@torch.no_grad()
def filled(net):
    for index, parameter in enumerate(net.parameters()):
        noise = ops.normal((1, parameter.numel()), seed=index).view(parameter.shape)
        parameter.add_(noise, alpha=0.02)
    return net


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


GOALS = (faster("eager", 1.0), faster("torch.compile", 1.0))


def variants(work):
    return {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled}


@register(
    "flow sampler, tiny DiT, CFG", group="flow", kind="models", axes={"batch": 0},
    shapes={f"4 images, {STEPS} steps": (4, 1, 8, 8), f"100 images, {STEPS} steps": (100, 1, 8, 8)},
)  # fmt: skip
def sampling(case):
    work = Work(case.batch_of((1, 8, 8)), case.device)
    return Benchmark(variants(work), work.check, elements=STEPS * case.shape[0], goals=GOALS)


@register(
    "flow training step, tiny DiT", group="flow", kind="models", shapes={"128 images": (128, 1, 8, 8)}, quick=(),
    axes={"batch": 0},
)  # fmt: skip
def training(case):
    work = TrainingStep(partial(build, case.device), plain_loss, case.batch_of((1, 8, 8)))
    return Benchmark(variants(work), work.check, elements=case.shape[0], goals=GOALS)


# label -> (dim, depth, heads); Peebles & Xie 2023, table 1
SIZES = {"DiT-S/2": (384, 12, 6), "DiT-B/2": (768, 12, 12), "DiT-L/2": (1024, 24, 16), "DiT-XL/2": (1152, 28, 16)}


@register(
    "DiT evaluation", group="flow", kind="models", shapes={"DiT-S/2": (2, 4, 32, 32)}, quick=(), axes={"batch": 0},
    cuda_shapes={size: (64, 4, 32, 32) for size in SIZES}, dtypes=("float32", "bfloat16"),
)  # fmt: skip
def evaluation(case):
    """One forward of a full-size DiT on 256 tokens, ours and its eager twin."""
    dim, depth, heads = SIZES.get(case.label, SIZES["DiT-S/2"])
    config = DiTConfig(
        image_size=case.shape[2], patch_size=2, in_channels=case.shape[1], dim=dim, depth=depth, num_heads=heads,
        num_classes=1000,
    )  # fmt: skip
    net = filled(DiT(config)).to(case.device, case.dtype).eval()
    arguments = (case.randn(), torch.full((case.shape[0],), 0.5, device=case.device), torch.zeros(case.shape[0]).long())
    arguments = (*arguments[:2], arguments[2].to(case.device))
    plain = eager.calling(net.forward)

    def check():
        oracle = eager.calling(copy.deepcopy(net).double().forward)(arguments[0].double(), *arguments[1:])
        limit = 2 * testing.error(plain(*arguments), oracle) + torch.finfo(case.dtype).eps * oracle.abs().max().item()
        testing.assert_within(testing.error(net(*arguments), oracle), limit, "DiT")

    return Benchmark(
        {"fused": lambda: net(*arguments), "eager": lambda: plain(*arguments)}, check, compiles=(plain, arguments),
        elements=case.shape[0], goals=GOALS,
    )  # fmt: skip
