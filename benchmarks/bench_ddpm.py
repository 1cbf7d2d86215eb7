"""DDPM with the U-Net: a training step and sampling, against the same network with its ops in plain PyTorch.

The eager twin is the same network and weights under `eager.ops`; its loss, optimizer and sampling loop are written out
as in a PyTorch tutorial: noise from torch's generator, the DDIM update by hand, every embedding computed in every step.
"""

import functools

import torch

from genengine import paths
from genengine.benchmarks import eager
from genengine.benchmarks.harness import Benchmark, faster
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


def benchmarks(device):
    goals = (faster("eager", 1.0), faster("torch.compile", 1.0))
    for batch in (4, 100):
        work = Sampling(batch, device)
        yield Benchmark(
            "ddpm sampler, tiny U-Net", f"{batch} images, {STEPS} steps", "float32",
            {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled}, work.check, STEPS * batch,
            None, goals, quick=batch == 4, device=device,
        )  # fmt: skip
    for name, config, batch, overrides in (("tiny", "tiny", 32, {}), ("32x32, 32 channels", "cifar", 4, MIDDLE)):
        work = TrainingStep(functools.partial(build, config, device, **overrides), plain_loss, batch)
        yield Benchmark(
            "ddpm training step, U-Net", f"{name}, {batch} images", "float32",
            {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled}, work.check, batch,
            None, goals, quick=name == "tiny", device=device,
        )  # fmt: skip
