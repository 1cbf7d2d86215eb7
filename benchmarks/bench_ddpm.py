"""DDPM with the U-Net: a training step and sampling, against the same network with its ops in plain PyTorch.

The eager twin is the same network and weights under `eager.ops`; its loss, optimizer and sampling loop are written out
as in a PyTorch tutorial: noise from torch's generator, the DDIM update by hand, every embedding computed in every step.
"""

from functools import partial

import torch

from genengine import paths
from genengine.benchmarks import eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.benchmarks.training import TrainingStep
from genengine.models.ddpm import DDPM
from genengine.nets.unet import UNet
from genengine.ops import normal

STEPS = 20
# A U-Net of the CIFAR-10 kind at a quarter of its width.
MIDDLE = {"channels": 32, "num_groups": 8, "num_classes": 10, "modulation": "scale_shift", "head_dim": 32}


def build(config, device, **overrides):
    """A DDPM whose every weight has something to do: a fresh U-Net is the zero function."""
    model = DDPM(UNet.from_config(config, **overrides), paths.Cosine(), prediction="v").to(device)
    with torch.no_grad():
        for index, parameter in enumerate(model.net.parameters()):
            draw = normal((1, parameter.numel()), seed=index, device=device).view(parameter.shape)
            parameter.add_(draw, alpha=0.02)
    return model


class Sampling:
    """DDIM on one batch of digits, conditional."""

    def __init__(self, batch, device):
        self.model, self.batch = build("tiny", device), batch
        self.model.eval()
        self.y = torch.arange(batch, device=device) % 10
        self.x = normal((batch, 1, 8, 8), seed=0, device=device)
        self.net, self.compiled_net = eager.calling(self.model.net.forward), None

    def fused(self):
        return self.model.sample(self.batch, self.y, steps=STEPS, solver="ddim", guidance=1.0, seed=0, clip=1.0)

    @torch.no_grad()
    def pipeline(self, net):
        """DDIM (Song et al. 2021) of a network that predicts v, on the cosine path."""
        x, path = self.x, self.model.path
        times = [(STEPS - i) / STEPS for i in range(STEPS + 1)]
        for t, end in zip(times[:-1], times[1:], strict=True):
            (a, s), (a_end, s_end) = ((float(path.alpha(u)), float(path.sigma(u))) for u in (t, end))
            v = net(x, torch.full((self.batch,), t, device=x.device), self.y)
            x0 = (a * x - s * v).clamp(-1, 1)
            x = a_end * x0 + s_end * (x - a * x0) / s
        return x

    def eager(self):
        return self.pipeline(self.net)

    def compiled(self):
        if self.compiled_net is None:
            self.compiled_net = torch.compile(self.net)
        return self.pipeline(self.compiled_net)

    def check(self):
        expected = self.eager()
        difference = (self.fused() - expected).abs().max().item()
        assert difference < 1e-4 * expected.abs().max().item(), f"samples differ by {difference}"


def plain_loss(net, model, x0, y, draw=None):
    """Ho et al. 2020, Alg. 1, for v and with hidden labels; draw: (seed, step) of our numbers, else torch's."""
    if draw is None:
        n, eps = torch.randint(model.num_timesteps, (len(x0),), device=x0.device), torch.randn_like(x0)
        labels = torch.where(torch.rand(len(x0), device=x0.device) < model.class_drop, 10, y)
    else:
        n, eps = model.draw_steps(len(x0), **draw).to(x0.device), normal(x0.shape, stream="diffuse", **draw)
        eps, labels = eps.to(x0.device), model.drop_labels(y.cpu(), **draw).to(x0.device)
    alpha, sigma = (
        torch.as_tensor(c, dtype=torch.float32, device=x0.device)[n].view(-1, 1, 1, 1)
        for c in (model.steps.alpha, model.steps.sigma)
    )
    out = net(alpha * x0 + sigma * eps, (n + 1) / model.num_timesteps, labels)
    return torch.nn.functional.mse_loss(out, alpha * eps - sigma * x0)


GOALS = (faster("eager", 1.0), faster("torch.compile", 1.0))


def variants(work):
    return {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled}


@register(
    "ddpm sampler, tiny U-Net", group="ddpm", kind="models", axes={"batch": 0},
    shapes={f"4 images, {STEPS} steps": (4, 1, 8, 8), f"100 images, {STEPS} steps": (100, 1, 8, 8)},
)  # fmt: skip
def sampling(case):
    work = Sampling(case.batch_of((1, 8, 8)), case.device)
    return Benchmark(variants(work), work.check, elements=STEPS * case.shape[0], goals=GOALS)


@register(
    "ddpm training step, U-Net", group="ddpm", kind="models", axes={"batch": 0},
    shapes={"tiny": (32, 1, 8, 8), "32 channels": (4, 3, 32, 32)},
)  # fmt: skip
def training(case):
    tiny = case.shape[1] == 1
    batch = case.batch_of((1, 8, 8) if tiny else (3, 32, 32))
    config, overrides = ("tiny", {}) if tiny else ("cifar", MIDDLE)
    work = TrainingStep(partial(build, config, case.device, **overrides), plain_loss, batch)
    return Benchmark(variants(work), work.check, elements=case.shape[0], goals=GOALS)
