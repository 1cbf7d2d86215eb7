"""Layers shared by the networks, and their initialisation from the counter-based noise.

Constructors here leave weights uninitialised and draw nothing: `init_normal_` and `init_xavier_` fill them
as functions of (seed, index), so building a network never touches the global generator.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genengine import ops
from genengine.ops import _registry
from genengine.ops.bias_act import BIAS_ACT

# Where `linear_gelu` takes cuBLASLt's epilogue on a GPU: it saves writing and reading the hidden activations, 8 of the
# 16 units (rows x D x 2 bytes) that pass between the products of a DiT block; in float32 the products themselves take
# so long that there is little to save. `genengine bench linear_epilogues` times both.
GELU_EPILOGUE: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)


def linear(in_features, out_features):
    """`nn.Linear` with uninitialised weight (out, in) and bias (out,) on the default device."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, device=torch.get_default_device())


@torch.no_grad()
def init_normal_(parameter, std, *, seed, index):
    """parameter = std * normal(seed, sample=0, step=index, stream="model", element).

    Args:
        parameter: any shape, filled in place in its own dtype and device.  std: standard deviation.
        seed: int in [0, 2^64).  index: int, a different one for each parameter of a network.
    """
    if parameter.is_meta:  # shapes only, for instance to count parameters
        return
    draw = ops.normal((1, parameter.numel()), seed=seed, step=index, stream="model", device=parameter.device)
    parameter.copy_((std * draw).view(parameter.shape))


@torch.no_grad()
def init_xavier_(parameter, *, seed, index):
    """parameter = r (2 u - 1), r = sqrt(6 / (fan_in + fan_out)), u = uniform(seed, 0, index, "model").

    The weight is read as the matrix (shape[0], rest). Glorot & Bengio 2010.
    """
    if parameter.is_meta:
        return
    fan_out, fan_in = parameter.flatten(1).shape
    draw = ops.uniform((1, parameter.numel()), seed=seed, step=index, stream="model", device=parameter.device)
    parameter.copy_((math.sqrt(6.0 / (fan_in + fan_out)) * (2.0 * draw - 1.0)).view(parameter.shape))


def sincos_positions(dim, grid):
    """Fixed two-dimensional sine-cosine positions.

    The first dim/2 features encode the column, the others the row, each as [sin(p w_i), cos(p w_i)] with
    w_i = 10000^(-4 i / dim), i = 0 .. dim/4 - 1.

    Args:
        dim: features, a multiple of 4.  grid: (rows, columns).
    Returns:
        (1, rows*columns, dim) float32, tokens in row-major order.
    Reference: Vaswani et al. 2017, extended to two axes; Peebles & Xie 2023.
    """
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    parts = []
    for place in (column, row):
        angle = place.reshape(-1, 1) * omega  # (N, dim/4)
        parts += [np.sin(angle), np.cos(angle)]
    positions = torch.from_numpy(np.concatenate(parts, axis=1)[None].astype(np.float32))
    return positions.to(torch.get_default_device())


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, C, H, W) -> (B, N, D), as a strided convolution `proj`."""

    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.utils.skip_init(
            nn.Conv2d, in_channels, dim, patch_size, stride=patch_size, device=torch.get_default_device()
        )

    def forward(self, x):
        b, c, height, width = x.shape
        p = self.patch_size
        x = x.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, C, p, p)
        x = x.reshape(b, (height // p) * (width // p), c * p * p)  # (B, N, C p p); no -1, B may be 0
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of time through a two-layer MLP.

    e = [cos(s t w_i), sin(s t w_i)], w_i = 10000^(-i / half), half = features / 2; s = `time_scale`.
    Time runs from 0 (data) to 1 (noise) here, and the frequencies were made for 0 .. 999, hence s = 1000.
    """

    def __init__(self, dim, features=256, time_scale=1000.0):
        super().__init__()
        self.features, self.time_scale = features, time_scale
        self.mlp = nn.Sequential(linear(features, dim), nn.SiLU(), linear(dim, dim))

    def forward(self, t):
        half = self.features // 2
        rate = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
        angle = t.float()[:, None] * self.time_scale * rate
        wave = torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, features), float32 before any cast
        return self.mlp(wave.to(self.mlp[0].weight.dtype))


def check_labels(where, y, b, num_classes, *, null=True, may_sync=False):
    """Refuse labels that fit neither the batch nor the classes.

    Args:
        where: begins the message.  y: (b,) int64 on any device, or None.  num_classes: 0 for a network without.
        null: whether num_classes itself is a label, that of no class, and None stands for it.
        may_sync: read the values on a GPU too, which waits for it.
    Raises:
        ValueError: a wrong shape or a label out of range, or labels where there are no classes; TypeError: no integers.
    """
    if y is None and (null or num_classes == 0):
        return
    if num_classes == 0:
        raise ValueError(f"{where}: y must be None for a network with num_classes = 0, got labels")
    top = num_classes if null else num_classes - 1
    expected = f"{where}: y must be (B,) = ({b},) int64 in 0 .. {top}"
    if y is None:
        raise TypeError(f"{expected}, got NoneType; a conditional network needs a label for every image")
    if not isinstance(y, torch.Tensor) or y.dtype not in (torch.int64, torch.int32):
        got = y.dtype if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"{expected}, got {got}; convert it with torch.as_tensor(y).long()")
    if tuple(y.shape) != (b,):
        raise ValueError(f"{expected}, got shape {tuple(y.shape)}; give one label per sample")
    if b and (may_sync or (y.device.type == "cpu" and not torch.compiler.is_compiling())):
        low, high = (int(value) for value in y.aminmax())
        if low < 0 or high > top:
            remedy = f"; {top} means no class" if null else ""
            raise ValueError(f"{expected}, got {low if low < 0 else high}{remedy}")


class LabelEmbedder(nn.Module):
    """Class table with one more row, index `num_classes`, that stands for "no class" (Ho & Salimans 2022)."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.utils.skip_init(nn.Embedding, num_classes + 1, dim, device=torch.get_default_device())

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v are views into one packed projection. causal: no token sees later ones."""

    def __init__(self, dim, num_heads, *, causal=False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).unbind(2)  # (B, N, H, D/H)
        return self.proj(ops.attention(q, k, v, causal=self.causal).reshape(b, n, d))


def linear_gelu(x, weight, bias):
    """y = gelu(x W^T + bias), with the tanh form of GELU: the middle of an MLP.

    For inference on a GPU in a dtype of `GELU_EPILOGUE` it is one kernel, a product that ends in bias and GELU, both in
    float32. Elsewhere the product is followed by `bias_gelu`, which rounds it once more and has a backward; as it is
    under autocast and where a `genengine.backend` is named.

    Args:
        x: (..., D).  weight: (hidden, D).  bias: (hidden,). All of one dtype and device.
    Returns:
        (..., hidden), x's dtype.
    """
    if not _takes_epilogue(x, weight, bias):
        return ops.bias_gelu(F.linear(x, weight), bias, approximate="tanh")
    rows = x.reshape(-1, x.shape[-1])  # on a GPU the op has GELU's tanh form; elsewhere it would not
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], len(weight))


def _takes_epilogue(*tensors):
    x = tensors[0]
    if not x.is_cuda or x.dtype not in GELU_EPILOGUE or x.numel() == 0 or torch.is_autocast_enabled("cuda"):
        return False
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not needs_grad and _registry.named(BIAS_ACT) is None


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh form of GELU; fc1's bias is added where GELU passes over the product anyway."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)

    def forward(self, x):
        return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
