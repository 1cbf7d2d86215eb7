"""transformer_sample: sequences drawn from a decoder-only transformer, token by token with a KV cache, in one call.

The files it lacks, and why (see tests/test_architecture.py): kernels/transformer_sample.py and
csrc/cuda/transformer_sample.cu, for on a GPU a step is products and attention, which torch's own kernels do best;
what they leave to gain are launches, and a CUDA graph of one step, replayed for every token, takes those away
(ops/_transformer_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genengine.ops import _check, _registry, _transformer_graph
from genengine.ops._categorical import inverse_cdf, log_prob
from genengine.ops._cost import Cost, traffic
from genengine.ops._transformer import (
    NORM_EPS,
    Sizes,
    TransformerWeights,
    new_state,
    pack_transformer,
    prefix_logits,
    sizes_of,
    step,
    uniforms,
    unpack_transformer,
)

__all__ = [
    "NORM_EPS", "Sequences", "Sizes", "TransformerWeights", "cache_numel", "pack_transformer", "transformer_sample",
]  # fmt: skip

ORDERS = ("cached", "naive")
_LANES = 16
_RANGE_FLOPS = 2e9  # of a call between two looks for Ctrl-C: some hundredths of a second on one core
_REPORTS = 16  # calls of the callback, about


class Sequences(NamedTuple):
    """What `transformer_sample` drew.

    tokens: (B, N) int64. log_prob: (B, N) float32 (float64 of float64), in nats, 0 where known. done: positions drawn,
    N unless interrupted; from there on tokens are the known ones and 0, log_prob is 0.
    """

    tokens: Tensor
    log_prob: Tensor
    done: int


def transformer_sample(
    weights: TransformerWeights,
    num: int,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    given: Tensor | None = None,
    known: Tensor | None = None,
    order: str | None = None,
    callback: Callable[[int, int], object] | None = None,
    backend: str | None = None,
) -> Sequences:
    """Draw sequences of tokens, each token from the network's distribution given those before it and the class.

        u_i      = uniform(seed, sample_ids[b], step 0, stream "uniform")[i]
        logits_i = the network of `pack_transformer` at (labels[b], tokens_0 .. tokens_(i-1))
        tokens_i = inverse CDF of softmax(logits_i / temperature) at u_i,    log_prob_i = its log-probability

    A sample is a function of (seed, its id, its label) alone, whatever its batch, up to rounding in products, which may
    move a token whose uniform lies at the edge of two values.

    weights: as `pack_transformer` gives them (of a network: `nets.transformer.Transformer.packed`). num: sequences, B.
    labels: int64 (B,) in 0 .. C, C meaning "no class"; None for no class. temperature: in [1e-6, 1e6]. seed: int in
    [0, 2^64) or int64 tensor () or (B,). sample_ids: int64 (B,), default 0..B-1.
    given, known: int64 tokens (B or 1, N) and bool, broadcastable to (B, N): known tokens stay, every other sees the
    known and drawn ones before it.
    order: "cached" (the default): keys and values of earlier tokens are kept; "naive": a pass over all tokens so far
    for every token, on the reference alone.
    callback: callback(done, N) after every few tokens, on a GPU once they are there. Ctrl-C, or a KeyboardInterrupt
    that the callback raises, ends the call with the tokens drawn so far; on a GPU without a callback, where the call is
    queued at once, with none. backend: see `genengine.backend`; "cuda" replays CUDA graphs of torch's kernels, which
    the first call of a batch size and temperature records.

    Returns Sequences. Not differentiable.
    Raises TypeError or ValueError on bad arguments, RuntimeError if a named backend cannot run.
    Cost: reads weights, labels, seed, sample_ids, known, writes tokens, log_prob, keys and values; per sample at token
    i, with P weights in matrices and L blocks of H heads, 2 P + 4 D L (i + 1) flops of the products, without cache
    (i + 1) times the blocks' share of 2 P and the scores of all; L (H (i + 1) + F) + V + 1 exponentials, F the MLP's
    hidden features, those of the blocks as often as their products.
    Vaswani et al. 2017, "Attention is all you need"; Shazeer 2019, "Fast transformer decoding" (the cache).
    """
    op = "transformer_sample"
    _check_options(op, weights, num, temperature, order, callback)
    sizes, matrices = weights.sizes, weights.matrices
    device, cached = matrices.device, order != "naive"
    labels = _labels(op, labels, num, sizes, device)
    tokens, known = _given(op, given, known, num, sizes, device)
    seed = _check.seed_tensor(op, seed, device, num)
    sample_ids = _check.sample_ids(op, sample_ids, device, num)
    _check.no_grad_needed(op, (matrices, weights.vectors))
    name = _choose(device, matrices.dtype, cached, backend)
    fixed = (matrices, weights.vectors, *sizes[:5], labels, float(temperature), seed, sample_ids, known)
    cache = matrices.new_empty(cache_numel(sizes, num) if cached else 0)
    log_prob = torch.zeros(num, sizes.length, dtype=weights.vectors.dtype, device=device)
    run = _registry.overload(_OP, name)

    def call(first, last):
        run(*fixed, first, last, cached, tokens, log_prob, cache)

    return _draw(call, _ranges(sizes, num, callback, name), tokens, log_prob, callback)


def _draw(call, ranges, tokens, log_prob, callback):
    """call(first, last) for every range, reported on; what is there when a KeyboardInterrupt comes."""
    fresh, done = tokens.clone(), 0
    try:
        for first, last in ranges:
            call(first, last)
            done = last
            if callback is not None:
                if tokens.device.type == "cuda":
                    torch.cuda.current_stream(tokens.device).synchronize()
                callback(done, tokens.shape[1])
    except KeyboardInterrupt:
        tokens[:, done:], log_prob[:, done:] = fresh[:, done:], 0.0
    return Sequences(tokens, log_prob, done)


def _choose(device, dtype, cached, backend):
    """The backend; only the reference knows how to do without a cache."""
    if cached:
        return _registry.choose(_OP, device, dtype, backend)
    name = backend or _registry.named(_OP) or "reference"
    if name != "reference":
        raise RuntimeError(f"transformer_sample: order 'naive' runs on backend 'reference' alone, got {name!r}")
    return name


def _ranges(sizes, num, callback, backend):
    """[first, last) of every call: short enough on a CPU for Ctrl-C to be felt, and to be reported on."""
    count = sizes.length
    if backend == "cpu":
        flops = 2 * num * (sum(rows * columns for _, rows, columns in sizes.products()) + sizes.dim * count)
        count = max(1, min(count, int(_RANGE_FLOPS / max(flops, 1))))
    if callback is not None or backend == "reference":
        count = min(count, -(-sizes.length // _REPORTS))
    return [(first, min(first + count, sizes.length)) for first in range(0, sizes.length, count)]


def cache_numel(sizes, num):
    """Room for the keys and values of every token, whose layout is each backend's own: rows in whole vectors."""
    padded = [-(-size // _LANES) * _LANES for size in (sizes.length, sizes.dim // sizes.num_heads)]
    return 2 * sizes.depth * num * sizes.num_heads * padded[0] * padded[1]


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_options(op, weights, num, temperature, order, callback):
    if not isinstance(weights, TransformerWeights):
        raise TypeError(f"{op}: weights must be what pack_transformer returns, got {type(weights).__name__}")
    _check.num(op, num)
    _check.temperature(op, temperature)
    if order is not None and order not in ORDERS:
        raise ValueError(f"{op}: order must be one of {', '.join(ORDERS)} or None, got {order!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"{op}: callback must be callable, got {type(callback).__name__}")


def _labels(op, labels, num, sizes, device):
    if labels is None:
        return torch.full((num,), sizes.num_classes, device=device)
    _check.dtype(op, "labels", labels, (torch.int64, torch.int32))
    _check.shape(op, "labels", labels, "(B,)", (num,))
    _check_device(op, "labels", labels, device)
    _check_values(op, "labels", labels, sizes.num_classes)
    return labels.long().contiguous()


def _given(op, given, known, num, sizes, device):
    """tokens (B, N), the given ones where known and 0 elsewhere, and known (B, N) or None."""
    shape = (num, sizes.length)
    if given is None and known is None:
        return torch.zeros(shape, dtype=torch.int64, device=device), None
    if given is None or known is None:
        raise ValueError(f"{op}: given and known must come together, got one of them")
    _check.dtype(op, "given", given, (torch.int64, torch.int32))
    _check.dtype(op, "known", known, (torch.bool,))
    for name, tensor in (("given", given), ("known", known)):
        _check_device(op, name, tensor, device)
    try:
        given, known = given.expand(shape), known.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: given and known must broadcast to (B, N) = {shape}, got {tuple(given.shape)} and "
            f"{tuple(known.shape)}"
        ) from error
    tokens = torch.where(known, given.long(), 0).contiguous()  # where() keeps the strides of a transposed tensor
    _check_values(op, "given", tokens, sizes.num_levels - 1)
    return tokens, known.contiguous()


def _check_device(op, name, tensor, device):
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like weights, got {tensor.device}; move it with .to(...)")


def _check_values(op, name, tensor, top):
    """On a CPU: on a GPU a look at the values would stall it."""
    if tensor.device.type == "cpu" and tensor.numel():
        low, high = (int(value) for value in tensor.aminmax())
        if low < 0 or high > top:
            raise ValueError(f"{op}: {name} must be in 0 .. {top}, got {low if low < 0 else high}")


# ---- reference -------------------------------------------------------------------------------------------------------


def reference(
    matrices, vectors, dim, num_heads, depth, hidden, num_levels, labels, temperature, seed, sample_ids, known, first,
    last, cached, tokens, log_prob, cache,
):  # fmt: skip
    if tokens.numel() == 0:
        return
    shape = (dim, num_heads, depth, hidden, num_levels)
    sizes = sizes_of("transformer_sample", matrices, vectors, shape, tokens.shape[1])
    net = unpack_transformer(matrices, vectors, sizes)
    u = uniforms(tokens, seed, sample_ids)
    with torch.autocast(tokens.device.type, enabled=False):
        if cached:
            state = new_state(sizes, temperature, u, known, tokens, log_prob, cache)
            state.begin(net, labels, first)
            for position in range(first, last):
                step(net, state, position + 1, exact=True)
        else:
            _naive(net, labels, temperature, u, known, first, last, tokens, log_prob)


def _naive(net, labels, temperature, u, known, first, last, tokens, log_probs):
    for i in range(first, last):
        logits = prefix_logits(net, labels, tokens[:, :i])
        token = inverse_cdf(logits.float(), u[:, i], temperature)
        logs = log_prob(logits, token, temperature).to(log_probs.dtype)
        if known is not None:
            token, logs = torch.where(known[:, i], tokens[:, i], token), torch.where(known[:, i], 0.0, logs)
        tokens[:, i], log_probs[:, i] = token, logs


def _cuda(*arguments):
    """On a GPU; in a graph that the caller records, the steps themselves are recorded."""
    run = reference if torch.cuda.is_current_stream_capturing() else _transformer_graph.sample
    with torch.cuda.device(arguments[0].device), torch.autocast("cuda", enabled=False):
        run(*arguments)


# ---- shapes, schema --------------------------------------------------------------------------------------------------


def _cost(arguments, results):
    matrices, vectors, *shape, labels, _, seed, sample_ids, known, first, last, cached = arguments[:-3]
    tokens, log_prob, cache = arguments[-3:]
    batch, length = tokens.shape
    sizes = Sizes(*shape, length, 0)
    weights = sum(rows * columns for _, rows, columns in sizes.products())
    head = sizes.dim * sizes.num_levels
    places = range(first + 1, last + 1)  # i + 1
    count, seen = len(places), sum(places)
    pairs = seen if cached else sum(n * (n + 1) // 2 for n in places)  # of query and key
    passes = count if cached else seen  # of a token through the blocks
    flops = 2 * (passes * (weights - head) + count * head) + 4 * sizes.dim * sizes.depth * pairs
    exps = sizes.depth * (sizes.num_heads * pairs + passes * sizes.hidden) + count * (sizes.num_levels + 1)
    moved = traffic(matrices, vectors, labels, seed, sample_ids, known, tokens, log_prob, cache)
    return Cost(moved, batch * flops, batch * exps)


_OP = _registry.define(
    "transformer_sample_out(Tensor matrices, Tensor vectors, SymInt dim, SymInt num_heads, SymInt depth, "
    "SymInt hidden, SymInt num_levels, Tensor labels, float temperature, Tensor seed, Tensor? sample_ids, "
    "Tensor? known, SymInt first, SymInt last, bool cached, Tensor(a!) tokens, Tensor(b!) log_prob, Tensor(c!) cache) "
    "-> ()",
    reference,
    fake=lambda *args: None,
    module="transformer_sample",
    kernels=("cpu", "cuda"),
    cuda=_cuda,
    cost=_cost,
)
