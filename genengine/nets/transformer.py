"""Transformer: a decoder over sequences of tokens, such as the pixels of a digit or the codes of a VQ-VAE.

Vaswani et al., Attention is all you need, 2017 (causal self-attention); Xiong et al., On layer normalization in the
transformer architecture, 2020 (norms before the branches); Chen et al., Generative pretraining from pixels, 2020
(images as sequences); Peebles & Xie, Scalable diffusion models with transformers, 2023 (norms without gain and bias:
the product that follows each of them has its own).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from genengine.nets import configs, layers
from genengine.nets.packed import Packed
from genengine.ops.attention import MAX_HEAD_DIM
from genengine.ops.transformer_sample import NORM_EPS, pack_transformer


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Transformer.

    Attributes:
        length: tokens of a sequence, N.  num_levels: values of a token, 0 .. V - 1.
        num_classes: classes; 0 for an unconditional network. Index num_classes means "no class".
        dim: width of the residual stream, a multiple of num_heads.  depth: number of blocks.
        num_heads: heads, of at most 256 features each.  mlp_ratio: hidden width of the MLP over dim.
    """

    length: int = 256
    num_levels: int = 512
    num_classes: int = 0
    dim: int = 256
    depth: int = 6
    num_heads: int = 4
    mlp_ratio: int = 4

    def __post_init__(self):
        sizes = ("length", "dim", "depth", "num_heads", "mlp_ratio")
        configs.check_ints("nets/Transformer", self, sizes)
        configs.check_ints("nets/Transformer", self, ("num_levels",), least=2)
        configs.check_ints("nets/Transformer", self, ("num_classes",), least=0)
        if self.dim % self.num_heads or self.dim // self.num_heads > MAX_HEAD_DIM:
            raise ValueError(
                f"nets/Transformer: dim must be a multiple of num_heads = {self.num_heads} and at most {MAX_HEAD_DIM} "
                f"for each, got {self.dim}; choose another num_heads"
            )


# name -> TransformerConfig fields: `tiny` for the pixels of the embedded digits, `codes` for an 8x8 grid of 512 codes,
# the others for 16x16 grids.
CONFIGS = {
    "tiny": {
        "length": 64, "num_levels": 17, "num_classes": 10, "dim": 64, "depth": 4, "num_heads": 4,
    },
    "codes": {"length": 64, "dim": 128, "depth": 4, "num_heads": 4},
    "small": {"length": 256, "dim": 256, "depth": 6, "num_heads": 4},
    "base": {"length": 256, "num_levels": 1024, "num_classes": 1000, "dim": 768, "depth": 12, "num_heads": 12},
}  # fmt: skip


class Block(nn.Module):
    """h = x + attn(LN(x)),  x' = h + mlp(LN(h)),  LN without affine parameters."""

    def __init__(self, config):
        super().__init__()
        self.attn = layers.Attention(config.dim, config.num_heads, causal=True)
        self.mlp = layers.Mlp(config.dim, config.dim * config.mlp_ratio)

    def forward(self, x):
        x = x + self.attn(_norm(x))
        return x + self.mlp(_norm(x))


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class Transformer(nn.Module):
    """The distribution of every token given those before it and the class.

        x_0 = start[y] + positions[0],    x_i = levels[tokens[i - 1]] + positions[i]
        logits = out(LN(block(... block(x))))

    logits[:, i] are a function of tokens[:, :i] and y alone.

    Args:
        config: TransformerConfig.
        seed: int in [0, 2^64) of the initial weights (stream "model"); no global generator is touched.
    """

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        self.levels = nn.utils.skip_init(nn.Embedding, config.num_levels, config.dim, device=device)
        self.start = layers.LabelEmbedder(config.num_classes, config.dim)
        self.positions = nn.Parameter(torch.empty(config.length, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.out = layers.linear(config.dim, config.num_levels)
        self._packed = Packed()
        self.reset_parameters(seed)

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from a name in `CONFIGS`, a dict of `TransformerConfig` fields or a TransformerConfig, fields replaced
        by `overrides`.

        Raises:
            ValueError: unknown name or field, or values that do not fit together.
        """
        return cls(configs.resolve("nets/Transformer", TransformerConfig, CONFIGS, config, overrides), seed=seed)

    @torch.no_grad()
    def reset_parameters(self, seed):
        """Glorot-uniform products, N(0, 0.02^2) tables, zero biases. The output starts at zero: the uniform
        distribution."""
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("bias") or name == "out.weight":
                parameter.zero_()
            elif name.startswith(("levels.", "start.", "positions")):
                layers.init_normal_(parameter, 0.02, seed=seed, index=index)
            else:
                layers.init_xavier_(parameter, seed=seed, index=index)

    @property
    def null_class(self):
        """The label that means "no class": num_classes."""
        return self.config.num_classes

    def forward(self, tokens, y=None):
        """Args:
            tokens: (B, N) int64 in 0 .. num_levels - 1, N the config's `length` or less.
            y: (B,) int64 in 0 .. num_classes, num_classes meaning "no class"; None for no class.
        Returns:
            logits (B, N, V): those at i of token i, given the tokens before it. The last token is never looked at.
        Raises:
            ValueError: tokens do not fit the config; y does not fit tokens, is given to an unconditional network or
                out of range (on a CPU: on a GPU a look at the values would stall it).
            TypeError: tokens or y are no integer tensors.
        """
        self._check(tokens, y)
        if y is None:
            y = torch.full((len(tokens),), self.null_class, device=tokens.device)
        first = self.start(y)[:, None]  # (B, 1, D)
        n = tokens.shape[1]
        x = torch.cat([first, self.levels(tokens[:, : n - 1])], dim=1) + self.positions[:n]  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.out(_norm(x))

    def named_weights(self):
        """The weights by the names that `ops.pack_transformer` takes."""
        found = {
            "levels": self.levels.weight,
            "positions": self.positions,
            "start": self.start.embedding_table.weight,
        }
        for i, block in enumerate(self.blocks):
            products = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
            for name, product in products.items():
                found[f"blocks.{i}.{name}.weight"], found[f"blocks.{i}.{name}.bias"] = product.weight, product.bias
        return found | {"out.weight": self.out.weight, "out.bias": self.out.bias}

    def packed(self, dtype=None):
        """The weights as `ops.transformer_sample` takes them, packed anew only after a parameter has changed.

        What is written through `.data` counts as no change, to torch neither: write under `torch.no_grad()` instead.

        Args:
            dtype: of the matrices: float32, bfloat16 or float64; None for the parameters' own (float32 of float16).
        Raises:
            ValueError: a weight that is not finite.
        """
        weights, own = self.named_weights(), self.positions.dtype
        dtype = dtype or (torch.float32 if own == torch.float16 else own)
        pack = lambda: pack_transformer(weights, num_heads=self.config.num_heads, dtype=dtype)  # noqa: E731
        return self._packed.get(dtype, weights.values(), pack)

    def _check(self, tokens, y):
        length = self.config.length
        if not isinstance(tokens, torch.Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            got = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise TypeError(f"nets/Transformer: tokens must be an int64 tensor, got {got}; convert it with .long()")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= length:
            raise ValueError(
                f"nets/Transformer: tokens must be (B, N) with N in 1 .. {length}, got {tuple(tokens.shape)}; build "
                "the network with another length"
            )
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= self.config.num_levels:
                raise ValueError(
                    f"nets/Transformer: tokens must be in 0 .. {self.config.num_levels - 1}, got "
                    f"{low if low < 0 else high}"
                )
        layers.check_labels("nets/Transformer", y, len(tokens), self.config.num_classes)
