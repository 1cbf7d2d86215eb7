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

from genengine.ops import _check, _registry
from genengine.ops._cost import Cost, traffic
from genengine.ops._pixelcnn_reference import Cached, Draws, Naive
from genengine.ops._pixelcnn_reference import state_bytes as reference_state_bytes
from genengine.ops._pixelcnn_weights import PixelCNNShape, PixelCNNWeights, pack_pixelcnn

__all__ = ["ORDERS", "PixelCNNSamples", "PixelCNNShape", "PixelCNNWeights", "pack_pixelcnn", "pixelcnn_sample"]

ORDERS = ("raster", "wavefront", "naive")
GROUP = 16  # images that a thread, or a block of a GPU, takes through a row together, at most
TILE = 16  # rows of a GPU's smallest product: fewer take as long
PATIENCE = 0.2  # seconds of a call without a look at Ctrl-C, as far as rows allow


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
            "raster" on a CPU; see `default_order` for a GPU.
        callback: callback(rows done, H), after every row. Ctrl-C, in it or between rows, ends the call with what is
            there. Without a callback a CPU looks for Ctrl-C after as many rows as fit in some 200 ms, one at least; a
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
    num, temperature = _check.num(op, num), _check.temperature(op, temperature)
    _check_options(op, order, callback)
    labels = _check_labels(op, labels, num, shape.classes, device)
    x, known = _check_given(op, given, known, num, shape, device)
    seed = _check.seed_tensor(op, seed, device, num)
    sample_ids = _check.sample_ids(op, sample_ids, device, num)
    if sample_ids is None:
        sample_ids = torch.arange(num, device=device)
    if order == "naive" and backend is None and _registry.named(SAMPLE) is None:
        backend = "reference"
    name = _registry.choose(SAMPLE, device, weights.dtype, backend)
    order = order or default_order(shape, group_size(num, name, device), name)
    draws = Draws(labels, known, seed, sample_ids, temperature)
    return _by_rows(x, weights, draws, order, name, callback)


def _by_rows(x, weights, draws, order, name, callback):
    """The op, for some rows at a time."""
    size = weights.shape.size
    probs = x.new_zeros(len(x), size, size)
    if order == "wavefront" and name == "reference":
        raise ValueError("pixelcnn_sample: the reference has no order='wavefront'; use 'raster' or 'naive'")
    if order == "naive":
        if name != "reference":
            raise ValueError(f"pixelcnn_sample: order='naive' is the reference's, got backend={name!r}; leave one out")
        run = Naive(x, probs, weights, draws).rows
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
    images = group_size(len(x), name, x.device)
    state = x.new_empty(state_bytes(weights, len(x), images, wavefront, name), dtype=torch.uint8)
    fields = weights.shape.fields()
    arguments = (x, probs, state, weights.matrices, weights.vectors, fields, *draws, wavefront, images)
    return lambda first, last: run(*arguments, first, last)


def group_size(batch: int, name: str, device: torch.device) -> int:
    """Images of a group: every thread of a CPU, or multiprocessor of a GPU, is to have some. A step of a block is a
    chain of small products and barriers, the shorter the fewer its images, and blocks do not wait for one another;
    beyond `GROUP` images a product of a GPU has a second tile, and groups wait for their turn."""
    if name == "cuda":
        workers = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        workers = torch.get_num_threads() if name == "cpu" else 1
    return max(1, min(GROUP, -(-batch // workers)))


def state_bytes(weights, batch, images, wavefront, name):
    """Room for the activations that a backend keeps; the first row clears what has to be zero."""
    if name == "reference":
        return reference_state_bytes(weights.shape, batch, weights.vectors.dtype)
    each = torch.ops.genengine.pixelcnn_state.default(weights.matrices, weights.shape.fields(), images, wavefront)
    return each * -(-batch // images)


def default_order(shape: PixelCNNShape, images: int, name: str) -> str:
    """On a CPU, where work counts, that with the larger products. On a GPU waiting counts: the wavefront's steps are
    fewer, but each has up to twice the barriers, those of the stack of rows above beside those of the pixels; and rows
    that go together must fit into one tile. Its count of barriers is measured (tests/ops/test_pixelcnn_block.py), its
    time is not."""
    if name != "cuda" or images * -(-shape.size // shape.lag) > TILE:
        return "raster"
    return "wavefront" if 2 * shape.steps("wavefront") <= shape.steps("raster") else "raster"


# ---- argument checks -------------------------------------------------------------------------------------------------


def _check_options(op, order, callback):
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


# ---- reference -------------------------------------------------------------------------------------------------------


def reference(x, log_prob, state, matrices, vectors, fields, labels, known, seed, sample_ids, temperature, wavefront,
              images, first_row, last_row):  # fmt: skip
    """In raster order, whichever is asked for: the order changes nothing but the time."""
    weights = PixelCNNWeights(PixelCNNShape(*fields), matrices, vectors)
    draws = Draws(labels, known, seed, sample_ids, temperature)
    with torch.autocast(x.device.type, enabled=False):  # as our kernels, it casts nothing
        Cached(x, log_prob, state, weights, draws).rows(first_row, last_row)


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
    "bool wavefront, int images, int first_row, int last_row) -> ()",
    reference,
    fake=lambda *args: None,
    module="pixelcnn_sample",
    kernels=("cpu", "cuda"),
    cost=_cost,
)
