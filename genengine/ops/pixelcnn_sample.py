"""pixelcnn_sample: a batch of images from a PixelCNN in one call, every activation computed once.

The rows above a pixel come into it through one sum per layer, which is computed when the row above is done, as one
product over the row; what is left for a pixel are two small products per layer, over the pixels to its left and itself.
Caches as in Ramachandran et al., Fast Generation for Convolutional Autoregressive Models, 2017, but with the packed
weights and the activations of a group of images held where the arithmetic is.

The file it lacks, and why (see tests/test_architecture.py): kernels/pixelcnn_sample.py, for one launch that runs a
thousand dependent steps needs barriers within a block and state across them, which Triton's tile language has not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genengine import random
from genengine.ops import _check, _registry
from genengine.ops._categorical import inverse_cdf, log_prob
from genengine.ops._cost import Cost, traffic
from genengine.ops._pixelcnn_weights import PixelCNNShape, PixelCNNWeights, pack_pixelcnn, unpack
from genengine.ops.logistic_mixture import reference_sample
from genengine.ops.normal import reference_uniform

__all__ = ["ORDERS", "PixelCNNSamples", "PixelCNNShape", "PixelCNNWeights", "pack_pixelcnn", "pixelcnn_sample"]

_STREAM = random.STREAMS["uniform"]
ORDERS = ("raster", "wavefront", "naive")
GROUP = 16  # images that a thread takes through a row together, at most
PATIENCE = 0.05  # seconds of a call without a look at Ctrl-C, as far as rows allow


class PixelCNNSamples(NamedTuple):
    """x (B, C, H, W) float32 on the values -1 + 2 i / (L - 1); log_prob (B, H, W) float32, of what was drawn at each
    pixel, in nats, 0 where it was given; rows: how many are done, H unless the call was interrupted (the rest is 0, but
    for known pixels)."""

    x: Tensor
    log_prob: Tensor
    rows: int


@torch.compiler.disable(reason="pixelcnn_sample loops over rows on the host, where Ctrl-C ends it")
def pixelcnn_sample(
    weights: PixelCNNWeights,
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
) -> PixelCNNSamples:
    """Draw images from a PixelCNN, each pixel given those before it, without computing anything twice.

        p(x) = prod_i p(x_i | x_1 .. x_{i-1})        i in raster order, within a pixel by channel
        u    = V_l * v_l + b_l,   v_{l+1} = gate(u + c_l)        the rows up to a pixel's own
        h_{l+1} = h_l + R_l gate(N_l down(u) + L_l * h_l + c'_l) + b'_l     and the pixels to its left
        logits  = O relu(P relu(h_depth) + b) + b'
        x_i = the level in which uniform(seed, sample, 0, "uniform")[(y W + x) C + c] falls

    with gate(a, b) = tanh(a) sigmoid(b), `down` moving rows down by one, no "h_l +" in the first layer and learned
    positions added after it. A mixture of logistics draws the channels of a pixel together, from the uniforms
    (y W + x) (1 + C) + j, j = 0 .. C, as `logistic_mixture_sample`. An image depends on its seed, sample id and label
    alone, not on its batch; backends and orders agree up to rounding, which moves a pixel only where its uniform lies
    at the edge of two levels.

    Args:
        weights: from `pack_pixelcnn`, or a net's `packed()`: float32 or bfloat16 (activations are then rounded to
            bfloat16 where they are kept, sums are float32), or float64 on the reference.
        num: images, B >= 0.
        labels: int64 (B,) in 0 .. classes, `classes` meaning "no class", which None stands for.
        temperature: in [1e-6, 1e6]; logits are divided by it.
        seed: int in [0, 2^64) or int64 tensor () or (B,).  sample_ids: int64 (B,), default 0 .. B-1.
        given, known: float (B or 1, C, H, W) and bool, broadcastable to them: known pixels stay as given, taken at
            their nearest levels, and every other pixel sees the known and drawn ones before it. Under a mixture of
            logistics a pixel is known in all its channels or in none.
        order: "raster": pixel by pixel. "wavefront": pixels of several rows at once, a row beginning as soon as what
            it needs of the one above is there. "naive" (reference alone): a whole forward pass for every pixel. None:
            "raster".
        callback: callback(rows done, H), after every row. Ctrl-C, in it or between rows, ends the call with what is
            there. Without a callback a CPU looks for Ctrl-C after as many rows as fit in some 50 ms, one at least; a
            GPU when all are done.

    The caches of all images are kept throughout, some hundred kilobytes each (with 64 features and 7 layers 0.3 MB for
    32 x 32 pixels, the wavefront 1.3 MB), and a row of all of them is one step: draw thousands of images in parts, by
    their sample_ids.

    Returns PixelCNNSamples(x, log_prob, rows). Not differentiable.
    Raises ValueError or TypeError on bad arguments, RuntimeError if `given` requires grad.
    Cost: reads the weights once, labels, known, seed, sample_ids, writes x and log_prob; the multiply-adds of every
    matrix once per pixel (none of the rows above for the first row), 10 flops of a gate with 2 exponentials, a level's
    exponential.
    van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders"; Salimans et al. 2017, "PixelCNN++".
    """
    op = "pixelcnn_sample"
    if not isinstance(weights, PixelCNNWeights):
        raise TypeError(
            f"{op}: weights must be PixelCNNWeights of pack_pixelcnn or packed(), got {type(weights).__name__}"
        )
    shape, device = weights.shape, weights.device
    _check.no_grad_needed(op, (weights.matrices, weights.vectors, given))
    num = _count(op, num)
    _check_options(op, temperature, order, callback)
    labels = _check_labels(op, labels, num, shape.classes, device)
    x, known = _check_given(op, given, known, num, shape, device)
    seed = _check.seed_tensor(op, seed, device, num)
    sample_ids = _check.sample_ids(op, sample_ids, device, num)
    if sample_ids is None:
        sample_ids = torch.arange(num, device=device)
    if order == "naive" and backend is None and _registry.named(SAMPLE) is None:
        backend = "reference"
    name = _registry.choose(SAMPLE, device, weights.dtype, backend)
    draws = _Draws(labels, known, seed, sample_ids, float(temperature))
    return _by_rows(x, weights, draws, order or "raster", name, callback)


class _Draws(NamedTuple):
    labels: Tensor | None
    known: Tensor | None
    seed: Tensor
    sample_ids: Tensor
    temperature: float


def _by_rows(x, weights, draws, order, name, callback):
    """The op, for some rows at a time."""
    size = weights.shape.size
    probs = x.new_zeros(len(x), size, size)
    if order == "naive":
        if name != "reference":
            raise ValueError(f"pixelcnn_sample: order='naive' is the reference's, got backend={name!r}; leave one out")
        run = _Naive(x, probs, weights, draws).rows
    else:
        run = _rows_of(x, probs, weights, draws, order, name)
    done, step = 0, size if x.device.type == "cuda" and callback is None else 1
    try:
        while done < size and len(x):
            before = time.perf_counter()
            run(done, min(done + step, size))
            done = min(done + step, size)
            if callback is not None:
                if x.device.type == "cuda":  # or the rows are only on their way
                    torch.cuda.current_stream(x.device).synchronize()
                callback(done, size)
            elif time.perf_counter() - before < PATIENCE / 2:
                step *= 2
    except KeyboardInterrupt:
        _clear_from(done, x, probs, draws.known)
        return PixelCNNSamples(x, probs, done)
    return PixelCNNSamples(x, probs, size)


def _clear_from(row, x, probs, known):
    """Rows that were begun when the call was interrupted become zeros again, but for what is known."""
    x[:, :, row:] = 0.0 if known is None else torch.where(known[:, :, row:], x[:, :, row:], 0.0)
    probs[:, row:] = 0.0


def _rows_of(x, probs, weights, draws, order, name):
    run, wavefront = _registry.overload(SAMPLE, name), order == "wavefront"
    images = group_size(len(x), name)
    state = x.new_empty(state_bytes(weights, len(x), images, wavefront, name), dtype=torch.uint8)
    fields = weights.shape.fields()
    arguments = (x, probs, state, weights.matrices, weights.vectors, fields, *draws, wavefront, images)
    return lambda first, last: run(*arguments, first, last)


def group_size(batch: int, name: str) -> int:
    """Images of a group: on a CPU every thread is to have some."""
    threads = torch.get_num_threads() if name == "cpu" else 1
    return max(1, min(GROUP, -(-batch // threads)))


def state_bytes(weights, batch, images, wavefront, name):
    """Room for the activations that a backend keeps; the first row clears what has to be zero."""
    if name == "reference":
        return _reference_state_bytes(weights.shape, batch, weights.vectors.dtype)
    each = torch.ops.genengine.pixelcnn_state.default(weights.matrices, weights.shape.fields(), images, wavefront)
    return each * -(-batch // images)


# ---- argument checks -------------------------------------------------------------------------------------------------


def _count(op, num):
    if isinstance(num, bool) or not isinstance(num, int):
        raise TypeError(f"{op}: num must be an int, got {type(num).__name__}")
    if num < 0:
        raise ValueError(f"{op}: num must be at least 0, got {num}")
    return num


def _check_options(op, temperature, order, callback):
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a float, got {type(temperature).__name__}")
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"{op}: temperature must be in [1e-6, 1e6], got {temperature}")
    if order is not None and order not in ORDERS:
        raise ValueError(f"{op}: order must be one of {', '.join(ORDERS)} or None, got {order!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"{op}: callback must be callable, got {type(callback).__name__}")


def _check_labels(op, labels, num, classes, device):
    if labels is None:
        return None
    if not classes:
        raise ValueError(f"{op}: labels must be None for a network without classes, got labels")
    _check.dtype(op, "labels", labels, (torch.int64,))
    _check.shape(op, "labels", labels, "(B,)", (num,))
    if num and labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(
            f"{op}: labels must be in 0 .. {classes}, {classes} meaning no class, got {int(labels.min())} .. "
            f"{int(labels.max())}"
        )
    return labels.to(device).clamp(0, classes)  # on a GPU a look at the values would wait for it


def _check_given(op, given, known, num, shape, device):
    """x (B, C, H, W), the known pixels on their levels and zeros elsewhere; known, bool of that shape, or None."""
    sizes = (num, shape.channels, shape.size, shape.size)
    kind = torch.float32
    if given is None and known is None:
        return torch.zeros(sizes, dtype=kind, device=device), None
    if given is None or known is None:
        raise ValueError(f"{op}: given and known must come together, got one of them")
    _check.dtype(op, "given", given)
    _check.dtype(op, "known", known, (torch.bool,))
    if given.dim() != 4 or given.shape[1:] != sizes[1:] or given.shape[0] not in (1, num):
        raise ValueError(
            f"{op}: given must be (B or 1, C, H, W) with (B, C, H, W) = {sizes}, got {tuple(given.shape)}; the network "
            "was built for that image size"
        )
    try:
        known = known.to(device).expand(sizes)
    except RuntimeError as error:
        raise ValueError(f"{op}: known must broadcast to (B, C, H, W) = {sizes}, got {tuple(known.shape)}") from error
    if shape.components and not torch.equal(known, known[:, :1].expand(sizes)):
        raise ValueError(
            f"{op}: known must be the same for all channels of a pixel, since a mixture of logistics draws them "
            "together; pass it as (B, 1, H, W)"
        )
    last = shape.levels - 1
    level = torch.round((given.to(device, kind) + 1) * (0.5 * last)).clamp(0, last)
    if device.type == "cpu" and bool((missing := level.isnan() & known).any()):  # a GPU would wait for the look
        raise ValueError(
            f"{op}: given must have a number wherever known is True, got {int(missing.sum())} NaN; leave those pixels "
            "out of known"
        )
    return torch.where(known, (2 * level - last) / last, 0.0).contiguous(), known.contiguous()


# ---- reference: what both orders share -------------------------------------------------------------------------------


class _Network:
    """The network on its packed weights: features last, groups filled up with zeros, rounded where they are kept."""

    def __init__(self, shape, matrices, vectors):
        self.s, self.dtype = shape, vectors.dtype
        self.rounded = (lambda t: t.bfloat16().to(t.dtype)) if matrices.dtype == torch.bfloat16 else (lambda t: t)
        found, self.vectors = unpack(shape, matrices, vectors)
        self.matrices = {key: matrix.to(self.dtype) for key, matrix in found.items()}
        self.positions = self.vectors["positions", 0]

    def class_bias(self, labels, batch):
        """(B, depth, 2, gates)"""
        table = self.vectors["classes", 0]
        return table[-1:].expand(batch, -1, -1, -1) if labels is None else table[labels]

    def gate(self, u):
        """tanh times sigmoid of the two halves of each group: (..., gates) -> (..., width)."""
        pairs = u.unflatten(-1, (-1, 2, self.s.part))
        return (torch.tanh(pairs[..., 0, :]) * torch.sigmoid(pairs[..., 1, :])).flatten(-2)

    def enter(self, x):
        """Pixels (B, C, ...) as what the first layer reads of them: (B, ..., C E)."""
        s = self.s
        if not s.embedding:
            return self.rounded(x.movedim(1, -1).to(self.dtype))
        level = torch.round((x + 1) * (0.5 * (s.levels - 1))).nan_to_num(0)  # NaN, of outputs that overflow, has none
        level = level.long().movedim(1, -1)  # (B, ..., C)
        table = self.vectors["table", 0]
        return self.rounded(table[torch.arange(s.channels, device=x.device), level].flatten(-2))

    def head(self, h, group):
        """h (..., width) -> outputs of the group."""
        h = self.rounded(torch.relu(h) if self.s.rectified else h)[..., : (group + 1) * self.s.part]
        return h @ self.matrices["hidden", 0, group] + self.vectors["hidden_bias", 0][group]

    def logits(self, hidden, group):
        """What `head` put out for the groups up to this one, (..., (group + 1) head_part), -> (..., outputs)."""
        hidden = self.rounded(torch.relu(hidden))
        return hidden @ self.matrices["logits", 0, group] + self.vectors["logits_bias", 0][group]


class _Draw:
    """Pixels from the network's outputs, and their log-probabilities."""

    def __init__(self, x, probs, shape, draws):
        self.x, self.probs, self.s, self.draws = x, probs, shape, draws
        s, size = shape, shape.size
        self.u = torch.empty(len(x), size * size * s.channels, device=x.device)
        if not s.components:
            reference_uniform(self.u, draws.seed, draws.sample_ids, 0, _STREAM)

    def __call__(self, outputs, y, x, group):
        """outputs: (B, O) of the pixel and group."""
        if self.s.components:
            return self._mixture(outputs, y, x)
        s, temperature = self.s, self.draws.temperature
        logits = outputs[:, : s.levels]
        level = inverse_cdf(logits.float(), self.u[:, (y * s.size + x) * s.channels + group], temperature)
        value = (2 * level.float() - (s.levels - 1)) / (s.levels - 1)
        self._write(slice(group, group + 1), y, x, value[:, None], log_prob(logits, level, temperature))

    def _mixture(self, outputs, y, x):
        s, (_, _, seed, ids, temperature) = self.s, self.draws
        params = outputs[:, : s.logits, None]
        place = y * s.size + x
        wide = params.float().expand(-1, -1, place + 1)  # the op counts pixels from the first of what it is given
        value = reference_sample(wide, s.channels, s.levels, temperature, seed, ids, 0)[..., place]
        self._write(slice(None), y, x, value, _mixture_log_prob(params, value, s, temperature))

    def _write(self, channels, y, x, value, found):
        if self.draws.known is not None:
            known = self.draws.known[:, channels, y, x]
            value = torch.where(known, self.x[:, channels, y, x], value)
            found = torch.where(known[:, 0], 0.0, found)
        self.x[:, channels, y, x] = value
        self.probs[:, y, x] += found.to(self.probs.dtype)


def _mixture_log_prob(params, value, s, temperature):
    """As `logistic_mixture_log_prob` with logits / temperature and every logistic wider by it."""
    from genengine.ops.logistic_mixture import LOWEST_LOG_SCALE, _split

    logits, means, log_scales, couplings = _split(params.double(), s.channels)
    means = means.clone()
    pairs = [(c, j) for c in range(s.channels) for j in range(c)]
    for (c, j), coupling in zip(pairs, couplings.unbind(1), strict=True):
        means[:, c] += torch.tanh(coupling) * value[:, j, None, None]
    scale = log_scales.clamp_min(LOWEST_LOG_SCALE).exp() * temperature
    h, last = 1 / (s.levels - 1), s.levels - 1
    x = value.double()[:, :, None, None]
    index = torch.round((x + 1) * (0.5 * last))
    a, b = (x + h - means) / scale, (x - h - means) / scale
    a, b = torch.where(index == last, torch.inf, a), torch.where(index == 0, -torch.inf, b)
    flip = a + b > 0  # sigmoid(a) - sigmoid(b) = sigmoid(-b) - sigmoid(-a): where both are small
    mass = torch.sigmoid(torch.where(flip, -b, a)) - torch.sigmoid(torch.where(flip, -a, b))
    joint = torch.log_softmax(logits / temperature, 1) + mass.log().sum(1)
    return torch.logsumexp(joint, 1)[:, 0]


# ---- reference: a whole forward pass for every pixel -----------------------------------------------------------------


class _Naive:
    """The network over whole images, as the formulas stand above; of its output one pixel is used."""

    def __init__(self, x, probs, weights, draws):
        self.x, self.s = x, weights.shape
        self.net = _Network(weights.shape, weights.matrices, weights.vectors)
        self.biases = self.net.class_bias(draws.labels, len(x))[:, :, :, None, None]  # (B, depth, 2, 1, 1, gates)
        self.draw = _Draw(x, probs, weights.shape, draws)

    def rows(self, first, last):
        with torch.autocast(self.x.device.type, enabled=False):  # as our kernels, it casts nothing
            for y in range(first, last):
                for x in range(self.s.size):
                    for group in range(self.s.groups):
                        self.draw(self.outputs(group)[:, y, x], y, x, group)

    def outputs(self, group):
        """(B, H, W, O) of a group."""
        net, s = self.net, self.s
        v = h = net.enter(self.x)
        if s.early:  # a row of zeros above the image
            v = torch.nn.functional.pad(v, (0, 0, 0, 0, 1, 0))
        before = None
        for layer in range(s.depth):
            u, v = self._vertical(v if s.gated else h, layer)
            h, before = self._horizontal(u, h, layer, before)
        hidden = torch.cat([net.head(h, g) for g in range(group + 1)], dim=-1)
        return net.logits(hidden, group)

    def _vertical(self, v, layer):
        """The sums' part from the rows above, and the vertical input of the next layer."""
        net, s = self.net, self.s
        rows, reach = s.rows_above(layer), s.reach_of(layer)
        padded = torch.nn.functional.pad(net.rounded(v), (0, 0, reach, reach, rows - 1, 0))
        height, size = v.shape[1], s.size
        taps = [padded[:, i : i + height, j : j + size] for i in range(rows) for j in range(s.taps(layer))]
        bias = net.vectors["above_bias", layer]
        above = torch.cat(taps, dim=-1) @ net.matrices["above", layer, 0] + bias
        if s.early:
            shifted = above[:, :-1]
        else:
            first = torch.zeros_like(above[:, :1]) if s.gated else bias.expand_as(above[:, :1])
            shifted = torch.cat([first, above[:, :-1]], dim=1)
        if not s.gated:
            return shifted, None
        v = net.gate(above + self.biases[:, layer, 0])
        if layer == 0 and not s.early:
            v = v + net.positions[0]
        return net.rounded(shifted) @ net.matrices["down", layer, 0], v

    def _horizontal(self, u, h, layer, before):
        """The next h, and what a folded product needs of this one: the residual sum's input and the gates."""
        net, s = self.net, self.s
        reach, size, part = s.reach_of(layer), s.size, s.part
        kept = net.rounded(h)
        padded = torch.nn.functional.pad(kept, (0, 0, reach, 0))
        taps = torch.cat([padded[:, :, j : j + size] for j in range(reach)], dim=-1)
        own = before if s.folded and layer else (kept,)
        u = u + self.biases[:, layer, 1]
        gates = []
        for g in range(s.groups):
            seen = torch.cat([taps, *(t[..., : s.centre(layer, g)] for t in own)], dim=-1)
            sums = u[..., g * 2 * part : (g + 1) * 2 * part] + seen @ net.matrices["left", layer, g]
            gates.append(net.gate(sums))
        gates = net.rounded(torch.cat(gates, dim=-1))
        out = [gates[..., : (g + 1) * part] @ net.matrices["out", layer, g] for g in range(s.groups)]
        shifted = (net.positions[1] if layer == 0 else h) + net.vectors["out_bias", layer]
        shifted = shifted.expand(*gates.shape)
        return shifted + torch.cat(out, dim=-1), (net.rounded(shifted), gates)


# ---- reference: every activation computed once -----------------------------------------------------------------------


class _Cached:
    """Pixel by pixel in eager PyTorch on preallocated caches: the strongest that eager does.

    Views of `state`: above[l] (B, rows, W + 2 r, F), the last rows of the vertical input; left[l] (B, W + r, F), this
    row's; vertical[l] (B, W, gates), the sums' part from the rows above.
    """

    def __init__(self, x, probs, state, weights, draws):
        self.x, self.s = x, weights.shape
        self.net = _Network(weights.shape, weights.matrices, weights.vectors)
        self.biases = self.net.class_bias(draws.labels, len(x))
        self.draw = _Draw(x, probs, weights.shape, draws)
        self.exact = weights.matrices.dtype != torch.bfloat16
        views = _reference_views(self.s, len(x))
        count = sum(torch.Size(sizes).numel() for sizes in views)
        flat, offset, found = state[: count * self.net.dtype.itemsize].view(self.net.dtype), 0, []
        for sizes in views:
            count = torch.Size(sizes).numel()
            found.append(flat[offset : offset + count].view(sizes))
            offset += count
        depth = self.s.depth
        self.above, self.left, self.vertical = found[:depth], found[depth : 2 * depth], found[2 * depth :]
        room = {"dtype": self.net.dtype, "device": x.device}
        self.sums = torch.empty(len(x), 2 * self.s.part, **room)
        # of the groups of one pixel
        self.gates, self.shifted = (torch.zeros(depth, len(x), self.s.width, **room) for _ in range(2))
        self.last = torch.zeros(len(x), self.s.width, **room)
        self.hidden = torch.zeros(len(x), self.s.groups, self.s.head_part, **room)

    def rows(self, first, last):
        if first == 0:
            for cache in (*self.above, *self.left):
                cache.zero_()
        for y in range(first, last):
            self._vertical(y)
            for x in range(self.s.size):
                for group in range(self.s.groups):
                    self.draw(self._pixel(y, x, group), y, x, group)
                    self._enter(y, x)

    def _vertical(self, y):
        """The sums' part of row y from the rows above, of all layers."""
        net, s = self.net, self.s
        for layer in range(s.depth):
            bias, own = net.vectors["above_bias", layer], self.biases[:, layer, 1, None]
            if y == 0 and not s.early:
                self.vertical[layer].copy_(own if s.gated else own + bias)
                continue
            rows, reach, ring = s.rows_above(layer), s.reach_of(layer), self.above[layer]
            kept = torch.stack([ring[:, (y - rows + i) % rows] for i in range(rows)], dim=1)
            taps = kept.unfold(2, 2 * reach + 1, 1).permute(0, 2, 1, 4, 3)  # (B, W, rows, taps, F)
            above = torch.addmm(bias, taps.reshape(len(kept) * s.size, -1), net.matrices["above", layer, 0])
            above = above.view(len(kept), s.size, -1)
            if not s.gated:
                torch.add(above, own, out=self.vertical[layer])
                continue
            torch.add(net.rounded(above) @ net.matrices["down", layer, 0], own, out=self.vertical[layer])
            if layer + 1 < s.depth:
                v = net.gate(above + self.biases[:, layer, 0, None])
                self._keep_above(layer + 1, y - 1, v + net.positions[0, y - 1] if layer == 0 and y else v)

    def _keep_above(self, layer, y, v):
        reach = self.s.reach_of(layer)
        ring = self.above[layer]
        ring[:, y % ring.shape[1], reach : reach + self.s.size] = self.net.rounded(v)

    def _enter(self, y, x):
        """The pixel into the first layer's caches."""
        reach = self.s.first_reach
        entered = self.net.enter(self.x[:, :, y, x])
        self.left[0][:, x + reach] = entered
        ring = self.above[0]
        ring[:, y % ring.shape[1], x + reach] = entered

    def _pixel(self, y, x, group):
        """The outputs of a group at (y, x)."""
        net, s, part = self.net, self.s, self.s.part
        columns, own = slice(group * 2 * part, (group + 1) * 2 * part), slice(group * part, (group + 1) * part)
        h = net.positions[1, y, x, own]
        for layer in range(s.depth):
            u = torch.addmm(
                self.vertical[layer][:, x, columns], self._seen(layer, x, group), net.matrices["left", layer, group],
                out=self.sums,
            )  # fmt: skip
            gates = self.gates[layer]
            torch.mul(torch.tanh(u[:, :part]), torch.sigmoid(u[:, part:]), out=gates[:, own])
            h = h + net.vectors["out_bias", layer][own]
            if not self.exact:
                gates[:, own] = net.rounded(gates[:, own])
            if s.folded:
                self.shifted[layer][:, own] = net.rounded(h)
            h = torch.addmm(h, gates[:, : own.stop], net.matrices["out", layer, group])
            if layer + 1 < s.depth:
                self._keep(layer + 1, y, x, own, h)
        self.last[:, own] = h
        self.hidden[:, group] = net.head(self.last, group)
        return net.logits(self.hidden[:, : group + 1].flatten(1), group)

    def _seen(self, layer, x, group):
        """The pixels to the left, and what the group may see of the pixel itself."""
        s, centre = self.s, self.s.centre(layer, group)
        cache, reach = self.left[layer], self.s.reach_of(layer)
        begin, width = x * cache.shape[2], cache.shape[2]
        if not (s.folded and layer):
            return cache.flatten(1)[:, begin : begin + reach * width + centre]
        taps = cache.flatten(1)[:, begin : begin + reach * width]
        return torch.cat([taps, self.shifted[layer - 1][:, :centre], self.gates[layer - 1][:, :centre]], dim=1)

    def _keep(self, layer, y, x, own, h):
        reach, kept = self.s.reach_of(layer), self.net.rounded(h)
        self.left[layer][:, x + reach, own] = kept
        if not self.s.gated:
            ring = self.above[layer]
            ring[:, y % ring.shape[1], x + reach, own] = kept


def _reference_views(s, batch):
    """Shapes of the caches: rows above, columns to the left, sums from above."""
    above = [(batch, s.rows_above(i), s.size + 2 * s.reach_of(i), s.inputs(i)) for i in range(s.depth)]
    left = [(batch, s.size + s.reach_of(i), s.inputs(i)) for i in range(s.depth)]
    return above + left + [(batch, s.size, 2 * s.width)] * s.depth


def _reference_state_bytes(s, batch, dtype):
    return sum(torch.Size(sizes).numel() for sizes in _reference_views(s, batch)) * dtype.itemsize


def reference(x, log_prob, state, matrices, vectors, fields, labels, known, seed, sample_ids, temperature, wavefront,
              images, first_row, last_row):  # fmt: skip
    if wavefront:
        raise ValueError("pixelcnn_sample: the reference has no order='wavefront'; use 'raster' or 'naive'")
    weights = PixelCNNWeights(PixelCNNShape(*fields), matrices, vectors)
    draws = _Draws(labels, known, seed, sample_ids, temperature)
    with torch.autocast(x.device.type, enabled=False):  # as our kernels, it casts nothing
        _Cached(x, log_prob, state, weights, draws).rows(first_row, last_row)


# ---- cost and schema -------------------------------------------------------------------------------------------------


def _cost(arguments, results):
    x, probs, _, matrices, vectors, fields, labels, known, seed, ids, _, _, _, first, last = arguments
    s = PixelCNNShape(*fields)
    sizes = s.matrices().items()
    rows = last - first
    below = rows - (first == 0 and not s.early)  # rows with one above
    vertical = sum(2 * k * n for (name, _, _), (k, n) in sizes if name in ("above", "down"))
    own = sum(2 * k * n for (name, _, _), (k, n) in sizes if name not in ("above", "down"))
    outputs, each = s.groups * s.outputs, len(x) * s.size
    gates = s.width * (rows * s.depth + below * s.gated * (s.depth - 1))
    flops = each * (rows * (own + 4 * outputs) + below * vertical + 10 * gates)
    exps = each * (rows * outputs + 2 * gates)
    moved = traffic(matrices, vectors, labels, seed, ids) + traffic(x, probs, known) * rows // s.size
    return Cost(moved, flops, exps)


SAMPLE = _registry.define(
    "pixelcnn_sample(Tensor(a!) x, Tensor(b!) log_prob, Tensor(c!) state, Tensor matrices, Tensor vectors, "
    "int[] fields, Tensor? labels, Tensor? known, Tensor seed, Tensor sample_ids, float temperature, "
    "bool wavefront, int images, "
    "int first_row, int last_row) -> ()",
    reference,
    fake=lambda *args: None,
    module="pixelcnn_sample",
    kernels=("cpu", "cuda"),
    cost=_cost,
)
