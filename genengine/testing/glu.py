"""Cases of glu and its backward: both packings, odd rows and rows of whole vectors, rows with gaps."""

import torch

from genengine.testing._case import DTYPES, Case

_SMALL, _LARGE = ((2, 3, 7), (2, 5, 64), (1, 40, 24)), ((2, 150, 40), (1, 3, 1536), (1, 2, 2501))  # (B, N, D)


def _maker(name):
    def make(generator, device):
        found = []
        for dtype in DTYPES:
            for number, (batch, tokens, dim) in enumerate((*_SMALL, *_LARGE) * 2):
                draw = lambda kind, *size: torch.randn(*size, generator=generator).to(device, kind)  # noqa: E731
                activation, gate_first = ("gelu", "silu", "gelu_tanh")[number // 2 % 3], number % 2 == 0
                x, grad = draw(dtype, batch, tokens, 2 * dim + 8)[..., : 2 * dim], draw(dtype, batch, tokens, dim)
                bias = draw(torch.float32 if number % 3 else dtype, 2 * dim) if number % 4 else None
                args = (x, bias, activation, gate_first)
                label = f"{dtype}, (B, N, D) = {(batch, tokens, dim)}, {activation}, gate first: {gate_first}"
                large = (batch, tokens, dim) in _LARGE
                args = args if name == "glu" else (grad, *args)
                found.append(Case(label, args, large=large, dtypes=(dtype, dtype)))
        return found

    return make


CASES = {name: _maker(name) for name in ("glu", "glu_backward")}
