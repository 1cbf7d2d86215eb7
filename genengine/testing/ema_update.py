"""Cases of ema_update: every pair of dtypes, sizes around a block's, empty, unaligned and channels_last tensors."""

import itertools

import torch

from genengine.testing._case import DTYPES, Case

_SHAPES = ((1,), (17,), (0, 3), (64, 64), (4097,), (2, 3, 5, 7))


def _ema_cases(generator, device) -> list[Case]:
    def fresh(shape, dtype):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x

    def unaligned(dtype):
        return fresh((8200,), dtype)[1:]

    found = []
    for average, value in itertools.product(DTYPES, DTYPES):
        averages = [*(fresh(shape, average) for shape in _SHAPES), unaligned(average)]
        values = [*(fresh(shape, value) for shape in _SHAPES), unaligned(value)]
        found.append(Case(f"{average} averages, {value} values", (averages, values, 0.01), (0,), True))
    mixed = [fresh((5, 9), dtype) for dtype in (*DTYPES, *DTYPES)]
    found.append(
        Case("mixed dtypes", (mixed, [fresh((5, 9), d) for d in (*DTYPES[1:], *DTYPES, DTYPES[0])], 0.5), (0,), True)
    )
    return found


CASES = {"ema_update": _ema_cases}
