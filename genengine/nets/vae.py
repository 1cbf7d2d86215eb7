"""Encoders and decoders of variational autoencoders: of fully connected layers, or of convolutions.

Kingma & Welling 2014; class-conditional: Sohn, Lee & Yan 2015; the convolutional blocks are those of Ho et al. 2020
without time, as in Rombach et al. 2022.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from genengine import ops
from genengine.nets import configs, layers

KINDS = ("mlp", "conv")
_NET = "nets/VAENet"


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of an encoder and a decoder.

    Attributes:
        image_size: height and width of x; a multiple of 2^(len(widths) - 1) for "conv".
        in_channels: channels of x.  out_channels: maps of the decoder's output, the likelihood's parameters.
        kind: "mlp" or "conv".
        widths: "mlp": hidden layers of the encoder, the decoder has them in reverse; "conv": channels per
            resolution, halving the size from one to the next.
        latent_dim: size of z; channels of z if `spatial`.
        spatial: z is (B, latent_dim, h, w), h = image_size / 2^(len(widths) - 1); only for "conv".
        blocks: residual blocks per resolution of "conv".  groups: of its normalisations, divides every width.
        num_classes: classes; 0 for none.  conditional: encoder and decoder see the class.
        dropout: share in [0, 1) of hidden units ("conv": of channels) hidden in training.
        input_dropout: the same of the encoder's inputs.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 6
    kind: str = "conv"
    widths: tuple[int, ...] = (64, 128, 256)
    latent_dim: int = 128
    spatial: bool = False
    blocks: int = 1
    groups: int = 8
    num_classes: int = 0
    conditional: bool = False
    dropout: float = 0.0
    input_dropout: float = 0.0

    def __post_init__(self):
        configs.check_ints(_NET, self, ("image_size", "in_channels", "out_channels", "latent_dim", "blocks", "groups"))
        configs.check_ints(_NET, self, ("num_classes",), least=0)
        configs.check_widths(_NET, self, "widths")
        configs.check_share(_NET, self, "dropout")
        configs.check_share(_NET, self, "input_dropout")
        if self.kind not in KINDS:
            raise ValueError(f"{_NET}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("spatial", "conditional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{_NET}: {name} must be True or False, got {getattr(self, name)!r}")
        if self.conditional and not self.num_classes:
            raise ValueError(f"{_NET}: num_classes must be >= 1 with conditional=True, got 0")
        if self.kind == "mlp" and self.spatial:
            raise ValueError(f"{_NET}: spatial must be False for kind 'mlp', got True; use kind='conv'")
        if self.kind == "conv":
            factor = 2 ** (len(self.widths) - 1)
            if self.image_size % factor:
                raise ValueError(
                    f"{_NET}: image_size must be a multiple of 2^(len(widths) - 1) = {factor}, got "
                    f"{self.image_size}; pad or resize the images, or drop a width"
                )
            if any(width % self.groups for width in self.widths):
                raise ValueError(f"{_NET}: widths must be multiples of groups = {self.groups}, got {self.widths}")

    @property
    def latent_shape(self):
        """Shape of one z."""
        if not self.spatial:
            return (self.latent_dim,)
        return (self.latent_dim,) + (self.image_size >> (len(self.widths) - 1),) * 2


# name -> VAEConfig fields: "tiny" for the embedded digits, "kl_f4" the kind of autoencoder latent diffusion uses.
CONFIGS = {
    "tiny": {
        "image_size": 8, "in_channels": 1, "out_channels": 2, "kind": "mlp", "widths": (256, 256), "latent_dim": 16,
        "num_classes": 10,
    },
    "tiny_conv": {
        "image_size": 8, "in_channels": 1, "out_channels": 2, "kind": "conv", "widths": (32, 64), "latent_dim": 16,
        "num_classes": 10,
    },
    "mlp": {
        "image_size": 28, "in_channels": 1, "out_channels": 2, "kind": "mlp", "widths": (512, 512), "latent_dim": 32,
    },
    "conv_32": {"image_size": 32, "widths": (64, 128, 256), "latent_dim": 128, "blocks": 2},
    "conv_64": {"image_size": 64, "widths": (64, 128, 256, 256), "latent_dim": 256, "blocks": 2},
    "kl_f4": {"image_size": 64, "widths": (64, 128, 256), "latent_dim": 4, "spatial": True, "blocks": 2},
}  # fmt: skip


class _Conv(nn.Conv2d):
    """A same-padded convolution with uninitialised weights."""

    def __init__(self, channels, out, size, stride=1):
        super().__init__(channels, out, size, stride, size // 2, device="meta")
        self.to_empty(device=torch.get_default_device())


class DenseStack(nn.Module):
    """Linear, GELU (bias and activation in one pass), ..., Linear; the class is added before the first GELU."""

    def __init__(self, sizes, num_classes):
        super().__init__()
        self.layers = nn.ModuleList(layers.linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.y_embedder = layers.LabelEmbedder(num_classes, sizes[1]) if num_classes else None
        self.units = tuple(sizes[1:-1])

    def forward(self, h, y=None, masks=None):
        """h (B, in) -> (B, out); masks: a (B, units) factor for each hidden layer."""
        for i, layer in enumerate(self.layers[:-1]):
            h = F.linear(h, layer.weight)
            if i == 0 and self.y_embedder is not None:
                h = h + self.y_embedder(y).to(h.dtype)
            h = ops.bias_gelu(h, layer.bias)
            h = h if masks is None else h * masks[i].to(h.dtype)
        return self.layers[-1](h)


class Residual(nn.Module):
    """x + conv(norm_silu(conv(norm_silu(x)))); the class scales and shifts the second norm."""

    def __init__(self, channels, groups, num_classes):
        super().__init__()
        self.groups = groups
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = _Conv(channels, channels, 3), _Conv(channels, channels, 3)
        self.y_embedder = layers.LabelEmbedder(num_classes, 2 * channels) if num_classes else None

    def forward(self, x, y=None, mask=None):
        h = self.conv1(ops.group_norm_silu(x, self.norm1.weight, self.norm1.bias, self.groups))
        scale, shift = (None, None) if self.y_embedder is None else self.y_embedder(y).to(h.dtype).chunk(2, dim=1)
        h = ops.group_norm_silu(h, self.norm2.weight, self.norm2.bias, self.groups, scale, shift)
        h = h if mask is None else h * mask[:, :, None, None].to(h.dtype)
        return x + self.conv2(h)


class ConvEncoder(nn.Module):
    """Image to features: a stem, residual blocks, and strided convolutions between resolutions."""

    def __init__(self, config, out):
        super().__init__()
        self.config, widths = config, config.widths
        classes = config.num_classes if config.conditional else 0
        self.stem = _Conv(config.in_channels, widths[0], 3)
        self.blocks = nn.ModuleList(Residual(w, config.groups, classes) for w in widths for _ in range(config.blocks))
        self.down = nn.ModuleList(_Conv(a, b, 3, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norm = nn.GroupNorm(config.groups, widths[-1])
        side = config.image_size >> (len(widths) - 1)
        self.out = _Conv(widths[-1], out, 1) if config.spatial else layers.linear(widths[-1] * side * side, out)
        self.units = tuple(w for w in widths for _ in range(config.blocks))

    def forward(self, x, y=None, masks=None):
        h = self.stem(x)
        for level in range(len(self.config.widths)):
            h = h if level == 0 else self.down[level - 1](h)
            h = _run_blocks(self, level, h, y, masks)
        h = ops.group_norm_silu(h, self.norm.weight, self.norm.bias, self.config.groups)
        return self.out(h if self.config.spatial else h.flatten(1))


class ConvDecoder(nn.Module):
    """Features to the likelihood's maps: residual blocks, and nearest doubling with a convolution between them."""

    def __init__(self, config):
        super().__init__()
        self.config, widths = config, tuple(reversed(config.widths))
        classes = config.num_classes if config.conditional else 0
        self.side = config.image_size >> (len(widths) - 1)
        features = config.latent_dim
        self.stem = (
            _Conv(features, widths[0], 3) if config.spatial else layers.linear(features, widths[0] * self.side**2)
        )
        self.blocks = nn.ModuleList(Residual(w, config.groups, classes) for w in widths for _ in range(config.blocks))
        self.up = nn.ModuleList(_Conv(a, b, 3) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norm = nn.GroupNorm(config.groups, widths[-1])
        self.out = _Conv(widths[-1], config.out_channels, 3)
        self.units = tuple(w for w in widths for _ in range(config.blocks))

    def forward(self, z, y=None, masks=None):
        h = self.stem(z)
        h = h if self.config.spatial else h.view(len(z), self.config.widths[-1], self.side, self.side)
        for level in range(len(self.config.widths)):
            h = h if level == 0 else self.up[level - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = _run_blocks(self, level, h, y, masks)
        return self.out(ops.group_norm_silu(h, self.norm.weight, self.norm.bias, self.config.groups))


def _run_blocks(stack, level, h, y, masks):
    count = stack.config.blocks
    for i in range(level * count, (level + 1) * count):
        h = stack.blocks[i](h, y, None if masks is None else masks[i])
    return h


class VAENet(nn.Module):
    """q(z | x, y) = N(mean, exp(logvar)) and the parameters of p(x | z, y).

    Args:
        config: VAEConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    """

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        classes = config.num_classes if config.conditional else 0
        if config.kind == "mlp":
            pixels = config.image_size**2
            self.encoder = DenseStack((config.in_channels * pixels, *config.widths, 2 * config.latent_dim), classes)
            out = (config.latent_dim, *reversed(config.widths), config.out_channels * pixels)
            self.decoder = DenseStack(out, classes)
        else:
            self.encoder, self.decoder = ConvEncoder(config, 2 * config.latent_dim), ConvDecoder(config)
        self.reset_parameters(seed)

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from a name in `CONFIGS`, a dict of `VAEConfig` fields or a VAEConfig, fields replaced by
        `overrides`.

        Raises:
            ValueError: unknown name or field, or values that do not fit together.
        """
        return cls(cls.describe(config, **overrides), seed=seed)

    @staticmethod
    def describe(config, **overrides):
        """The VAEConfig that `from_config` would build with."""
        return configs.resolve(_NET, VAEConfig, CONFIGS, config, overrides)

    @torch.no_grad()
    def reset_parameters(self, seed):
        """Glorot-uniform products, zero biases, norms as the identity, N(0, 0.02^2) embeddings."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "y_embedder" in name:
                layers.init_normal_(parameter, 0.02, seed=seed, index=index)
            else:
                layers.init_xavier_(parameter, seed=seed, index=index)

    @property
    def null_class(self):
        """The label that means "no class": num_classes."""
        return self.config.num_classes

    def encode(self, x, y=None, masks=None):
        """Args:
            x: (B, C, H, W) in [-1, 1].  y: (B,) int64 in 0 .. num_classes, or None for no class.
            masks: None, or what `dropout_masks` gave.
        Returns:
            mean, logvar: (B, *latent_shape) float32, halves of one tensor.
        Raises:
            ValueError: x does not fit the config; labels given to a network without them.
        """
        config = self.config
        if x.ndim != 4 or tuple(x.shape[1:]) != (config.in_channels, config.image_size, config.image_size):
            raise ValueError(
                f"{_NET}: x must be (B, C, H, W) = (B, {config.in_channels}, {config.image_size}, "
                f"{config.image_size}), got {tuple(x.shape)}; resize x or build the network with another image_size"
            )
        y = self._labels(y, x)
        if masks is not None:
            x = x if masks["input"] is None else x * masks["input"].view_as(x).to(x.dtype)
        if config.kind == "mlp":
            h = self.encoder(x.reshape(len(x), x.shape[1:].numel()), y, masks and masks["encoder"])
        else:
            h = self.encoder(_dense(x), y, masks and masks["encoder"])
        return h.float().chunk(2, dim=1)

    def decode(self, z, y=None, masks=None):
        """z (B, *latent_shape), y as in `encode` -> (B, out_channels, H, W), the likelihood's parameters.

        Raises:
            ValueError: z does not fit the config; labels given to a network without them.
        """
        config = self.config
        if tuple(z.shape[1:]) != config.latent_shape:
            raise ValueError(f"{_NET}: z must be (B, {', '.join(map(str, config.latent_shape))}), got {tuple(z.shape)}")
        y = self._labels(y, z)
        if config.kind == "mlp":
            out = self.decoder(z, y, masks and masks["decoder"])
            return out.view(len(z), config.out_channels, config.image_size, config.image_size)
        return self.decoder(_dense(z) if config.spatial else z, y, masks and masks["decoder"])

    def forward(self, x, y=None):
        """`encode`."""
        return self.encode(x, y)

    def dropout_masks(self, num, *, seed, sample_ids=None, step=0, device=None):
        """Factors 0 or 1 / (1 - dropout) for every hidden unit, or None if nothing is dropped.

        mask = (u >= dropout) / (1 - dropout), u = uniform(seed, sample, step, stream "dropout")[unit], the units
        counted over encoder, decoder and inputs in this order.
        """
        config = self.config
        if not config.dropout and not config.input_dropout:
            return None
        inputs = config.in_channels * config.image_size**2 if config.input_dropout else 0
        parts = (*self.encoder.units, *self.decoder.units, inputs)
        u = ops.uniform(
            (num, sum(parts)), seed=seed, sample_ids=sample_ids, step=step, stream="dropout", device=device
        ).split(parts, dim=1)  # fmt: skip
        masks = [(part >= config.dropout) / (1.0 - config.dropout) for part in u[:-1]]
        return {
            "encoder": masks[: len(self.encoder.units)],
            "decoder": masks[len(self.encoder.units) :],
            "input": (u[-1] >= config.input_dropout) / (1.0 - config.input_dropout) if inputs else None,
        }

    def _labels(self, y, like):
        """y, checked, with None as "no class" where the network has classes."""
        if not self.config.conditional:
            if y is not None:
                raise ValueError(f"{_NET}: y must be None for a network with conditional = False, got labels")
            return None
        if y is None:
            return torch.full((len(like),), self.null_class, dtype=torch.int64, device=like.device)
        if not isinstance(y, torch.Tensor) or tuple(y.shape) != (len(like),) or y.is_floating_point():
            raise ValueError(f"{_NET}: y must be (B,) = ({len(like)},) int64 in 0 .. {self.null_class}, got {y!r:.60}")
        return y


def _dense(x):
    """Channels innermost on a GPU, where the convolutions and norms gain by it."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x.contiguous()
