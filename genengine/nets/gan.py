"""DCGAN: a convolutional generator and discriminator, conditional by embedding and by projection.

Radford et al., Unsupervised Representation Learning with Deep Convolutional GANs, 2016; Miyato & Koyama, cGANs with
Projection Discriminator, 2018; Karras et al., Progressive Growing of GANs, 2018 (minibatch standard deviation). There
is no batch normalisation: an image depends on its own latent alone, and gradient penalties stay those of one image.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from genengine import ops
from genengine.nets import configs, layers

SIZES = (8, 16, 32, 64)
SLOPE, GAIN = 0.2, math.sqrt(2.0)  # of the leaky ReLU, and what keeps its output's variance


@dataclasses.dataclass(frozen=True)
class GANConfig:
    """Shape of a generator and a discriminator.

    Attributes:
        image_size: height and width of the images, one of 8, 16, 32, 64.  in_channels: their channels.
        num_classes: classes; 0 for unconditional networks.
        latent_dim: length of z.  class_dim: length of the class embedding that is joined to z.
        generator_dim, discriminator_dim: features at the full resolution, doubled with every halving of it.
        max_dim: no layer has more features.
        stddev_group: images over which the minibatch standard deviation is taken, a divisor of the batches; 0 for none.
    """

    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 0
    latent_dim: int = 128
    class_dim: int = 32
    generator_dim: int = 64
    discriminator_dim: int = 64
    max_dim: int = 512
    stddev_group: int = 0

    def __post_init__(self):
        sizes = ("in_channels", "latent_dim", "class_dim", "generator_dim", "discriminator_dim", "max_dim")
        configs.check_ints("nets/GAN", self, sizes)
        configs.check_ints("nets/GAN", self, ("num_classes", "stddev_group"), least=0)
        if self.image_size not in SIZES:
            raise ValueError(f"nets/GAN: image_size must be one of {SIZES}, got {self.image_size!r}; resize the images")
        if self.stddev_group == 1:
            raise ValueError("nets/GAN: stddev_group must be 0 or at least 2, got 1; one image does not vary")

    def dims(self, base):
        """Features at 4x4, 8x8, ... up to the full resolution."""
        halvings = self.image_size.bit_length() - 3
        return [min(base << (halvings - i), self.max_dim) for i in range(halvings + 1)]


# name -> GANConfig fields: `tiny` for the embedded digits.
CONFIGS = {
    "tiny": {
        "image_size": 8, "in_channels": 1, "num_classes": 10, "latent_dim": 32, "class_dim": 16, "generator_dim": 40,
        "discriminator_dim": 40, "max_dim": 80,
    },
    "small": {"generator_dim": 32, "discriminator_dim": 32, "max_dim": 256},
    "base": {},
}  # fmt: skip


def resolve_config(config, **overrides):
    """A GANConfig from a name in `CONFIGS`, a dict of fields or a GANConfig, fields replaced by `overrides`.

    Raises:
        ValueError: unknown name or field, or values that do not fit together.
    """
    return configs.resolve("nets/GAN", GANConfig, CONFIGS, config, overrides)


class Conv(nn.Module):
    """gain lrelu(W * x + b): a 3x3 convolution, or a 4x4 one that doubles ("up") or halves ("down") the resolution."""

    def __init__(self, in_features, out_features, kind="same"):
        super().__init__()
        make, size, options = {
            "same": (nn.Conv2d, 3, {"padding": 1}),
            "up": (nn.ConvTranspose2d, 4, {"stride": 2, "padding": 1}),
            "down": (nn.Conv2d, 4, {"stride": 2, "padding": 1}),
        }[kind]
        device = torch.get_default_device()
        self.conv = nn.utils.skip_init(make, in_features, out_features, size, bias=False, device=device, **options)
        self.bias = nn.Parameter(torch.empty(out_features))
        # The taps that meet in one output pixel: of the four by four, "up" has two by two.
        self.fan_in = in_features * (4 if kind == "up" else size * size)

    def forward(self, x):
        return ops.bias_act(self.conv(x), self.bias, activation="lrelu", alpha=SLOPE, gain=GAIN)


class Generator(nn.Module):
    """Image = tanh(convolutions of a 4x4 map linear in [z, class embedding]).

    Args:
        config: GANConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    """

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        dims = config.dims(config.generator_dim)
        self.dim = dims[0]
        self.classes = _embedding(config.num_classes, config.class_dim)
        joined = config.latent_dim + (config.class_dim if config.num_classes else 0)
        self.start = layers.linear(joined, 16 * self.dim)
        blocks = []
        for low, high in zip(dims[:-1], dims[1:], strict=True):
            blocks += [Conv(low, high, "up"), Conv(high, high)]
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.utils.skip_init(
            nn.Conv2d, dims[-1], config.in_channels, 3, padding=1, bias=False, device=torch.get_default_device()
        )
        self.out_bias = nn.Parameter(torch.empty(config.in_channels))
        reset_parameters(self, seed, first=0)

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from what `resolve_config` takes."""
        return cls(resolve_config(config, **overrides), seed=seed)

    def forward(self, z, y=None):
        """z (B, latent_dim); y (B,) int64 in 0 .. num_classes - 1, None without classes -> (B, C, H, W) in [-1, 1].

        Raises:
            ValueError, TypeError: z does not fit the config; y does not fit z or the classes.
        """
        if z.ndim != 2 or z.shape[1] != self.config.latent_dim:
            raise ValueError(f"nets/GAN: z must be (B, {self.config.latent_dim}), got {tuple(z.shape)}")
        layers.check_labels("nets/GAN", y, len(z), self.config.num_classes, null=False)
        if self.classes is not None:
            z = torch.cat([z, self.classes(y)], dim=1)
        x = F.linear(z, self.start.weight).view(len(z), self.dim, 4, 4)
        bias = self.start.bias.view(self.dim, 4, 4)  # one for each pixel, so not a channel's
        x = ops.bias_act(x + bias, activation="lrelu", alpha=SLOPE, gain=GAIN)
        return ops.bias_act(self.out(self.blocks(x)), self.out_bias, activation="tanh")


class Discriminator(nn.Module):
    """Logit of "real": v . f(x) + b, and with classes + e_y . f(x), f the features of the convolutions.

    Args:
        config: GANConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    """

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        dims = config.dims(config.discriminator_dim)[::-1]
        blocks = [Conv(config.in_channels, dims[0])]
        for high, low in zip(dims[:-1], dims[1:], strict=True):
            blocks += [Conv(high, high), Conv(high, low, "down")]
        self.blocks = nn.Sequential(*blocks)
        features = dims[-1]
        self.last = Conv(features + (config.stddev_group > 0), features)
        self.features = layers.linear(16 * features, 2 * features)
        self.out = layers.linear(2 * features, 1)
        self.classes = _embedding(config.num_classes, 2 * features)
        reset_parameters(self, seed, first=1000)  # other draws than the generator's

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from what `resolve_config` takes."""
        return cls(resolve_config(config, **overrides), seed=seed)

    def forward(self, x, y=None):
        """x (B, C, H, W) in [-1, 1]; y (B,) int64 in 0 .. num_classes - 1, None without classes -> logits (B,).

        Twice differentiable in x, for gradient penalties.
        Raises:
            ValueError, TypeError: x does not fit the config; y does not fit x or the classes; a batch that is no
                multiple of stddev_group.
        """
        config = self.config
        shape = (config.in_channels, config.image_size, config.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"nets/GAN: x must be (B, C, H, W) = (B, {str(shape)[1:-1]}), got {tuple(x.shape)}")
        layers.check_labels("nets/GAN", y, len(x), config.num_classes, null=False)
        x = self.blocks(x)
        if config.stddev_group:
            x = torch.cat([x, minibatch_stddev(x, config.stddev_group)], dim=1)
        x = self.last(x).flatten(1)
        x = F.linear(x, self.features.weight)
        x = ops.bias_act(x, self.features.bias, activation="lrelu", alpha=SLOPE, gain=GAIN)
        logit = self.out(x)[:, 0]
        return logit if self.classes is None else logit + (self.classes(y) * x).sum(1)


def minibatch_stddev(x, group):
    """How much the images of a group differ, (B, 1, H, W): the standard deviation over the group, averaged over
    features and pixels. Group g holds the images g, g + B / group, ...

    Raises:
        ValueError: a batch that is no multiple of the group.
    """
    b, _, height, width = x.shape
    if b % group:
        raise ValueError(f"nets/GAN: stddev_group = {group} must divide the batch, got {b} images; change either")
    grouped = x.reshape(group, b // group, -1)
    variance = grouped.var(dim=0, unbiased=False)  # (B / group, C H W)
    deviation = (variance + 1e-8).sqrt().mean(1)
    return deviation.repeat(group).view(b, 1, 1, 1).expand(b, 1, height, width)


def _embedding(num_classes, dim):
    if not num_classes:
        return None
    return nn.utils.skip_init(nn.Embedding, num_classes, dim, device=torch.get_default_device())


@torch.no_grad()
def reset_parameters(net, seed, first):
    """N(0, 1 / fan_in) weights, which with the gain of the leaky ReLU keep the variance (He et al. 2015), N(0, 1) class
    embeddings (N(0, 1 / features) in the discriminator) and zero biases."""
    fans = {f"{name}.conv.weight": module.fan_in for name, module in net.named_modules() if isinstance(module, Conv)}
    for index, (name, parameter) in enumerate(net.named_parameters()):
        if name.endswith("bias"):
            parameter.zero_()
            continue
        fan = fans.get(name, parameter[0].numel())
        if name.startswith("classes.") and isinstance(net, Generator):
            fan = 1
        layers.init_normal_(parameter, 1 / math.sqrt(fan), seed=seed, index=first + index)
