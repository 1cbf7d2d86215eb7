"""What `ops.transformer_sample` computes with: a transformer's weights in the form that every backend reads, and one
step of its cached evaluation in torch, whose position lives on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine import random
from genengine.ops import _check, _panels
from genengine.ops._categorical import inverse_cdf, log_prob
from genengine.ops.attention import MAX_HEAD_DIM, reference_attention
from genengine.ops.normal import reference_uniform

NORM_EPS = 1e-6
_STREAM = random.STREAMS["uniform"]
MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Sizes(NamedTuple):
    """D, H, blocks, hidden features of the MLP, V values of a token, N tokens, classes (0: none)."""

    dim: int
    num_heads: int
    depth: int
    hidden: int
    num_levels: int
    length: int
    num_classes: int

    def products(self) -> Iterator[tuple[str, int, int]]:
        """(name, K, N) of the matrices of y = x W, W (K, N), in the order in which they are packed."""
        for i in range(self.depth):
            yield f"blocks.{i}.qkv", self.dim, 3 * self.dim
            yield f"blocks.{i}.proj", self.dim, self.dim
            yield f"blocks.{i}.fc1", self.dim, self.hidden
            yield f"blocks.{i}.fc2", self.hidden, self.dim
        yield "out", self.dim, self.num_levels

    def vectors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of what is no matrix, in the order in which it is packed."""
        yield "levels", (self.num_levels, self.dim)
        yield "positions", (self.length, self.dim)
        yield from ((f"{name}.bias", (columns,)) for name, _, columns in self.products())
        yield "start", (self.num_classes + 1, self.dim)

    def numel(self, name: str, shape: tuple[int, ...]) -> int:
        """Elements that a vector takes: biases are filled with zeros to whole panels."""
        return _panels.padded(1, shape[0])[1] if name.endswith(".bias") else shape[0] * shape[1]


@dataclass(frozen=True)
class TransformerWeights:
    """A transformer packed by `pack_transformer`.

    matrices: flat, every product's matrix in panels (`ops._panels`), in the order of `Sizes.products`; float32,
    bfloat16 or float64. vectors: flat, tables and biases in the order of `Sizes.vectors`; float32, float64 of float64.
    Biases are filled with zeros as the columns of their matrices are.
    """

    matrices: Tensor
    vectors: Tensor
    sizes: Sizes

    def to(self, device: torch.device | str) -> TransformerWeights:
        """The same on another device."""
        return TransformerWeights(self.matrices.to(device), self.vectors.to(device), self.sizes)


def pack_transformer(
    tensors: Mapping[str, Tensor], *, num_heads: int, dtype: torch.dtype | None = None
) -> TransformerWeights:
    """The weights of a decoder-only transformer, as `ops.transformer_sample` takes them.

        x_0 = start[y] + positions[0],    x_i = levels[tokens[i - 1]] + positions[i]
        x <- x + proj(attn(qkv(LN(x)))),    x <- x + fc2(gelu(fc1(LN(x))))      for every block; gelu by tanh
        logits = out(LN(x))                                                    LN without gain and bias, eps = 1e-6

    Args:
        tensors: "levels" (V, D), "positions" (N, D), "start" (C + 1, D), and of each product a weight (out, in) and a
            bias (out,): "blocks.0.qkv.weight", "blocks.0.qkv.bias", "blocks.0.proj.weight", ..., "fc1", "fc2",
            "blocks.1.qkv.weight", ..., "out.weight", "out.bias". qkv: q, k and v of all heads one after another.
        num_heads: H, a divisor of D.
        dtype: of the matrices: float32, bfloat16 or float64 (reference only); None: that of "positions".
    Returns:
        TransformerWeights, copies on the tensors' device. bfloat16: products round what enters them to bfloat16 and add
        up in float32, and keys and values are kept in bfloat16; the rest stays float32.
    Raises:
        ValueError: a tensor that is missing, unknown, of a wrong shape or not finite.  TypeError: another dtype.
    """
    op = "pack_transformer"
    sizes = _sizes(op, tensors, num_heads)
    dtype = tensors["positions"].dtype if dtype is None else dtype
    if dtype not in MATRIX_DTYPES:
        raise TypeError(f"{op}: dtype must be {', '.join(map(str, MATRIX_DTYPES))}, got {dtype}")
    shapes = {f"{name}.weight": (columns, rows) for name, rows, columns in sizes.products()} | dict(sizes.vectors())
    if unknown := sorted(set(tensors) - set(shapes)):
        raise ValueError(f"{op}: tensors must be named {', '.join(list(shapes)[:2])}, ..., got also {unknown[0]!r}")
    device = tensors["positions"].device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, shape in shapes.items():
        _check_weight(op, name, tensors.get(name), shape, device, dtype if name.endswith(".weight") else wide)
    with torch.no_grad():
        matrices = [_panels.pack(tensors[f"{name}.weight"].to(dtype).T) for name, *_ in sizes.products()]
        vectors = [
            F.pad(tensors[name].to(wide).flatten(), (0, sizes.numel(name, shape) - tensors[name].numel()))
            for name, shape in sizes.vectors()
        ]
        return TransformerWeights(torch.cat(matrices), torch.cat(vectors), sizes)


def _sizes(op, tensors, num_heads):
    for name in ("levels", "positions", "start", "blocks.0.fc1.weight"):
        if name not in tensors:
            raise ValueError(f"{op}: tensors must hold {name!r}, got {', '.join(tensors) or 'nothing'}")
        if not isinstance(tensors[name], Tensor) or tensors[name].dim() != 2:
            raise ValueError(f"{op}: {name} must be a tensor of two dimensions, got {_described(tensors[name])}")
    rows = lambda name: tensors[name].shape[0]  # noqa: E731
    depth = sum(name.startswith("blocks.") and name.endswith(".qkv.weight") for name in tensors)
    dim = tensors["positions"].shape[1]
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads or dim // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: num_heads must divide D = {dim} into heads of at most {MAX_HEAD_DIM} features, got {num_heads!r}"
        )
    hidden, classes = rows("blocks.0.fc1.weight"), rows("start") - 1
    return Sizes(dim, num_heads, depth, hidden, rows("levels"), rows("positions"), classes)


def _check_weight(op, name, tensor, shape, device, dtype):
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be a tensor {shape}, got {_described(tensor)}")
    _check.dtype(op, name, tensor)
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like positions, got {tensor.device}")
    if not torch.isfinite(tensor.to(dtype)).all():
        raise ValueError(
            f"{op}: {name} must be finite in {dtype}, got NaN or infinity; a training that diverged leaves them"
        )


def _described(value):
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


# ---- the network in torch --------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """y = x W + b, W (K, N). `storage`: what x is rounded to before, and what keys and values are kept in."""

    weight: Tensor
    bias: Tensor
    storage: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.bfloat16:  # on a GPU, whose products add up in float32 by themselves
            return torch.mm(x.to(self.storage), self.weight, out_dtype=torch.float32) + self.bias
        return torch.addmm(self.bias, x.to(self.storage).to(self.weight.dtype), self.weight)


class Network(NamedTuple):
    """The tensors of a packed transformer."""

    sizes: Sizes
    levels: Tensor
    positions: Tensor
    start: Tensor
    blocks: list[tuple[Product, Product, Product, Product]]
    out: Product


def sizes_of(op: str, matrices: Tensor, vectors: Tensor, shape: tuple[int, ...], length: int) -> Sizes:
    """The sizes, checked against the packed tensors; shape: (D, H, blocks, hidden, V)."""
    sizes = Sizes(*shape, length, 0)
    expected = sum(_panels.numel(rows, columns) for _, rows, columns in sizes.products())
    if matrices.numel() != expected:
        raise ValueError(f"{op}: matrices must hold {expected} elements for {sizes}, got {matrices.numel()}")
    least = sum(sizes.numel(*vector) for vector in sizes.vectors())
    rows, rest = divmod(vectors.numel() - least, sizes.dim)
    if rows < 0 or rest:
        raise ValueError(f"{op}: vectors must hold {least} + {sizes.dim} C elements for {sizes}, got {vectors.numel()}")
    return sizes._replace(num_classes=rows)


def unpack_transformer(matrices: Tensor, vectors: Tensor, sizes: Sizes) -> Network:
    """Dense matrices of packed weights, some of them views; on a CPU those of bfloat16 as float32, where it adds up."""
    widen = matrices.dtype == torch.bfloat16 and matrices.device.type != "cuda"
    parts, at = {}, 0
    for name, shape in sizes.vectors():
        parts[name] = vectors[at : at + torch.Size(shape).numel()].view(shape)
        at += sizes.numel(name, shape)
    products, at = {}, 0
    for name, rows, columns in sizes.products():
        count = _panels.numel(rows, columns)
        weight = _panels.unpack(matrices[at : at + count], rows, columns)
        weight = weight.float() if widen else weight
        products[name] = Product(weight, parts[f"{name}.bias"], matrices.dtype)
        at += count
    blocks = [
        tuple(products[f"blocks.{i}.{name}"] for name in ("qkv", "proj", "fc1", "fc2")) for i in range(sizes.depth)
    ]
    return Network(sizes, parts["levels"], parts["positions"], parts["start"], blocks, products["out"])


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def prefix_logits(net: Network, labels: Tensor, tokens: Tensor) -> Tensor:
    """The logits (B, V) of token i from tokens (B, i) by a pass over all of them: the definition, without a cache."""
    sizes, (batch, before) = net.sizes, tokens.shape
    first = net.start[labels][:, None]  # (B, 1, D)
    x = torch.cat([first, net.levels[tokens]], 1) + net.positions[: before + 1]
    x = x.flatten(0, 1)  # (B N, D)
    for qkv, proj, fc1, fc2 in net.blocks:
        heads = qkv(norm(x)).to(qkv.storage).to(x.dtype)
        q, k, v = heads.view(batch, before + 1, 3, sizes.num_heads, -1).unbind(2)  # (B, N, H, D / H)
        o, _ = reference_attention(q, k, v, True, q.shape[-1] ** -0.5)
        x = x + proj(o.flatten(2).flatten(0, 1))
        x = x + fc2(F.gelu(fc1(norm(x)), approximate="tanh"))
    return net.out(norm(x.view(batch, before + 1, -1)[:, -1]))


@dataclass
class State:
    """What the cached steps of B sequences read and write.

    tokens (B, N) int64; log_prob (B, N); u (B, N) float32 uniforms; known (B, N) bool or None; cache
    (blocks, 2, B, H, N, D / H), the keys and values so far; position (1,) int64, that of the next token; row (B, D),
    the embedding of the one before it.
    """

    tokens: Tensor
    log_prob: Tensor
    u: Tensor
    known: Tensor | None
    cache: Tensor
    position: Tensor
    row: Tensor
    temperature: float

    def begin(self, net: Network, labels: Tensor, first: int) -> None:
        """Before the step at position `first`."""
        self.position.fill_(first)
        self.row.copy_(net.levels[self.tokens[:, first - 1]] if first else net.start[labels])


def uniforms(tokens, seed, sample_ids):
    """The uniform of every token (B, N)."""
    u = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    reference_uniform(u, seed, sample_ids, 0, _STREAM)
    return u


def new_state(sizes, temperature, u, known, tokens, log_prob, cache):
    """A State on these tensors, its cache in the reference's layout."""
    batch, head = len(tokens), sizes.dim // sizes.num_heads
    shape = (sizes.depth, 2, batch, sizes.num_heads, sizes.length, head)
    cache = cache[: torch.Size(shape).numel()].view(shape)
    position = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    row = log_prob.new_empty(batch, sizes.dim)
    return State(tokens, log_prob, u, known, cache, position, row, temperature)


def step(net: Network, state: State, seen: int, *, exact: bool) -> None:
    """Draw the token at `state.position`, and move on; nothing is read back to the host.

    seen: keys that are looked at, more than the position; exact: it is the position + 1, else the rest is masked.
    """
    heads, position = net.sizes.num_heads, state.position
    mask = None if exact else (torch.arange(seen, device=position.device) <= position)[None, None, None]
    x = state.row + net.positions.index_select(0, position)  # (B, D)
    for (qkv, proj, fc1, fc2), cache in zip(net.blocks, state.cache.unbind(0), strict=True):
        q, k, v = qkv(norm(x)).to(cache.dtype).view(len(x), 3, heads, 1, -1).unbind(1)  # (B, H, 1, D / H)
        keys, values = cache.unbind(0)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        o = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], mask)
        x = x + proj(o.flatten(1))
        x = x + fc2(F.gelu(fc1(norm(x)), approximate="tanh"))
    logits = net.out(norm(x))
    _draw(state, logits)
    state.row.copy_(net.levels.index_select(0, state.tokens.index_select(1, position)[:, 0]))
    position += 1


def _draw(state, logits):
    position = state.position
    token = inverse_cdf(logits.float(), state.u.index_select(1, position)[:, 0], state.temperature)
    logs = log_prob(logits, token, state.temperature)
    if state.known is not None:
        known = state.known.index_select(1, position)[:, 0]
        token = torch.where(known, state.tokens.index_select(1, position)[:, 0], token)
        logs = torch.where(known, 0.0, logs)
    state.tokens.index_copy_(1, position, token[:, None])
    state.log_prob.index_copy_(1, position, logs[:, None].to(state.log_prob.dtype))
