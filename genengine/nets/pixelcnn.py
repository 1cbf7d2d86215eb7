"""PixelCNN: autoregressive convolutional networks over pixels, gated with two stacks or plain with one.

van den Oord et al., Pixel Recurrent Neural Networks, 2016 (masks A and B, ordered channels); van den Oord et al.,
Conditional Image Generation with PixelCNN Decoders, 2016 (two stacks, gates, class bias); Salimans et al., PixelCNN++,
2017 (mixture of logistics).

No kernel is computed and then masked away. A mask in raster order is two rectangles, the rows above and the pixels to
the left, so every masked convolution is ordinary convolutions with smaller kernels over padded or shifted input. Only
the tap on the pixel itself, where colour channels are ordered, is a 1x1 product with a masked weight.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from genengine import ops
from genengine.nets import configs, layers
from genengine.ops.logistic_mixture import MAX_CHANNELS, params_per_component

MODES = ("gated", "plain")
HEADS = ("categorical", "logistic_mixture")


@dataclasses.dataclass(frozen=True)
class PixelCNNConfig:
    """Shape of a PixelCNN.

    Attributes:
        image_size: height and width of x.  in_channels: channels of x; at most 4 for a mixture of logistics.
        num_levels: values of a pixel, level i standing for 2 i / (num_levels - 1) - 1.
        num_classes: classes; 0 for an unconditional network. Index num_classes means "no class".
        dim: features of each stack; a multiple of in_channels for a categorical head.
        depth: gated layers.
        kernel_size, first_size: odd; side of the square kernel that is masked, of the first layer `first_size`.
        mode: "gated", or "plain": one stack, which never sees a wedge of pixels up to the right (its blind spot).
        head: "categorical", or "logistic_mixture" with the parameters that `ops.logistic_mixture_log_prob` takes.
        components: logistics in the mixture; only that head has them.
        head_dim: hidden features of the head, a multiple of in_channels for a categorical one.
        embedding: features by which a level enters, from a learned table, where neighbouring levels have nothing in
            common (codes); 0 to enter as the number it stands for.
        dropout: share of the gated features that is dropped in training, in [0, 1).
    """

    image_size: int = 32
    in_channels: int = 3
    num_levels: int = 256
    num_classes: int = 0
    dim: int = 96
    depth: int = 12
    kernel_size: int = 3
    first_size: int = 7
    mode: str = "gated"
    head: str = "logistic_mixture"
    components: int = 10
    head_dim: int = 192
    embedding: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        sizes = ("image_size", "in_channels", "dim", "depth", "components", "head_dim")
        configs.check_ints("nets/PixelCNN", self, sizes)
        configs.check_ints("nets/PixelCNN", self, ("num_classes", "embedding"), least=0)
        configs.check_ints("nets/PixelCNN", self, ("num_levels",), least=2)
        configs.check_ints("nets/PixelCNN", self, ("kernel_size", "first_size"), least=3)
        configs.check_share("nets/PixelCNN", self, "dropout")
        for name, choices in (("mode", MODES), ("head", HEADS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"nets/PixelCNN: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not self.kernel_size % 2 or not self.first_size % 2:
            raise ValueError(
                "nets/PixelCNN: kernel_size and first_size must be odd, so that a pixel is in the middle, got "
                f"{self.kernel_size} and {self.first_size}"
            )
        if self.head == "logistic_mixture" and self.in_channels > MAX_CHANNELS:
            raise ValueError(
                f"nets/PixelCNN: in_channels must be 1 to {MAX_CHANNELS} for a mixture of logistics, got "
                f"{self.in_channels}; use head='categorical'"
            )
        if self.dim % self.groups or self.head_dim % self.groups:
            raise ValueError(
                f"nets/PixelCNN: dim and head_dim must be multiples of in_channels = {self.groups}, whose features are "
                f"kept apart, got {self.dim} and {self.head_dim}"
            )

    @property
    def groups(self):
        """Groups of features in the order of the colour channels: group c has seen channels 0 .. c - 1 of its pixel.

        The mixture of logistics couples the channels itself: there one group has seen none.
        """
        return self.in_channels if self.head == "categorical" else 1

    @property
    def out_features(self):
        """Numbers per pixel that the head puts out."""
        if self.head == "categorical":
            return self.num_levels * self.in_channels
        return self.components * params_per_component(self.in_channels)


# name -> PixelCNNConfig fields: `tiny` for the embedded digits, `codes` for an 8x8 grid of 512 codes, the others for
# small colour images.
CONFIGS = {
    "tiny": {
        "image_size": 8, "in_channels": 1, "num_levels": 17, "num_classes": 10, "dim": 32, "depth": 6,
        "head": "categorical", "head_dim": 64,
    },
    "codes": {
        "image_size": 8, "in_channels": 1, "num_levels": 512, "num_classes": 0, "dim": 64, "depth": 8,
        "head": "categorical", "head_dim": 128, "embedding": 64,
    },
    "small": {"dim": 96, "depth": 12},
    "base": {"dim": 160, "depth": 20, "head_dim": 320},
}  # fmt: skip


def group_mask(in_groups, out_groups, strict):
    """1 where a feature may see another of the same pixel: group(in) <= group(out), or < if strict (masks B and A).

    Args:
        in_groups: (I,) int group of each input feature.  out_groups: (O,).
    Returns:
        (O, I, 1, 1) float32.
    """
    ahead = out_groups[:, None] - in_groups[None, :]
    return (ahead > 0 if strict else ahead >= 0).float()[:, :, None, None]


def _groups(features, groups):
    return torch.arange(groups).repeat_interleave(features // groups)


class PixelProduct(nn.Module):
    """1x1 convolution between the features of one pixel; with several groups, each output sees the groups up to its
    own (mask B)."""

    def __init__(self, in_features, out_features, groups, *, bias=True, pairs=1):
        super().__init__()
        self.conv = _conv(in_features, out_features, (1, 1), bias)
        mask = group_mask(_groups(in_features, groups), _groups(out_features // pairs, groups).repeat(pairs), False)
        self.register_buffer("mask", mask if groups > 1 else None, persistent=False)

    def weight(self):
        return self.conv.weight if self.mask is None else self.conv.weight * self.mask

    def forward(self, x):
        return F.conv2d(x, self.weight(), self.conv.bias)


class Left(nn.Module):
    """Convolution over the pixel itself and the `reach` pixels to its left; the first layer (mask A) leaves out the
    pixel itself, but for the earlier colour channels."""

    def __init__(self, in_features, out_features, reach, groups, *, first):
        super().__init__()
        self.reach, self.centre = reach, groups > 1 or not first
        self.conv = _conv(in_features, out_features, (1, reach + self.centre), bias=False)
        mask = None
        if groups > 1:  # out_features are pairs (tanh, sigmoid), each half in groups
            mask = torch.ones(out_features, in_features, 1, reach + 1)
            outs = _groups(out_features // 2, groups).repeat(2)
            mask[..., -1:] = group_mask(_groups(in_features, groups), outs, first)
        self.register_buffer("mask", mask, persistent=False)

    def weight(self):
        return self.conv.weight if self.mask is None else self.conv.weight * self.mask

    def forward(self, x):
        weight = self.weight()
        if self.centre:
            return F.conv2d(F.pad(x, (self.reach, 0)), weight)
        return F.conv2d(F.pad(x, (self.reach, -1)), weight)  # the last column is to the left of nobody


class Layer(nn.Module):
    """One gated layer. With gate(u) = tanh(u_1) sigmoid(u_2) of the two halves, class biases c and c', and `down`
    moving every row down by one:

        u = V * v                          the rows up to this one; v' = gate(u + c)
        h' = h + R gate(N down(u) + L * h + c')       (no "h +" in the first layer, whose h is the image)

    v' never sees anything to the right or left in its row that `down` has not moved above it. The plain layer has no
    v: its rows above are those of h.
    """

    def __init__(self, config, in_features, *, first):
        super().__init__()
        dim, groups = config.dim, config.groups
        self.first, self.plain = first, config.mode == "plain"
        self.reach = (config.first_size if first else config.kernel_size) // 2
        rows = self.reach + (not self.plain)
        self.above = _conv(in_features, 2 * dim, (rows, 2 * self.reach + 1), bias=True)
        self.down = None if self.plain else _conv(2 * dim, 2 * dim, (1, 1), bias=False)
        self.left = Left(in_features, 2 * dim, self.reach, groups, first=first)
        self.out = PixelProduct(dim, dim, groups)

    def kernels(self):
        """Name -> tensor of the layer's weights, masks applied."""
        found = {"above": self.above.weight, "above_bias": self.above.bias, "left": self.left.weight(),
                 "out": self.out.weight()[..., 0, 0], "out_bias": self.out.conv.bias}  # fmt: skip
        return found if self.plain else found | {"down": self.down.weight[..., 0, 0]}

    def forward(self, v, h, bias, keep):
        """v, h (B, F, H, W); bias (B, 2, 2 D) of the class or None; keep (B, D, H, W) dropout factors or None."""
        side = self.reach
        above = F.conv2d(F.pad(v, (side, side, side, -1 if self.plain else 0)), self.above.weight, self.above.bias)
        if self.plain:  # kernel of `side` rows over rows -side .. H - 2: output row y has seen y - side .. y - 1
            u = above
        else:
            u = self.down(F.pad(above[:, :, :-1], (0, 0, 1, 0)))
            v = _gate(above, bias, 0)
        g = _gate(u + self.left(h), bias, 1)
        if keep is not None:
            g = g * keep
        h = self.out(g) if self.first else h + self.out(g)
        return (h if self.plain else v), h


def _gate(u, bias, stack):
    if bias is not None:
        u = u + bias[:, stack, :, None, None]
    a, b = u.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def _conv(in_features, out_features, kernel, bias):
    return nn.utils.skip_init(
        nn.Conv2d, in_features, out_features, kernel, bias=bias, device=torch.get_default_device()
    )


class PixelCNN(nn.Module):
    """The distribution of every pixel given those before it, in raster order and within a pixel by channel.

    out = PixelCNN(x, y): out at (row, column) is a function of x at the pixels before it alone (and, where channels
    are ordered, logits of channel c see channels 0 .. c - 1 of the pixel too).

    Args:
        config: PixelCNNConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    """

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        features = config.in_channels * max(config.embedding, 1)
        device = torch.get_default_device()
        self.table = None
        if config.embedding:
            self.table = nn.utils.skip_init(
                nn.Embedding, config.in_channels * config.num_levels, config.embedding, device=device
            )
        self.layers = nn.ModuleList(
            Layer(config, config.dim if i else features, first=not i) for i in range(config.depth)
        )
        size = config.image_size
        self.positions = nn.Parameter(torch.empty(2, config.dim, size, size))  # of the stacks v and h, after layer 0
        self.classes = None
        if config.num_classes:
            self.classes = layers.LabelEmbedder(config.num_classes, config.depth * 4 * config.dim)
        self.hidden = PixelProduct(config.dim, config.head_dim, config.groups)
        self.out = PixelProduct(config.head_dim, config.out_features, config.groups)
        self._packed = {}  # what `packed` gave, and of what
        self.reset_parameters(seed)

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from a name in `CONFIGS`, a dict of `PixelCNNConfig` fields or a PixelCNNConfig, fields replaced by
        `overrides`.

        Raises:
            ValueError: unknown name or field, or values that do not fit together.
        """
        return cls(configs.resolve("nets/PixelCNN", PixelCNNConfig, CONFIGS, config, overrides), seed=seed)

    @torch.no_grad()
    def reset_parameters(self, seed):
        """Glorot-uniform convolutions, N(0, 1) embeddings of levels, zero biases, classes and positions. A categorical
        output starts at zero, the uniform distribution; a mixture with means spread over [-1, 1]."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name == "out.conv.weight" and self.config.head == "categorical":
                parameter.zero_()
            elif name.startswith("table."):
                layers.init_normal_(parameter, 1.0, seed=seed, index=index)
            elif name.endswith("bias") or name.startswith(("classes.", "positions")):
                parameter.zero_()
            else:
                layers.init_xavier_(parameter, seed=seed, index=index)
        if self.config.head == "logistic_mixture" and not self.out.conv.weight.is_meta:
            k, c = self.config.components, self.config.in_channels
            self.out.conv.weight.mul_(0.1)
            self.out.conv.bias[k : k + c * k] = torch.linspace(-1, 1, k).repeat(c)
            self.out.conv.bias[k + c * k : k + 2 * c * k] = math.log(1.0 / k)

    @property
    def null_class(self):
        """The label that means "no class": num_classes."""
        return self.config.num_classes

    @property
    def reach(self):
        """Rows above its own that a pixel's distribution can see."""
        config = self.config
        rows = config.first_size // 2 + (config.depth - 1) * (config.kernel_size // 2)
        return rows + (config.mode == "gated")  # `down` moves the vertical stack by a row

    def forward(self, x, y=None, *, dropout=None, first_row=0):
        """Args:
            x: (B, C, H, W) floating point in [-1, 1]; or some of the rows of such images, in which case the output is
                that of the whole image from row first_row + `reach` on (everywhere, if first_row = 0).
            y: (B,) int64 in 0 .. num_classes, num_classes meaning "no class"; None for no class.
            dropout: None for none, or the dict (seed, sample_ids, step) of the draws: element
                ((layer D + feature) H + row) W + column of the stream "dropout".
            first_row: place in the image of the first row of x.
        Returns:
            categorical: logits (B, L, C, H, W) of the levels; logistic_mixture: its parameters (B, P, H, W).
        Raises:
            ValueError: x does not fit the config; y does not fit x, is given to an unconditional network or out of
                range (on a CPU: on a GPU a look at the values would stall it).
            TypeError: y is no integer tensor.
        """
        config = self.config
        self._check(x, y, first_row)
        bias = self._biases(y, len(x), x.device)
        keep = self._keep(x, dropout)
        place = self.positions[:, :, first_row : first_row + x.shape[2]]
        v = h = self._features(x)
        for i, layer in enumerate(self.layers):
            v, h = layer(v, h, None if bias is None else bias[:, i], None if keep is None else keep[:, i])
            if i == 0:
                h = h + place[1]
                v = h if config.mode == "plain" else v + place[0]
        h = F.conv2d(torch.relu(h), self.hidden.weight())
        h = self.out(ops.bias_act(h, self.hidden.conv.bias, activation="relu"))
        if config.head == "categorical":
            return h.unflatten(1, (config.in_channels, config.num_levels)).transpose(1, 2)
        return h

    def kernels(self):
        """Name -> tensor of all weights, masks applied, as `ops.pack_pixelcnn` takes them."""
        found = {"positions": self.positions}
        for name, product in (("hidden", self.hidden), ("logits", self.out)):
            found |= {name: product.weight()[..., 0, 0], f"{name}_bias": product.conv.bias}
        for i, layer in enumerate(self.layers):
            found |= {f"layers.{i}.{name}": tensor for name, tensor in layer.kernels().items()}
        if self.classes is not None:
            found["classes"] = self.classes.embedding_table.weight.unflatten(
                1, (self.config.depth, 2, 2 * self.config.dim)
            )
        if self.table is not None:
            found["table"] = self.table.weight
        return found

    def packed(self, dtype=None, *, fold=False):
        """The weights as `ops.pixelcnn_sample` reads them; packed anew when a parameter has changed.

        What is written through `.data` counts as no change, to torch neither: write under `torch.no_grad()` instead.

        dtype: float32 or bfloat16; None for the parameters' own (float32 of float16).  fold: see `ops.pack_pixelcnn`.
        """
        dtype = dtype or (torch.float32 if self.positions.dtype == torch.float16 else self.positions.dtype)
        if any(p.is_inference() for p in self.parameters()):  # nobody counts what is written to these
            return self._pack(dtype, fold)
        state = tuple((p.data_ptr(), p._version, p.device) for p in self.parameters())
        if (dtype, fold) not in self._packed or self._packed[dtype, fold][0] != state:
            self._packed[dtype, fold] = state, self._pack(dtype, fold)
        return self._packed[dtype, fold][1]

    def _pack(self, dtype, fold):
        config = self.config
        sizes = {"size": config.image_size, "channels": config.in_channels, "levels": config.num_levels}
        components = config.components if config.head == "logistic_mixture" else 0
        return ops.pack_pixelcnn(self.kernels(), **sizes, components=components, dtype=dtype, fold=fold)

    def __getstate__(self):
        """Copies and pickles are without the packed weights, which would double their size."""
        return {**self.__dict__, "_packed": {}}

    def _features(self, x):
        """What the first layer sees: the pixels, or the embeddings of their levels (B, C E, H, W)."""
        if self.table is None:
            return x
        levels, c = self.config.num_levels, self.config.in_channels
        index = torch.round((x + 1) * (0.5 * (levels - 1))).clamp(0, levels - 1).long()
        index = index + levels * torch.arange(c, device=x.device).view(c, 1, 1)
        return self.table(index).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, C, H, W, E) -> (B, C E, H, W)

    def _biases(self, y, b, device):
        """Class biases of all layers and stacks (B, depth, 2, 2 D), or None."""
        if self.classes is None:
            return None
        if y is None:
            y = torch.full((b,), self.null_class, device=device)
        return self.classes(y).view(b, self.config.depth, 2, 2 * self.config.dim)

    def _keep(self, x, dropout):
        """Dropout factors 0 or 1 / (1 - rate), (B, depth, D, H, W), or None."""
        rate = self.config.dropout
        if dropout is None or rate == 0:
            return None
        shape = (len(x), self.config.depth, self.config.dim, *x.shape[2:])
        u = ops.uniform(shape, stream="dropout", device=x.device, **dropout)
        return (u >= rate).to(x.dtype) * (1 / (1 - rate))

    def _check(self, x, y, first_row):
        size, channels = self.config.image_size, self.config.in_channels
        rows = size - first_row if first_row else size
        fits = x.ndim == 4 and x.shape[1] == channels and x.shape[3] == size and 0 < x.shape[2] <= rows
        if not fits or (first_row == 0 and x.shape[2] != size):
            raise ValueError(
                f"nets/PixelCNN: x must be (B, C, H, W) = (B, {channels}, {rows}, {size}), got {tuple(x.shape)}; "
                "resize x or build the network with another image_size"
            )
        layers.check_labels("nets/PixelCNN", y, len(x), self.config.num_classes)
