"""The tiny DCGAN: images from latents, and the turns of a training iteration, against the same networks in plain
PyTorch. R1 differentiates twice, which torch.compile cannot: that row has no such variant.
"""

from functools import partial

import torch

from genengine import data
from genengine.benchmarks import eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.models import GAN


def digits_model(device):
    return GAN.from_config(
        {"net": {"name": "dcgan", "config": "tiny"}, "augment": ["translation"], "num_levels": 17}
    ).to(device)


class Sampling:
    """One batch size of the generator."""

    def __init__(self, batch, device):
        self.model, self.batch = digits_model(device), batch
        self.y = torch.arange(batch, device=device) % 10
        self.plain = eager.calling(self.model.generator.forward)
        self.compiled_generator = None
        self.z = self.model.latents(batch, seed=0)

    def fused(self):
        return self.model.sample(self.batch, self.y, seed=0)

    @torch.no_grad()
    def eager(self):
        return self.plain(torch.randn_like(self.z), self.y)

    @torch.no_grad()
    def compiled(self):
        if self.compiled_generator is None:
            self.compiled_generator = torch.compile(self.plain)
        return self.compiled_generator(torch.randn_like(self.z), self.y)

    @torch.no_grad()
    def check(self):
        difference = (self.fused() - self.plain(self.z, self.y)).abs().max().item()
        assert difference < 1e-4, f"images differ by {difference}"


class Training:
    """Forward and backward of both turns on one batch."""

    def __init__(self, batch, device, penalise):
        self.model, self.penalise = digits_model(device).train(), penalise
        x0, y = data.digits("train")
        self.x0, self.y = x0[:batch].to(device), y[:batch].to(device)
        self.turns = (self.discriminator_loss, self.generator_loss)
        self.functions = {"fused": self.turns, "eager": [eager.calling(turn) for turn in self.turns]}

    def discriminator_loss(self):
        return self.model.discriminator_terms(self.x0, self.y, penalise=self.penalise, seed=0, step=1)["loss"]

    def generator_loss(self):
        return self.model.terms(self.x0, self.y, seed=0, step=1)["loss"]

    @torch.enable_grad()
    def run(self, name):
        if name not in self.functions:
            self.functions[name] = [torch.compile(eager.calling(turn)) for turn in self.turns]
        for turn, network in zip(self.functions[name], ("discriminator", "generator"), strict=True):
            torch.autograd.grad(turn(), list(self.model.networks[network].parameters()))

    @torch.enable_grad()
    def check(self):
        for turn in self.turns:
            ours, plain = (float(f().detach()) for f in (turn, eager.calling(turn, same_noise=True)))
            assert abs(ours - plain) < 1e-4 * (1 + abs(plain)), f"losses are {ours} and {plain}"


@register(
    "gan sampler, digits", group="gan", kind="models", axes={"batch": 0},
    shapes={"4 images": (4, 1, 8, 8), "256 images": (256, 1, 8, 8)},
)  # fmt: skip
def sampling(case):
    work = Sampling(case.batch_of((1, 8, 8)), case.device)
    variants = {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled}
    goals = (faster("eager", 1.0), faster("torch.compile", 1.0))
    return Benchmark(variants, work.check, elements=64 * case.shape[0], goals=goals)


def training(penalise, case):
    work = Training(case.batch_of((1, 8, 8)), case.device, penalise)
    names = ["fused", "eager"] + ["torch.compile"] * (not penalise)
    return Benchmark(
        {name: partial(work.run, name) for name in names}, work.check, elements=64 * case.shape[0],
        goals=tuple(faster(name, 1.0) for name in names[1:]),
    )  # fmt: skip


for _penalise in (False, True):
    register(
        f"gan training iteration, digits{', R1' * _penalise}", group="gan", kind="models", quick=(), axes={"batch": 0},
        shapes={"64 images": (64, 1, 8, 8)},
    )(partial(training, _penalise))  # fmt: skip
