"""DiT: diffusion transformer with adaLN-zero conditioning (Peebles & Xie 2023).

State-dict names are those of the public DiT checkpoints: `x_embedder.proj`, `t_embedder.mlp.0`,
`t_embedder.mlp.2`, `y_embedder.embedding_table`, `pos_embed`, `blocks.N.attn.qkv`, `blocks.N.attn.proj`,
`blocks.N.mlp.fc1`, `blocks.N.mlp.fc2`, `blocks.N.adaLN_modulation.1`, `final_layer.linear`,
`final_layer.adaLN_modulation.1`. In memory all adaLN matrices, a third of XL's parameters, are one linear
layer `modulation`, so one product gives the modulation of the whole network; hooks split it when a state
dict is written and join it when one is read.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from genengine import ops
from genengine.nets import layers
from genengine.nets.conditioned import Conditioned, LastLayer
from genengine.ops.patch_step import unpatchify


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT.

    Attributes:
        image_size: height and width of x.  patch_size: divides image_size.  in_channels: channels of x.
        dim: token width, a multiple of 4 and of num_heads.  depth: number of blocks.  num_heads: heads.
        mlp_ratio: hidden width of the MLP over dim.
        num_classes: classes; 0 for an unconditional network. Index num_classes means "no class".
        learn_sigma: output 2 * in_channels, the second half for a learned variance.
        time_scale: the embedding sees time_scale * t; 1000 for t in [0, 1], 1 for t in 0 .. 999.
        time_features: sinusoidal features of time.
    """

    image_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    time_scale: float = 1000.0
    time_features: int = 256

    def __post_init__(self):
        whole = ("image_size", "patch_size", "in_channels", "dim", "depth", "num_heads", "time_features")
        for name in whole:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"nets/DiT: {name} must be an int >= 1, got {value!r}")
        if not isinstance(self.num_classes, int) or self.num_classes < 0:
            raise ValueError(f"nets/DiT: num_classes must be an int >= 0, got {self.num_classes!r}; 0 is unconditional")
        for name in ("mlp_ratio", "time_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"nets/DiT: {name} must be a finite number > 0, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"nets/DiT: image_size must be a multiple of patch_size = {self.patch_size}, got "
                f"{self.image_size}; pad or resize the images"
            )
        if self.dim % 4 or self.dim % self.num_heads or self.time_features % 2:
            raise ValueError(
                f"nets/DiT: dim must be a multiple of 4 and of num_heads = {self.num_heads} and "
                f"time_features even, got dim={self.dim}, time_features={self.time_features}"
            )


def _public_configs():
    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    configs = {
        f"DIT_{name}_{patch}": {"dim": dim, "depth": depth, "num_heads": heads, "patch_size": patch}
        for name, (dim, depth, heads) in sizes.items()
        for patch in (2, 4, 8)
    }
    configs["tiny"] = {
        "image_size": 8, "patch_size": 2, "in_channels": 1, "dim": 64, "depth": 4, "num_heads": 2,
        "num_classes": 10, "learn_sigma": False, "time_features": 64,
    }  # fmt: skip
    return configs


# name -> DiTConfig fields: the paper's Table 1 on 32x32x4 latents, and `tiny` for the embedded digits.
CONFIGS = _public_configs()


class Block(nn.Module):
    """The two branches of a transformer block; `DiT` chains them through the fused gated adaLN."""

    def __init__(self, config):
        super().__init__()
        self.attn = layers.Attention(config.dim, config.num_heads)
        self.mlp = layers.Mlp(config.dim, int(config.dim * config.mlp_ratio))


class FinalLayer(nn.Module):
    """Projection of the normalised tokens to patch pixels."""

    def __init__(self, config, out_channels):
        super().__init__()
        self.linear = layers.linear(config.dim, config.patch_size**2 * out_channels)


class DiT(Conditioned):
    """Diffusion transformer: out = DiT(x, t, y), with the shape of x (twice the channels if `learn_sigma`).

    Per block, with LN without affine parameters and shift, scale, gate linear in silu(time + class):
        x = x + gate_a attn(LN(x) (1 + scale_a) + shift_a)
        x = x + gate_m mlp (LN(x) (1 + scale_m) + shift_m)
    Every "+ gate branch" is one `gated_adaln` with the norm that follows it, across block borders too.

    Args:
        config: DiTConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    Reference: Peebles & Xie, Scalable Diffusion Models with Transformers, 2023.
    """

    config_class, configs = DiTConfig, CONFIGS

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        self.grid = (config.image_size // config.patch_size,) * 2
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.x_embedder = layers.PatchEmbed(config.patch_size, config.in_channels, config.dim)
        self.t_embedder = layers.TimestepEmbedder(config.dim, config.time_features, config.time_scale)
        self.y_embedder = layers.LabelEmbedder(config.num_classes, config.dim) if config.num_classes else None
        self.register_buffer("pos_embed", layers.sincos_positions(config.dim, self.grid))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels)
        self.modulation = layers.linear(config.dim, (6 * config.depth + 2) * config.dim)
        self.register_state_dict_post_hook(_split_modulation)
        self.register_load_state_dict_pre_hook(_join_modulation)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed):
        """Glorot-uniform products, zero biases, N(0, 0.02^2) embeddings, and zero adaLN and output layers, so
        that every block starts as the identity (Peebles & Xie 2023, adaLN-zero)."""
        small = ("t_embedder.", "y_embedder.")
        zero = ("modulation.", "final_layer.linear.")
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name.startswith(zero) or name.endswith("bias"):
                parameter.zero_()
            elif name.startswith(small):
                layers.init_normal_(parameter, 0.02, seed=seed, index=index)
            else:
                layers.init_xavier_(parameter, seed=seed, index=index)

    def _run(self, x, modulation):
        tokens = self.final_layer.linear(self._tokens(x, modulation))
        return unpatchify(tokens, self.grid, self.config.patch_size, self.out_channels)

    def last_layer(self):
        layer = self.final_layer.linear
        plain = type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
        if not plain or type(self)._run is not DiT._run:
            return None
        return LastLayer(layer.weight, layer.bias, self.config.patch_size)

    def _tokens(self, x, modulation):
        b, d = x.shape[0], self.config.dim
        # 6 depth + 2 views (B, D); row stride (6 depth + 2) D
        rows = modulation.view(b, 6 * self.config.depth + 2, d).unbind(1)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        h = ops.adaln(x, rows[1], rows[0])
        for i, block in enumerate(self.blocks):
            # shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, then the next norm's shift and scale
            r = rows[6 * i : 6 * i + 8]
            x, h = ops.gated_adaln(x, block.attn(h), r[2], r[4], r[3])
            x, h = ops.gated_adaln(x, block.mlp(h), r[5], r[7], r[6])
        return h


def _modulation_parts(net, prefix):
    """(state-dict name, number of D-row groups) of each piece of `modulation`, in order."""
    parts = [(f"{prefix}blocks.{i}.adaLN_modulation.1", 6) for i in range(net.config.depth)]
    return [*parts, (f"{prefix}final_layer.adaLN_modulation.1", 2)]


def _split_modulation(net, state_dict, prefix, local_metadata):
    parts = _modulation_parts(net, prefix)
    for kind in ("weight", "bias"):
        packed = state_dict.pop(f"{prefix}modulation.{kind}", None)
        if packed is None:
            continue
        pieces = packed.split([groups * net.config.dim for _, groups in parts])
        for (name, _), piece in zip(parts, pieces, strict=True):
            state_dict[f"{name}.{kind}"] = piece


def _join_modulation(net, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
    for kind in ("weight", "bias"):
        packed = getattr(net.modulation, kind)
        pieces, complete = [], True
        for name, groups in _modulation_parts(net, prefix):
            piece = state_dict.pop(f"{name}.{kind}", None)
            shape = (groups * net.config.dim, *packed.shape[1:])
            if piece is None:
                missing.append(f"{name}.{kind}")
            elif tuple(piece.shape) != shape:
                errors.append(f"size mismatch for {name}.{kind}: expected {shape}, got {tuple(piece.shape)}")
            else:
                pieces.append(piece)
                continue
            complete = False
        state_dict[f"{prefix}modulation.{kind}"] = torch.cat(pieces) if complete else packed.detach()
