"""The reference of pixelcnn_sample, in eager PyTorch on the packed weights: the network over whole images, of whose
output one pixel is used (the oracle), and the same with every activation computed once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine import random
from genengine.ops._categorical import inverse_cdf, log_prob
from genengine.ops._pixelcnn_weights import unpack
from genengine.ops.logistic_mixture import LOWEST_LOG_SCALE, pairs, sample_by, split_params
from genengine.ops.normal import reference_uniform

_STREAM = random.STREAMS["uniform"]


class Draws(NamedTuple):
    """What a draw depends on beside the weights; temperature a float, the rest tensors as the op takes them."""

    labels: Tensor | None
    known: Tensor | None
    seed: Tensor
    sample_ids: Tensor
    temperature: float


# ---- what both orders share ------------------------------------------------------------------------------------------


class Network:
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


class Draw:
    """Pixels from the network's outputs, and their log-probabilities."""

    def __init__(self, x, probs, shape, draws):
        self.x, self.probs, self.s, self.draws = x, probs, shape, draws
        self.each = 1 + shape.channels if shape.components else shape.channels  # uniforms of a pixel
        self.u = torch.empty(len(x), shape.size**2 * self.each, device=x.device)
        reference_uniform(self.u, draws.seed, draws.sample_ids, 0, _STREAM)

    def __call__(self, outputs, y, x, group):
        """outputs: (B, O) of the pixel and group."""
        first = (y * self.s.size + x) * self.each
        if self.s.components:
            return self._mixture(outputs, y, x, self.u[:, None, first : first + self.each])
        s, temperature = self.s, self.draws.temperature
        logits = outputs[:, : s.levels]
        level = inverse_cdf(logits.float(), self.u[:, first + group], temperature)
        value = (2 * level.float() - (s.levels - 1)) / (s.levels - 1)
        self._write(slice(group, group + 1), y, x, value[:, None], log_prob(logits, level, temperature))

    def _mixture(self, outputs, y, x, u):
        s, temperature = self.s, self.draws.temperature
        params = outputs[:, : s.logits, None]
        value = sample_by(params, s.channels, s.levels, temperature, u)[..., 0]
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
    logits, means, log_scales, couplings = split_params(params.double(), s.channels)
    means = means.clone()
    for (c, j), coupling in zip(pairs(s.channels), couplings.unbind(1), strict=True):
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


# ---- a whole forward pass for every pixel ----------------------------------------------------------------------------


class Naive:
    """The network over whole images, as the formulas stand above; of its output one pixel is used."""

    def __init__(self, x, probs, weights, draws):
        self.x, self.s = x, weights.shape
        self.net = Network(weights.shape, weights.matrices, weights.vectors)
        self.biases = self.net.class_bias(draws.labels, len(x))[:, :, :, None, None]  # (B, depth, 2, 1, 1, gates)
        self.draw = Draw(x, probs, weights.shape, draws)

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
            v = F.pad(v, (0, 0, 0, 0, 1, 0))
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
        padded = F.pad(net.rounded(v), (0, 0, reach, reach, rows - 1, 0))
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
        padded = F.pad(kept, (0, 0, reach, 0))
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


# ---- every activation computed once ----------------------------------------------------------------------------------


class Cached:
    """Pixel by pixel in eager PyTorch on preallocated caches: the strongest that eager does.

    Views of `state`: above[l] (B, rows, W + 2 r, F), the last rows of the vertical input; left[l] (B, W + r, F), this
    row's; vertical[l] (B, W, gates), the sums' part from the rows above.
    """

    def __init__(self, x, probs, state, weights, draws):
        self.x, self.s = x, weights.shape
        self.net = Network(weights.shape, weights.matrices, weights.vectors)
        self.biases = self.net.class_bias(draws.labels, len(x))
        self.draw = Draw(x, probs, weights.shape, draws)
        self.exact = weights.matrices.dtype != torch.bfloat16
        views = cache_shapes(self.s, len(x))
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


def cache_shapes(s, batch):
    """Shapes of the caches: rows above, columns to the left, sums from above."""
    above = [(batch, s.rows_above(i), s.size + 2 * s.reach_of(i), s.inputs(i)) for i in range(s.depth)]
    left = [(batch, s.size + s.reach_of(i), s.inputs(i)) for i in range(s.depth)]
    return above + left + [(batch, s.size, 2 * s.width)] * s.depth


def state_bytes(s, batch, dtype):
    return sum(torch.Size(sizes).numel() for sizes in cache_shapes(s, batch)) * dtype.itemsize
