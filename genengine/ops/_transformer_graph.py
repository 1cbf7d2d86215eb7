"""transformer_sample on a GPU: the cached step of `ops._transformer` in CUDA graphs, replayed for every token.

A step has some ten small kernels a block, and launched one by one they wait for Python. Its position is on the device,
so one recording serves every token; as attention must look at a fixed number of keys, there are four recordings, for
each quarter of the sequence one, and what lies beyond the position is masked. Nothing is read back to the host.

Recordings and the tensors they work on are kept for the sizes that were used last, few of them where they are large.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from genengine._capture import capturing
from genengine.ops._transformer import Network, new_state, sizes_of, step, uniforms, unpack_transformer

_QUARTERS = 4
_KEPT, _KEPT_BYTES = 4, 4 << 30  # loops, and what they hold together; the last one stays, however large
_loops: OrderedDict[tuple, Loop] = OrderedDict()
_turn = threading.Lock()  # threads on one stream share a loop: between two steps of a call no other's may run


def sample(
    matrices, vectors, dim, num_heads, depth, hidden, num_levels, labels, temperature, seed, sample_ids, known, first,
    last, cached, tokens, log_prob, cache,
):  # fmt: skip
    """The dispatcher op, as the reference computes it with a cache."""
    if not cached:
        raise RuntimeError("transformer_sample: without a cache only the reference runs")
    if tokens.numel() == 0 or first == last:
        return
    shape = (dim, num_heads, depth, hidden, num_levels)
    sizes = sizes_of("transformer_sample", matrices, vectors, shape, tokens.shape[1])
    key = (
        sizes, len(tokens), matrices.dtype, matrices.device, _stream(matrices.device), temperature, known is None,
        torch.backends.cuda.matmul.fp32_precision,
    )  # fmt: skip
    with _turn:
        if key not in _loops:
            _loops[key] = Loop(sizes, temperature, matrices, vectors, known, tokens, log_prob)
        _loops.move_to_end(key)
        while len(_loops) > 1 and (len(_loops) > _KEPT or sum(loop.nbytes for loop in _loops.values()) > _KEPT_BYTES):
            _loops.popitem(last=False)
        loop = _loops[key]
        loop.prepare(matrices, vectors, first, last)
        loop.begin(labels, uniforms(tokens, seed, sample_ids), known, first, tokens, cache)
        for position in range(first, last):
            loop.replays[loop.seen(position)]()
        loop.end(first, last, tokens, log_prob, cache)


def _stream(device):
    """Two streams must not share tensors: nothing would order their steps."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Loop:
    """The tensors that a recorded step reads and writes, and its recordings by the number of keys they look at.

    Made outside of any inference mode, so that a later call may write to them in or out of one.
    """

    def __init__(self, sizes, temperature, matrices, vectors, known, tokens, log_prob):
        self.sizes, self.source, self.replays = sizes, None, {}
        self.lengths = sorted({-(-sizes.length * k // _QUARTERS) for k in range(1, _QUARTERS + 1)})
        with torch.inference_mode(False), torch.no_grad():
            self.net = unpack_transformer(matrices.clone(), vectors.clone(), sizes)  # some are views
            cache = matrices.new_zeros(2 * sizes.depth * len(tokens) * sizes.length * sizes.dim)
            u = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
            known = None if known is None else torch.zeros_like(known)
            buffers = torch.zeros_like(tokens), torch.zeros_like(log_prob), cache
            self.state = new_state(sizes, temperature, u, known, *buffers)
            self.state.row.zero_()
        self.nbytes = 2 * (matrices.nbytes + vectors.nbytes) + cache.nbytes  # about: weights are kept as given, too

    def seen(self, position: int) -> int:
        """Keys that the recording for this position looks at."""
        return next(length for length in self.lengths if length > position)

    def prepare(self, matrices: Tensor, vectors: Tensor, first: int, last: int) -> None:
        """Take the weights, if they are others, and record the steps that are still missing."""
        if self.source is None or not _same(self.source, (matrices, vectors)):
            self.source = None  # of an interrupted copy there is none
            fresh = unpack_transformer(matrices, vectors, self.sizes)
            for old, new in zip(_tensors(self.net), _tensors(fresh), strict=True):
                old.copy_(new)
            self.source = [(tensor, _version(tensor)) for tensor in (matrices, vectors)]
        for seen in sorted({self.seen(position) for position in range(first, last)} - self.replays.keys()):
            self.state.position.zero_()
            with torch.inference_mode(False), torch.no_grad():
                self.replays[seen] = recorded(lambda seen=seen: step(self.net, self.state, seen, exact=False))

    def begin(self, labels, u, known, first, tokens, cache):
        """Before the token at `first`: the inputs, and the keys and values that an earlier call left in `cache`."""
        state = self.state
        state.tokens.copy_(tokens)
        state.u.copy_(u)
        if known is not None:
            state.known.copy_(known)
        if first:
            state.cache.copy_(cache[: state.cache.numel()].view_as(state.cache))
        else:
            state.cache.zero_()  # what is masked must be finite
        state.begin(self.net, labels, first)

    def end(self, first, last, tokens, log_prob, cache):
        state = self.state
        tokens[:, first:last] = state.tokens[:, first:last]
        log_prob[:, first:last] = state.log_prob[:, first:last]
        if last < self.sizes.length:  # others may use this loop before the call goes on
            cache[: state.cache.numel()].view_as(state.cache).copy_(state.cache)


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays run() from a CUDA graph. It runs once before, for kernels to be chosen and compiled."""
    graph, current, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    with capturing(graph, side):
        run()
    current.wait_stream(side)
    return graph.replay


def _same(source, tensors):
    """Held by `source`, a tensor's memory cannot be another's."""
    pairs = zip(source, tensors, strict=True)
    return all(old.data_ptr() == new.data_ptr() and version == _version(new) for (old, version), new in pairs)


def _version(tensor):
    return 0 if tensor.is_inference() else tensor._version


def _tensors(net: Network):
    yield from (net.levels, net.positions, net.start)
    for product in (*(product for block in net.blocks for product in block), net.out):
        yield from (product.weight, product.bias)
