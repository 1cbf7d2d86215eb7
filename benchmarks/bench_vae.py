"""Variational autoencoders, a training step and a batch of samples, against the same networks in plain PyTorch.

"eager" has every op in its plain form (`eager.ops`) and the sampling loop by hand; "torch.compile" compiles that.
"""

from functools import partial

import torch

from genengine import ops
from genengine.benchmarks import eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.models import VAE

DIGITS = {"net": {"name": "vae", "config": "tiny", "widths": (512, 512)}, "num_levels": 17}
COLOUR = {"net": {"name": "vae", "config": "conv_32"}, "likelihood": "mixture", "components": 5}
SEED = 3


class Work:
    """One model and batch size."""

    def __init__(self, config, case):
        device = case.device
        self.vae = VAE.from_config({"family": "vae", "prior_components": 0, **config}).to(device).train()
        batch = case.batch_of(self.vae.image_shape)
        levels = ops.uniform((batch, *self.vae.image_shape), seed=1, device=device) * self.vae.num_levels
        self.x0 = levels.floor() * (2 / (self.vae.num_levels - 1)) - 1
        self.batch, self.device, self.compiled = batch, device, {}
        self.z = ops.normal((batch, *self.vae.latent_shape), seed=SEED, device=device)

    def step(self, loss):
        """Loss and gradients."""
        for parameter in self.vae.net.parameters():
            parameter.grad = None
        with torch.enable_grad():
            value = loss()
            value.backward()
        return value.detach()

    def loss(self):
        return self.vae.loss(self.x0, seed=SEED)

    def train_fused(self):
        return self.step(self.loss)

    def train_eager(self):
        return self.step(eager.calling(self.loss))

    def train_compiled(self):
        return self.step(self.compile("train", eager.calling(self.loss)))

    def means(self, z=None):
        """What one writes by hand: noise through the decoder, and the mean of the pixels."""
        z = torch.randn_like(self.z) if z is None else z
        return self.vae.pixels.mean(self.vae.net.decode(z))

    def sample_fused(self):
        return self.vae.sample(self.batch, prior="normal", pixels="mean", seed=SEED)

    def sample_eager(self):
        return eager.calling(self.means)()

    def sample_compiled(self):
        return self.compile("sample", eager.calling(self.means))()

    def compile(self, name, function):
        if name not in self.compiled:
            self.compiled[name] = torch.compile(function)
        return self.compiled[name]

    def check_training(self):
        ours, plain = [], []
        for grads, loss in ((ours, self.loss), (plain, eager.calling(self.loss, same_noise=True))):
            grads += [self.step(loss), *(p.grad.clone() for p in self.vae.net.parameters())]
        for mine, theirs in zip(ours, plain, strict=True):
            gap = (mine - theirs).abs().max().item()
            assert gap <= 2e-3 * theirs.abs().max().item() + 1e-5, f"losses or gradients differ by {gap}"

    def check_sampling(self):
        gap = (self.sample_fused() - eager.calling(self.means)(self.z)).abs().max().item()
        assert gap < 1e-4, f"samples differ by {gap}"


GOALS = (faster("eager", 1.0), faster("torch.compile", 1.0))


def training(config, case):
    work = Work(config, case)
    variants = {"fused": work.train_fused, "eager": work.train_eager, "torch.compile": work.train_compiled}
    return Benchmark(variants, work.check_training, elements=case.shape[0], goals=GOALS)


def sampling(config, case):
    work = Work(config, case)
    variants = {"fused": work.sample_fused, "eager": work.sample_eager, "torch.compile": work.sample_compiled}
    return Benchmark(variants, work.check_sampling, elements=case.shape[0], goals=GOALS)


for _name, _config, _shapes, _quick in (
    ("mlp VAE, digits", DIGITS, {"128 images": (128, 1, 8, 8)}, None),
    ("conv VAE, 32x32 colour", COLOUR, {"8 images": (8, 3, 32, 32), "64 images": (64, 3, 32, 32)}, ()),
):
    _common = {"group": "vae", "kind": "models", "shapes": _shapes, "quick": _quick, "axes": {"batch": 0}}
    register(f"{_name}, training step", **_common)(partial(training, _config))
    register(f"{_name}, sampling", **_common)(partial(sampling, _config))
