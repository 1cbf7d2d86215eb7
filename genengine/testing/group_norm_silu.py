"""Cases of group_norm_silu and its backward: groups held on chip and groups in chunks, both layouts, odd sizes."""

from collections.abc import Callable

import torch

from genengine.ops import _registry
from genengine.testing._case import DTYPES, Case

# (C, G, S): whole vectors and not, one pixel, one group, one channel per group, more than a chunk of pixels
_SMALL = ((12, 3, 35), (64, 8, 64), (40, 5, 1), (6, 6, 7), (20, 1, 50), (3, 1, 16))
_LARGE = ((32, 2, 1024), (48, 3, 1500), (9, 3, 2500), (640, 32, 100))
_KINDS = ((True, True, True), (True, False, True), (False, False, True), (False, True, False))  # rows, modulation, silu


def _maker(backward: bool) -> Callable:
    def make(generator, device):
        pairs = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
        found = []
        for i, (dtype, narrow) in enumerate(pairs):
            for j, size in enumerate((*_SMALL, *_LARGE)):
                for last in (False, True):
                    kind = _KINDS[(i + j + last) % len(_KINDS)]
                    label = f"{dtype}/{narrow}, (C, G, S) = {size}, channels_last {last}, kind {kind}"
                    args = _arguments(generator, device, dtype, narrow, size, last, kind, backward)
                    found.append(Case(label, args, large=size in _LARGE or narrow != dtype, dtypes=(dtype, narrow)))
        return found

    return make


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


CASES = {"group_norm_silu": _maker(False), "group_norm_silu_backward": _maker(True)}
