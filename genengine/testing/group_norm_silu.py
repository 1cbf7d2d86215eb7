"""Cases of group_norm_silu, add_group_norm_silu, their backwards: groups on chip and in chunks, layouts, odd sizes."""

from collections.abc import Callable

import torch

from genengine.ops import _registry
from genengine.testing._case import DTYPES, Case

# (C, G, S): whole vectors and not, one pixel, one group, one channel per group, more than a chunk of pixels
_SMALL = ((12, 3, 35), (64, 8, 64), (40, 5, 1), (6, 6, 7), (20, 1, 50), (3, 1, 16))
_LARGE = ((32, 2, 1024), (48, 3, 1500), (9, 3, 2500), (640, 32, 100))
_KINDS = ((True, True, True), (True, False, True), (False, False, True), (False, True, False))  # rows, modulation, silu


def _maker(backward: bool, add: bool = False) -> Callable:
    def make(generator, device):
        pairs = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
        found = []
        for i, (dtype, narrow) in enumerate(pairs):
            for j, size in enumerate((*_SMALL[:: 1 + add], *_LARGE[:: 1 + add])):
                for last in (False, True):
                    kind = _KINDS[(i + j + last) % len(_KINDS)]
                    label = f"{dtype}/{narrow}, (C, G, S) = {size}, channels_last {last}, kind {kind}"
                    args = _arguments(generator, device, dtype, narrow, size, last, kind, backward)
                    slack = {}
                    if add:  # x is the sum of two, or has a gradient of its own
                        other = torch.randn(args[0].shape, generator=generator).to(device, dtype)
                        args = (other, *args) if backward else (*_summands(args[0], other), *args[1:])
                        slack = {} if backward else {3: _merging(*args)}
                    large = size in _LARGE or narrow != dtype
                    found.append(Case(label, args, large=large, dtypes=(dtype, narrow), slack=slack))
        return found

    return make


def _summands(*tensors):
    """The tensors; in eighths where Triton's interpreter would truncate their sum to bfloat16, not round it."""
    if tensors[0].dtype != torch.bfloat16 or not _registry.triton_interpreted():
        return tensors
    return tuple((8 * tensor).round() / 8 for tensor in tensors)


def _merging(*args):
    """What merging chunks may cost rstd: their means are rounded, by eps |mean|, and lie up to 1 / rstd apart."""
    *_, mean, rstd = _registry.OPS["add_group_norm_silu"].overloads["reference"](*args)
    return torch.finfo(torch.float32).eps * (mean.abs() * rstd**2).max().item()


def _arguments(generator, device, dtype, narrow, size, last, kind, backward, batch=2):
    channels, groups, pixels = size
    parameters, modulated, silu = kind
    fresh = lambda *shape, kind: torch.randn(*shape, generator=generator).to(device, kind)  # noqa: E731
    shape = (batch, pixels, channels) if last else (batch, channels, pixels)
    x, grad = 2 * fresh(*shape, kind=dtype) + 1, fresh(*shape, kind=dtype)
    weight, bias = (fresh(channels, kind=narrow) for _ in range(2)) if parameters else (None, None)
    scale, shift = fresh(batch, 2 * channels, kind=narrow).chunk(2, dim=1) if modulated else (None, None)
    rows = (weight, bias, scale, shift)
    if not backward:
        return (x, *rows, groups, 1e-5, silu, last)
    forward = _registry.OPS["group_norm_silu"].overloads["reference"]
    _, mean, rstd = forward(x, *rows, groups, 1e-5, silu, last)
    return (grad, x, *rows, mean, rstd, groups, silu, last)


CASES = {
    "group_norm_silu": _maker(False), "group_norm_silu_backward": _maker(True),
    "add_group_norm_silu": _maker(False, add=True), "add_group_norm_silu_backward": _maker(True, add=True),
}  # fmt: skip
