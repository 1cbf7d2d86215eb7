"""Cases of normal and uniform."""

import torch

from genengine.testing._case import Case


def _noise_cases(generator, device) -> list[Case]:
    found = []
    for shape in ((3, 5), (2, 3, 16, 16), (2, 3, 24, 24), (1, 4099)):
        batch = shape[0]
        ids = torch.randint(0, 2**32, (batch,), generator=generator).to(device)
        seeds = torch.randint(-(2**62), 2**62, (batch,), generator=generator).to(device)
        out = torch.zeros(shape, device=device)
        found.append(Case(f"{shape}, one seed", (out, seeds[0].clone(), None, 7, 1), (0,), True))
        found.append(Case(f"{shape}, seeds and ids", (out, seeds, ids, 2**32 - 1, 3), (0,), True))
    return found


CASES = {"normal_out": _noise_cases, "uniform_out": _noise_cases}
