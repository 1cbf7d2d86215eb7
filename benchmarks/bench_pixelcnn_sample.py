"""pixelcnn_sample against the strongest cached sampler we know in eager PyTorch, and against the loop people write.

The network is a gated PixelCNN with 64 features and 256 levels; shapes are (images, layers, height = width). Its
weights are filled with fixed noise, so that pixels vary: what they are does not change what they cost. "eager, cached"
computes no activation twice, as ours; "eager, naive" is a forward pass over the whole image for every pixel, of which
one is timed. Both are given their uniforms, ours draws them.

There is no torch.compile: the cached sampler's pixel and row as two compiled functions took a minute to compile and
were two to three times slower than the loop here, whose calls have no guards to check.
"""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from genengine import ops
from genengine.benchmarks import eager
from genengine.benchmarks.bench_pixelcnn import draw
from genengine.benchmarks.registry import Benchmark, Published, faster, faster_on_the_wall, register
from genengine.nets.pixelcnn import PixelCNN
from genengine.ops import _registry
from genengine.ops._cost import Cost

CONFIG = {
    "in_channels": 1, "num_levels": 256, "num_classes": 0, "dim": 64, "kernel_size": 3, "first_size": 3,
    "mode": "gated", "head": "categorical", "head_dim": 64,
}  # fmt: skip
SPREAD = 0.05  # of the noise on the initial weights
PART, CACHED_PART = 16, 64  # images of a naive and of a cached pass at most: larger ones take no less time per image
FAST_PIXELCNN = Published(
    "Fast PixelCNN++ on a K40, Ramachandran et al. 2017", "batch", "eager, naive",
    dict(zip((1, 2, 4, 8, 16, 32, 64, 128, 256), (2, 4, 6, 10, 18, 33, 61, 109, 183), strict=True)),
)  # fmt: skip


def network(depth, size, device="cpu"):
    net = PixelCNN.from_config(CONFIG, depth=depth, image_size=size)
    for index, parameter in enumerate(net.parameters()):
        parameter.data += SPREAD * ops.normal((1, parameter.numel()), seed=index).view(parameter.shape)
    return net.to(device).eval()


# ---- eager, naive ------------------------------------------------------------------------------------------------


class Naive:
    """A whole forward pass for every pixel; a call is the pass for the next one, and begins anew behind the last."""

    def __init__(self, net, u):
        """u: (B, 1, H, W) uniforms."""
        self.forward, self.u, self.done = eager.calling(net.forward), u, 0
        self.x = torch.zeros_like(u)

    @torch.inference_mode()
    def __call__(self):
        y, x = divmod(self.done, self.u.shape[3])
        logits = self.forward(self.x)[..., y, x]  # (B, L, 1)
        self.x[..., y, x] = draw(logits, self.u[..., y, x], logits.shape[1])
        self.done = (self.done + 1) % self.u[0].numel()
        return self.x


# ---- eager, cached -----------------------------------------------------------------------------------------------


class Folded(NamedTuple):
    """The network's weights as `Cached` multiplies by them, a tensor for every layer, in float32.

    The gate is tanh(a) sigmoid(b) = (2 sigmoid(2 a) - 1) sigmoid(b): with the factor 2 in the weights of a, one call
    takes both halves, and the product R with [sigmoid(2 a) sigmoid(b), sigmoid(b)] is one with [2 R; -R]. The biases
    of the residual sum need no call: what is kept as h_l is h_l plus the biases of the layers from l on, `offset[l]`,
    which the layers' own biases take back.
    """

    above: list[tuple[Tensor, Tensor]]  # (3 columns x 2 rows x F, 2 D), with the rows in either order
    above_bias: list[Tensor]
    down: list[Tensor]
    down_bias: list[Tensor]
    left: list[Tensor]  # the pixel to the left, then the pixel itself
    out: list[Tensor]
    offset: list[Tensor]
    entry: Tensor  # (H, W, D): positions and biases, which h_1 starts from
    positions: Tensor  # (H, W, D), of the vertical stack
    hidden: tuple[Tensor, Tensor]
    logits: tuple[Tensor, Tensor]


def folded(net) -> Folded:
    kernels = {name: tensor.detach().double() for name, tensor in net.kernels().items()}
    layers = [
        {name: kernels[f"layers.{i}.{name}"] for name in ("above", "above_bias", "down", "left", "out", "out_bias")}
        for i in range(net.config.depth)
    ]
    plain = lambda tensor: tensor.float().contiguous()  # noqa: E731
    biases = torch.stack([layer["out_bias"] for layer in layers])
    offset = biases.flip(0).cumsum(0).flip(0)  # (depth, D)
    twice = torch.ones(2 * net.config.dim, dtype=torch.float64, device=offset.device)
    twice[: net.config.dim] = 2
    left = [layer["left"][:, :, 0].permute(2, 1, 0) for layer in layers]  # (columns, F, 2 D)
    taken = [twice * 0] + [-(offset[i] @ left[i].sum(0)) for i in range(1, len(layers))]
    above = [layer["above"].permute(3, 2, 1, 0) for layer in layers]  # (columns, rows, F, 2 D)
    return Folded(
        above=[(plain(kernel.flatten(0, 2)), plain(kernel.flip(1).flatten(0, 2))) for kernel in above],
        above_bias=[plain(layer["above_bias"]) for layer in layers],
        down=[plain(layer["down"].T * twice) for layer in layers],
        down_bias=[plain(bias * twice) for bias in taken],
        left=[plain(kernel.flatten(0, 1) * twice) for kernel in left],
        out=[plain(torch.cat([2 * layer["out"].T, -layer["out"].T])) for layer in layers],
        offset=list(map(plain, offset)),
        entry=plain(kernels["positions"][1].permute(1, 2, 0) + offset[0]),
        positions=plain(kernels["positions"][0].permute(1, 2, 0)),
        hidden=(plain(kernels["hidden_bias"]), plain(kernels["hidden"].T)),
        logits=(plain(kernels["logits_bias"]), plain(kernels["logits"].T)),
    )


class Step(NamedTuple):
    """One layer at one column: views into the buffers of `Cached`, made once."""

    sums: Tensor  # (B, 2 D) from above, then with the left, then the gates
    halves: tuple[Tensor, Tensor]
    seen: Tensor  # the pixel to the left and the pixel itself
    left: Tensor
    out: Tensor
    result: Tensor  # h of the next layer


class Cached:
    """Every activation once, in as few and as cheap calls as we found: four for a layer of a pixel, two of them addmm.

    Buffers and their views are made before; what a row sees above is two products for all its pixels, the taps gathered
    by one copy, as BLAS reads no overlapping rows; a new row overwrites the one before last, with the weights for
    either order at hand; sums, sigmoids and gates stay in place; a pixel and the one to its left are one strided view.
    """

    def __init__(self, net, u):
        """u: (B, 1, H, W) uniforms."""
        self.w, self.size, self.batch = folded(net), net.config.image_size, len(u)
        self.depth, self.dim, self.levels = net.config.depth, net.config.dim, net.config.num_levels
        batch, size, dim = self.batch, self.size, self.dim
        zeros = partial(torch.zeros, device=u.device)
        self.u = u[:, 0].permute(1, 2, 0)[..., None].contiguous()  # (H, W, B, 1)
        last = self.levels - 1
        index = torch.arange(self.levels + 1, device=u.device).clamp(max=last)
        self.values = (2 * index - last) / last  # one more, for a uniform beyond the last sum
        self.x, self.row = zeros(batch, 1, size, size), zeros(size + 1, batch, 1)
        rings = [zeros(batch, size + 2, 2, dim if i else 1) for i in range(self.depth)]
        self.rings = [(ring, ring[:, 1:-1].unbind(2)) for ring in rings]
        taps = [ring.flatten(2).unfold(1, 3, 1).transpose(2, 3) for ring in rings]  # (B, W, 3, rows F)
        self.taps = [(torch.empty_like(tap, memory_format=torch.contiguous_format), tap) for tap in taps]
        self.above, self.gates = zeros(batch * size, 2 * dim), zeros(batch * size, dim)
        self.below = zeros(batch, size, 2 * dim)
        self.sums = [zeros(size, batch, 2 * dim) for _ in range(self.depth)]
        self.last, self.hidden = zeros(batch, dim), zeros(batch, net.config.head_dim)
        self.logits, self.cdf = zeros(batch, self.levels), zeros(batch, self.levels)
        self.level = zeros(batch, 1, dtype=torch.int64)
        self.steps = self._steps(zeros)

    def _steps(self, zeros):
        """Of every column the steps of all layers."""
        kept = [zeros(self.batch, self.size + 1, self.dim) for _ in range(1, self.depth)]
        for h, offset in zip(kept, self.w.offset[1:], strict=True):
            h[:, 0] = offset  # beyond the edge there is nothing, and h keeps an offset
        columns = []
        for x in range(self.size):
            seen = [self.row[x], *(h[:, x : x + 2].flatten(1) for h in kept)]
            results = [*(h[:, x + 1] for h in kept), self.last]
            sums = [rows[x] for rows in self.sums]
            halves = [(rows[:, : self.dim], rows[:, self.dim :]) for rows in sums]
            parts = sums, halves, seen, self.w.left, self.w.out, results
            columns.append([Step(*views) for views in zip(*parts, strict=True)])
        return columns

    @torch.inference_mode()
    def __call__(self):
        """(B, 1, H, W)"""
        for y in range(self.size):
            self._from_above(y)
            self._pixels(y)
            self.x[:, 0, y].copy_(self.row[1:, :, 0].T)
        return self.x

    def _from_above(self, y):
        """The sums of row y of all layers, as far as they come from the rows above."""
        w, lines = self.w, self.batch * self.size
        if y == 0:
            for sums, bias, (ring, _) in zip(self.sums, w.down_bias, self.rings, strict=True):
                sums.copy_(bias.expand_as(sums))
                ring.zero_()
            return
        new, older = (y - 1) % 2, y % 2
        self.rings[0][1][new].copy_(self.row[1:].transpose(0, 1))
        for i, (gathered, taps) in enumerate(self.taps):
            gathered.copy_(taps)
            torch.addmm(w.above_bias[i], gathered.view(lines, -1), w.above[i][older], out=self.above)
            torch.addmm(w.down_bias[i], self.above, w.down[i], out=self.below.view(lines, -1))
            self.sums[i].copy_(self.below.transpose(0, 1))
            if i + 1 == self.depth:
                return
            self.above[:, : self.dim].tanh_()
            torch._C._nn.glu(self.above, 1, out=self.gates)
            v, kept = self.gates.view(self.below.shape[0], self.size, -1), self.rings[i + 1][1][new]
            torch.add(v, w.positions[y - 1], out=kept) if i == 0 else kept.copy_(v)

    def _pixels(self, y):
        addmm, relu_of = torch.addmm, torch._addmm_activation
        hidden, logits, cdf, level, values = self.hidden, self.logits, self.cdf, self.level, self.values
        (hidden_bias, to_hidden), (logits_bias, to_logits) = self.w.hidden, self.w.logits
        pixels = zip(self.steps, self.w.entry[y].unbind(0), self.u[y].unbind(0), self.row[1:].unbind(0), strict=True)
        for (*steps, top), h, u, value in pixels:
            for sums, (a, b), seen, left, out, result in steps:
                sums.addmm_(seen, left).sigmoid_()
                a.mul_(b)
                h = addmm(h, sums, out, out=result)
            top.sums.addmm_(top.seen, top.left).sigmoid_()
            top.halves[0].mul_(top.halves[1])
            relu_of(h, top.sums, top.out, out=top.result)
            relu_of(hidden_bias, top.result, to_hidden, out=hidden)
            addmm(logits_bias, hidden, to_logits, out=logits)
            torch.softmax(logits, 1, out=cdf)
            torch.cumsum(cdf, 1, out=cdf)
            torch.searchsorted(cdf, u, right=True, out=level)
            torch.take(values, level, out=value)


# ---- rows --------------------------------------------------------------------------------------------------------


class Sampling:
    """One batch of images, and the ways to draw it."""

    def __init__(self, case):
        self.batch, depth, size = case.shape
        net = network(depth, size, case.device)
        self.weights = {dtype: net.packed(dtype) for dtype in (torch.float32, torch.bfloat16)}
        u = ops.uniform((self.batch, size, size, 1), seed=0, stream="uniform", device=case.device).permute(0, 3, 1, 2)
        self.u = u.contiguous()
        part, cached_part = (_divisor(self.batch, most) for most in (PART, CACHED_PART))
        self.naive, self.cached = Naive(net, self.u[:part]), Cached(net, self.u[:cached_part])
        self.repeats = {"eager, naive": size * size * (self.batch // part)}
        if cached_part < self.batch:
            self.repeats["eager, cached"] = self.batch // cached_part

    def draw(self, dtype=torch.float32, order="raster"):
        return ops.pixelcnn_sample(self.weights[dtype], self.batch, seed=0, order=order).x

    def two_threads(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return self.draw()
        finally:
            torch.set_num_threads(threads)

    def check(self):
        """Baseline and wavefront draw the images of "fused", but where a uniform lies at the edge of two levels."""
        ours, theirs = self.draw(), self.cached()
        parted, count = images_that_part(ours[: len(theirs)], theirs, CONFIG["num_levels"]), len(theirs)
        assert parted <= max(1, count // 8), f"{parted} of {count} images part from the cached sampler's"
        try:
            other = self.draw(order="wavefront")
        except ValueError:  # the reference has no such order, and the row will say so
            return
        parted = images_that_part(other, ours, CONFIG["num_levels"])
        assert parted <= max(1, self.batch // 8), f"{parted} of {self.batch} images part between the two orders"

    def cost(self) -> Cost:
        weights, x = self.weights[torch.float32], torch.empty_like(self.u)
        shape, ids = weights.shape, torch.empty(self.batch, dtype=torch.int64)
        arguments = (
            x, x[:, 0], None, weights.matrices, weights.vectors, shape.fields(), None, None, ids[:1], ids, 1.0, False,
            1, 0, shape.size,
        )  # fmt: skip
        return _registry.OPS["pixelcnn_sample"].cost(arguments, ())


def _divisor(count, most):
    """The largest divisor of `count` up to `most`."""
    return max(n for n in range(1, min(most, count) + 1) if count % n == 0)


def images_that_part(ours, theirs, levels) -> int:
    """How many images differ; each may only begin to by one level, where a uniform lies at the edge of two: from there
    on the two see different pixels. Raises AssertionError."""
    gaps = [torch.round((a - b).abs() * (levels - 1) / 2).flatten() for a, b in zip(ours, theirs, strict=True)]
    gaps = [gap for gap in gaps if gap.any()]
    for gap in gaps:
        first = int(gap.nonzero()[0])
        assert gap[first] == 1, f"images part at pixel {first} by {int(gap[first])} levels, which no rounding explains"
    return len(gaps)


def _benchmark(case, work, variants, goals, **fields):
    batch, depth, size = case.shape
    return Benchmark(
        variants, work.check, goals=goals, elements=batch * depth * size * size, cost=work.cost(),
        repeats=work.repeats, **fields,
    )  # fmt: skip


GOALS = {  # label -> at least so many times as fast
    "16 images": {"eager, cached": 2.5, "eager, naive": 1000.0},
    "1 image": {"eager, cached": 10.0, "eager, naive": 700.0},
}


@register(
    "pixelcnn_sample", group="pixelcnn", kind="models", quick=(), axes={"batch": 0, "depth": 1, "size": 2},
    sizes={"batch": (1, 2, 4, 8, 16, 32, 64), "depth": (4, 7, 14), "size": (14, 28, 56)},
    shapes={"16 images": (16, 7, 28), "1 image": (1, 7, 28)},
)  # fmt: skip
def pixelcnn_sample(case):
    work = Sampling(case)
    variants = {
        "fused": work.draw,
        "fused, wavefront": partial(work.draw, order="wavefront"),
        "fused, bfloat16": partial(work.draw, torch.bfloat16),
        "eager, cached": work.cached,
        "eager, naive": work.naive,
    }
    goals = ()
    if case.label in GOALS:
        goals = *(faster(name, by) for name, by in GOALS[case.label].items()), faster("fused", 1.6, "fused, bfloat16")
        if case.device == "cpu" and (os.cpu_count() or 1) >= 2 and work.batch >= 2:
            variants["fused, 2 threads"] = work.two_threads
            goals += (faster_on_the_wall("fused", 1.8, "fused, 2 threads"),)
    return _benchmark(case, work, variants, goals)


@register(
    "pixelcnn_sample against batch", group="pixelcnn", kind="models", quick=(),
    shapes={f"batch {batch}": (batch, 7, 28) for batch in (1, 4, 16, 64, 256)},
)  # fmt: skip
def against_batch(case):
    """The sweep that stands beside what Fast PixelCNN++ published."""
    work = Sampling(case)
    variants = {
        "fused": work.draw,
        "fused, bfloat16": partial(work.draw, torch.bfloat16),
        "eager, cached": work.cached,
        "eager, naive": work.naive,
    }
    return _benchmark(case, work, variants, (), published=(FAST_PIXELCNN,))
