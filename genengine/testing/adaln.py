"""Cases of adaln, gated_adaln and their backwards: tokens of one chunk and of more than a group, D of every team."""

from collections.abc import Callable

import torch

from genengine.testing._case import DTYPES, Case

# (tokens, D)
_ADALN_SMALL = ((5, 17), (5, 64), (5, 384), (5, 768), (5, 1152), (5, 3000))
_ADALN_LARGE = ((300, 40), (300, 17), (2, 2501), (17, 8192))


def _adaln_tensors(generator, device, dtype, narrow, batch=2):
    for tokens, width in (*_ADALN_SMALL, *_ADALN_LARGE):
        fresh = lambda *shape, kind: torch.randn(*shape, generator=generator).to(device, kind)  # noqa: E731
        rows = fresh(batch, 6 * width, kind=narrow).chunk(6, dim=1)  # strided views into one modulation table
        x, branch = fresh(batch, tokens, width, kind=dtype), fresh(batch, tokens, width, kind=narrow)
        yield (tokens, width), x, branch, rows, fresh(batch, tokens, width, kind=dtype)


def _adaln_maker(name: str) -> Callable:
    def make(generator, device):
        found = []
        pairs = [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)]
        for dtype, narrow in pairs:
            for size, x, branch, (gate, scale, shift, *_), grad in _adaln_tensors(generator, device, dtype, narrow):
                grad_h = grad.to(narrow)
                args = {
                    "adaln": (x, scale, shift, 1e-6),
                    "adaln_backward": (grad_h, x, scale, 1e-6),
                    "gated_adaln": (x, branch, gate, scale, shift, 1e-6),
                    "gated_adaln_backward": (grad, grad_h, x, branch, gate, scale, 1e-6),
                }[name]
                label = f"{dtype}/{narrow}, (N, D) = {size}"
                found.append(Case(label, args, large=size in _ADALN_LARGE, dtypes=(dtype, narrow)))
        return found

    return make


CASES = {name: _adaln_maker(name) for name in ("adaln", "adaln_backward", "gated_adaln", "gated_adaln_backward")}
