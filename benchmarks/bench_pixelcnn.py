"""The tiny PixelCNN: samples, and a training step, against the same network in plain PyTorch.

Sampling has two kinds of baselines. "eager" and "torch.compile" are the fixed-point iteration over the whole image, which
needs few passes where many pixels settle at once; "eager, naive" is the loop that people write, a pass for every pixel.
The network is the shipped one, as it is its images that decide how many passes are needed; without it, filled at random.
bench_pixelcnn_sample.py has the op alone, on a larger network, against the strongest cached sampler.
"""

from functools import partial

import torch

from genengine import data, ops
from genengine.benchmarks import eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.models import PixelCNN


def digits_model(device):
    try:
        return PixelCNN.pretrained("digits", device=device)
    except ValueError:
        model = PixelCNN.from_config({"net": {"name": "pixelcnn", "config": "tiny"}, "num_levels": 17})
        for index, parameter in enumerate(model.net.parameters()):
            parameter.data += 0.2 * ops.normal((1, parameter.numel()), seed=index).view(parameter.shape)
        return model.to(device).eval()


def draw(logits, u, levels):
    """Pixels by inverse CDF."""
    sums = torch.softmax(logits, 1).cumsum(1)
    return 2 * (sums[:, :-1] <= u[:, None]).sum(1) / (levels - 1) - 1


@torch.no_grad()
def fixed_point(net, u, y, levels):
    x = torch.zeros_like(u)
    while True:
        new = draw(net(x, y), u, levels)
        if torch.equal(new, x):
            return x
        x = new


@torch.no_grad()
def naive(net, u, y, levels):
    x = torch.zeros_like(u)
    for row in range(u.shape[2]):
        for column in range(u.shape[3]):
            x[:, :, row, column] = draw(net(x, y), u, levels)[:, :, row, column]
    return x


class Sampling:
    """One batch size of the digits' sampler."""

    def __init__(self, batch, device):
        self.model, self.batch = digits_model(device), batch
        self.y = torch.arange(batch, device=device) % 10
        u = ops.uniform((batch, 8, 8, 1), seed=0, stream="uniform", device=device)
        self.arguments = (u.permute(0, 3, 1, 2).contiguous(), self.y, 17)
        self.eager_net, self.compiled_net = eager.calling(self.model.net.forward), None

    def fused(self):
        return self.model.sample(self.batch, self.y, seed=0)

    def eager(self):
        return fixed_point(self.eager_net, *self.arguments)

    def compiled(self):
        if self.compiled_net is None:
            self.compiled_net = torch.compile(self.eager_net)
        return fixed_point(self.compiled_net, *self.arguments)

    def naive(self):
        return naive(self.eager_net, *self.arguments)

    def check(self):
        ours = self.fused()
        for other in (self.eager(), self.naive()):
            # A uniform at the edge of two levels may fall on either side of it, and then the rest differs too.
            different = int((ours != other).flatten(1).any(1).sum())
            assert different <= self.batch // 50, f"{different} of {self.batch} images differ"


class Training:
    """Forward and backward of the loss on one batch."""

    def __init__(self, batch, device):
        self.model = digits_model(device).train()
        x0, y = data.digits("train")
        self.x0, self.y = x0[:batch].to(device), y[:batch]
        self.loss_functions = {"fused": self.model.loss, "eager": eager.calling(self.model.loss)}

    @torch.enable_grad()
    def run(self, name):
        if name not in self.loss_functions:
            self.loss_functions[name] = torch.compile(eager.calling(self.model.loss))
        loss = self.loss_functions[name](self.x0, self.y, seed=0, step=1)
        loss.backward()
        return loss

    def check(self):
        plain = eager.calling(self.model.loss, same_noise=True)(self.x0, self.y, seed=0, step=1)
        ours = self.model.loss(self.x0, self.y, seed=0, step=1)
        assert abs(float(ours) - float(plain)) < 1e-5 * abs(float(plain)), f"losses are {ours} and {plain}"


@register(
    "pixelcnn sampler, digits", group="pixelcnn", kind="models", axes={"batch": 0},
    shapes={"4 images": (4, 1, 8, 8), "100 images": (100, 1, 8, 8)},
)  # fmt: skip
def sampling(case):
    work = Sampling(case.batch_of((1, 8, 8)), case.device)
    variants = {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled, "eager, naive": work.naive}
    goals = (faster("eager", 1.0), faster("torch.compile", 1.0), faster("eager, naive", 3.0))
    return Benchmark(variants, work.check, elements=64 * case.shape[0], goals=goals)


@register(
    "pixelcnn training step, digits", group="pixelcnn", kind="models", quick=(), axes={"batch": 0},
    shapes={"64 images": (64, 1, 8, 8)},
)  # fmt: skip
def training(case):
    train = Training(case.batch_of((1, 8, 8)), case.device)
    variants = {name: partial(train.run, name) for name in ("fused", "eager", "torch.compile")}
    goals = (faster("eager", 1.0), faster("torch.compile", 1.0))
    return Benchmark(variants, train.check, elements=64 * case.shape[0], goals=goals)
