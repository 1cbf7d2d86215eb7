"""UNet: the convolutional diffusion network (Ho et al. 2020; Dhariwal & Nichol 2021).

Every GroupNorm + SiLU, with its modulation by time and class, is one `group_norm_silu`, joined to the sum that ends the
residual branch before it where a norm follows one (`add_group_norm_silu`); images are channels_last inside. All
modulations of the network are one linear layer, so a sampling run computes them once.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from genengine import ops
from genengine.nets import configs, layers
from genengine.nets.conditioned import Conditioned
from genengine.ops.attention import MAX_HEAD_DIM

MODULATIONS = ("scale_shift", "add")
# Elements from which, on a CPU, a sum and the norm of it take less time in one op than in two: below, one more pass
# over the cache costs less than handling one more tensor (`genengine bench group_norm_silu` times both).
LEAST_JOINED = 1 << 17


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet.

    Attributes:
        image_size: height and width of x, divisible by 2^(len(multipliers) - 1).  in_channels: channels of x.
        channels: width of the first resolution; multipliers: width of each resolution over `channels`.
        num_blocks: residual blocks per resolution going down; one more going up.
        attention: the resolutions (heights in pixels) whose blocks are followed by self-attention.
        head_dim: width of a head there, dividing every width with attention; 0 for one head.
        num_groups: of the group normalisations, dividing every width.
        num_classes: classes; 0 for an unconditional network. Index num_classes means "no class".
        learn_sigma: output 2 * in_channels, the second half for a learned variance.
        modulation: how a block takes in time and class: "scale_shift" of the second normalisation (AdaGN), or
            "add" to the features before it, as in DDPM.
        fourier: frequencies k: sin(2^k pi x) and cos(2^k pi x) are given to the network beside x, so that it sees
            differences far below the range of x (Kingma et al. 2021, section 5.1).
        time_scale: the embedding sees time_scale * t; 1000 for t in [0, 1], 1 for t in 0 .. 999.
        time_features: sinusoidal features of time; 0 for as many as `channels`.
    """

    image_size: int = 32
    in_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention: tuple[int, ...] = (16,)
    head_dim: int = 0
    num_groups: int = 32
    num_classes: int = 10
    learn_sigma: bool = False
    modulation: str = "scale_shift"
    fourier: tuple[int, ...] = ()
    time_scale: float = 1000.0
    time_features: int = 0

    def __post_init__(self):
        for name in ("multipliers", "attention", "fourier"):
            value, least = getattr(self, name), 1 if name != "fourier" else 0
            if not isinstance(value, (tuple, list)) or not all(configs.is_int(v, least) for v in value):
                raise ValueError(f"nets/UNet: {name} must be ints >= {least}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        configs.check_ints("nets/UNet", self, ("image_size", "in_channels", "channels", "num_blocks", "num_groups"))
        configs.check_ints("nets/UNet", self, ("num_classes", "head_dim", "time_features"), least=0)
        if not configs.is_number(self.time_scale) or not self.time_scale:
            raise ValueError(f"nets/UNet: time_scale must be a finite number > 0, got {self.time_scale!r}")
        if self.modulation not in MODULATIONS:
            raise ValueError(f"nets/UNet: modulation must be one of {', '.join(MODULATIONS)}, got {self.modulation!r}")
        self._check_widths()

    def _check_widths(self):
        if not self.multipliers:
            raise ValueError("nets/UNet: multipliers must name at least one resolution, got ()")
        factor = 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"nets/UNet: image_size must be a multiple of 2^(len(multipliers) - 1) = {factor}, got "
                f"{self.image_size}; pad or resize the images, or use fewer multipliers"
            )
        wrong = [m for m in self.multipliers if self.channels * m % self.num_groups]
        if self.channels % self.num_groups or wrong:
            raise ValueError(
                f"nets/UNet: num_groups must divide every width, got num_groups={self.num_groups} and widths "
                f"{[self.channels * m for m in self.multipliers]}"
            )
        unknown = sorted(set(self.attention) - set(self.resolutions))
        if unknown:
            raise ValueError(f"nets/UNet: attention must be among {self.resolutions}, got {unknown[0]}")
        for width in (self.channels * self.multipliers[-1], *self._attention_widths()):
            if width % self.head_dim if self.head_dim else width > MAX_HEAD_DIM:
                raise ValueError(
                    f"nets/UNet: head_dim must divide the width {width} of a resolution with attention and give heads "
                    f"of at most {MAX_HEAD_DIM}, got head_dim={self.head_dim}"
                )
        if self.time_width % 2:
            raise ValueError(f"nets/UNet: time_features (or channels) must be even, got {self.time_width}")

    @property
    def resolutions(self):
        """Heights in pixels, from the image's down."""
        return [self.image_size // 2**level for level in range(len(self.multipliers))]

    @property
    def time_width(self):
        """The sinusoidal features of time."""
        return self.time_features or self.channels

    def _attention_widths(self):
        return [self.channels * m for m, r in zip(self.multipliers, self.resolutions, strict=True)
                if r in self.attention]  # fmt: skip


# name -> UNetConfig fields: `tiny` for the embedded digits, `cifar` the network of DDPM's 32x32 experiments (Ho et al.
# 2020, appendix B: 35.7 million weights), `image64` that of Improved DDPM (Nichol & Dhariwal 2021) at 64x64.
CONFIGS = {
    "tiny": {
        "image_size": 8, "in_channels": 1, "channels": 32, "multipliers": (1, 2), "num_blocks": 1, "attention": (4,),
        "head_dim": 32, "num_groups": 8, "num_classes": 10,
    },
    "cifar": {
        "image_size": 32, "in_channels": 3, "channels": 128, "multipliers": (1, 2, 2, 2), "num_blocks": 2,
        "attention": (16,), "num_classes": 0, "modulation": "add",
    },
    "image64": {
        "image_size": 64, "in_channels": 3, "channels": 128, "multipliers": (1, 2, 3, 4), "num_blocks": 3,
        "attention": (16, 8), "head_dim": 64, "num_classes": 1000, "learn_sigma": True,
    },
}  # fmt: skip


def _conv(in_channels, out_channels, size, stride=1):
    """`nn.Conv2d` with uninitialised weights, padded to keep the image's size (over the stride)."""
    return nn.utils.skip_init(
        nn.Conv2d, in_channels, out_channels, size, stride=stride, padding=size // 2,
        device=torch.get_default_device(),
    )  # fmt: skip


class Norm(nn.Module):
    """The weights of a group normalisation, run as `group_norm_silu`."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.num_groups = num_groups
        device = torch.get_default_device()
        self.weight = nn.Parameter(torch.ones(channels, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, device=device))

    def forward(self, x, scale=None, shift=None, silu=True):
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, scale, shift, silu=silu)

    def after(self, x, branch, silu=True):
        """The sum x + branch (branch None: x) and its norm."""
        if branch is not None and x.device.type == "cpu" and x.numel() < LEAST_JOINED:
            x, branch = x + branch, None
        if branch is None:
            return x, self(x, silu=silu)
        return ops.add_group_norm_silu(x, branch, self.weight, self.bias, self.num_groups, silu=silu)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), the second norm modulated; a 1x1 `skip` where widths differ.

    x is the sum of `x` and `branch` (or None), what the layer before left to be added; so are the two that it returns,
    behind the sum that it began with.
    """

    def __init__(self, in_channels, out_channels, num_groups):
        super().__init__()
        self.norm1 = Norm(in_channels, num_groups)
        self.conv1 = _conv(in_channels, out_channels, 3)
        self.norm2 = Norm(out_channels, num_groups)
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.skip = _conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, branch, scale, shift):
        x, h = self.norm1.after(x, branch)
        h = self.conv1(h)
        adds = scale is None
        h = self.norm2(h + shift[:, :, None, None]) if adds else self.norm2(h, scale, shift)
        return x, x if self.skip is None else self.skip(x), self.conv2(h)


class AttentionBlock(nn.Module):
    """x + attention over all pixels of norm(x), of sums as in `ResBlock`."""

    def __init__(self, channels, num_groups, head_dim):
        super().__init__()
        self.norm = Norm(channels, num_groups)
        self.attn = layers.Attention(channels, channels // head_dim if head_dim else 1)

    def forward(self, x, branch):
        b, c, height, width = x.shape
        x, h = self.norm.after(x, branch, silu=False)
        tokens = h.permute(0, 2, 3, 1).reshape(b, height * width, c)
        return x, self.attn(tokens).view(b, height, width, c).permute(0, 3, 1, 2)  # channels_last, as x


class Stage(nn.Module):
    """A residual block and, at some resolutions, attention, of sums as in `ResBlock`."""

    def __init__(self, in_channels, out_channels, config, attention):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, config.num_groups)
        self.attn = AttentionBlock(out_channels, config.num_groups, config.head_dim) if attention else None

    def forward(self, x, branch, scale, shift):
        first, x, branch = self.res(x, branch, scale, shift)
        return first, *((x, branch) if self.attn is None else self.attn(x, branch))


class UNet(Conditioned):
    """U-Net: out = UNet(x, t, y), with the shape of x (twice the channels if `learn_sigma`).

    Going down, each resolution has num_blocks stages and, but for the last, a strided convolution; two stages lie in
    the middle, the first with attention; going up, each resolution has num_blocks + 1 stages, every one of which is
    also given the output of the layer of its size on the way down, and nearest-neighbour upsampling with a
    convolution. The last convolutions of blocks, attention and network start at zero.

    Args:
        config: UNetConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    Reference: Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, section 3 (adaptive group normalisation).
    """

    config_class, configs = UNetConfig, CONFIGS

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        dim = 4 * config.channels
        self.t_embedder = layers.TimestepEmbedder(dim, config.time_width, config.time_scale)
        self.y_embedder = layers.LabelEmbedder(config.num_classes, dim) if config.num_classes else None
        self.conv_in = _conv(config.in_channels * (1 + 2 * len(config.fourier)), config.channels, 3)
        self._build(config)
        self.norm_out = Norm(config.channels, config.num_groups)
        self.conv_out = _conv(config.channels, self.out_channels, 3)
        stages = [*self.down, *self.middle, *self.up]
        parts = 2 if config.modulation == "scale_shift" else 1
        self._widths = [stage.res.conv1.out_channels for stage in stages for _ in range(parts)]
        self.modulation = layers.linear(dim, sum(self._widths))
        self.reset_parameters(seed)
        self.to(memory_format=torch.channels_last)

    def _build(self, config):
        """Stages and resamplings, and the widths of the skip connections between them."""
        widths = [config.channels * m for m in config.multipliers]
        attention = [r in config.attention for r in config.resolutions]
        width, skips = config.channels, [config.channels]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.downsample, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, out in enumerate(widths):
            for _ in range(config.num_blocks):
                self.down.append(Stage(width, out, config, attention[level]))
                width = out
                skips.append(width)
            if level + 1 < len(widths):
                self.downsample.append(_conv(width, width, 3, stride=2))
                skips.append(width)
        self.middle = nn.ModuleList(Stage(width, width, config, attention=first) for first in (True, False))
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.num_blocks + 1):
                self.up.append(Stage(width + skips.pop(), out, config, attention[level]))
                width = out
            if level:
                self.upsample.append(_conv(width, width, 3))

    @torch.no_grad()
    def reset_parameters(self, seed):
        """Glorot-uniform products and convolutions, identity norms, zero biases, N(0, 0.02^2) classes, and zero
        last convolutions and projections, so that every block starts as the identity."""
        zero = ("conv2.weight", "attn.proj.weight", "conv_out.weight")
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if "norm" in name:
                parameter.fill_(float(name.endswith("weight")))
            elif name.endswith("bias") or name.endswith(zero):
                parameter.zero_()
            elif name.startswith("y_embedder."):
                layers.init_normal_(parameter, 0.02, seed=seed, index=index)
            elif parameter.ndim == 4:
                _init_conv_(parameter, seed=seed, index=index)
            else:
                layers.init_xavier_(parameter, seed=seed, index=index)

    def _run(self, x, modulation):
        layout = _layout(x)
        rows = list(modulation.split(self._widths, dim=1))  # views (B, C); row stride sum(widths)
        if self.config.modulation == "scale_shift":
            pairs = iter(list(zip(rows[0::2], rows[1::2], strict=True)))
        else:
            pairs = iter([(None, shift) for shift in rows])
        # The features are x + branch: the norm that comes next adds the two and keeps the sum, which is `first`.
        x, branch = self.conv_in(self._features(x).contiguous(memory_format=torch.channels_last)), None
        skips, levels = [], len(self.config.multipliers)
        down, up = iter(self.down), iter(self.up)
        for level in range(levels):
            for _ in range(self.config.num_blocks):
                first, x, branch = next(down)(x, branch, *next(pairs))
                skips.append(first)
            if level + 1 < levels:
                skips.append(x + branch)
                x, branch = self.downsample[level](skips[-1]), None
        first, x, branch = self.middle[0](x, branch, *next(pairs))
        skips.append(first)
        _, x, branch = self.middle[1](x, branch, *next(pairs))
        for level in range(levels):
            for _ in range(self.config.num_blocks + 1):
                x = x if branch is None else x + branch
                _, x, branch = next(up)(torch.cat([x, skips.pop()], dim=1), None, *next(pairs))
            if level + 1 < levels:
                x = self.upsample[level](F.interpolate(x + branch, scale_factor=2, mode="nearest"))
                branch = None
        _, h = self.norm_out.after(x, branch)
        return self.conv_out(h).contiguous(memory_format=layout)

    def _features(self, x):
        """x and its Fourier features, (B, C (1 + 2 F), H, W)."""
        if not self.config.fourier:
            return x
        wide = x if x.dtype == torch.float64 else x.float()  # 16 bits would lose the phase
        angles = [wide * (2.0**k * math.pi) for k in self.config.fourier]
        waves = [wave.to(x.dtype) for angle in angles for wave in (angle.sin(), angle.cos())]
        return torch.cat([x, *waves], dim=1)


def _layout(x):
    channels_last = x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _init_conv_(parameter, *, seed, index):
    """Glorot's uniform range with the fans of a convolution, c k k on both sides."""
    if parameter.is_meta:
        return
    out_channels, in_channels, height, width = parameter.shape
    bound = math.sqrt(6.0 / ((in_channels + out_channels) * height * width))
    draw = ops.uniform((1, parameter.numel()), seed=seed, step=index, stream="model", device=parameter.device)
    parameter.copy_((bound * (2.0 * draw - 1.0)).view(parameter.shape))
