"""Cases of diffuse."""

import itertools

import torch

from genengine.testing._case import DTYPES, LARGE, SMALL, Case


def _diffuse_cases(generator, device) -> list[Case]:
    found = []
    memories = (torch.contiguous_format, torch.channels_last)
    for dtype, shape, memory in itertools.product(DTYPES, (*SMALL, *LARGE), memories):
        x0 = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=memory)
        coefficients = torch.randn(4, shape[0], generator=generator).to(device).unbind(0)
        noise = torch.randn(shape, generator=generator).to(device).contiguous(memory_format=memory)
        seed, ids = torch.tensor(99, device=device), torch.arange(shape[0], device=device) + 2**32 - shape[0]
        label = f"{dtype}, {shape}, {str(memory).removeprefix('torch.')}"
        kind = ((), True, shape in LARGE, (dtype, dtype))
        found.append(Case(f"{label}, drawn", (x0, *coefficients, seed, ids, 5, None), *kind))
        found.append(Case(f"{label}, given", (x0, *coefficients, None, None, 0, noise), *kind))
    return found


CASES = {"diffuse": _diffuse_cases}
