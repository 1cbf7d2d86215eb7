"""Cases of guidance_moments: every dtype and layout, branches stacked, as views of 2C channels, and nearly equal."""

import itertools

import torch

from genengine.testing._case import DTYPES, LARGE, SMALL, Case


def moments_slack(u, c) -> float:
    """A float32 rounding of the largest sum of a sample's |terms|: sums of terms of either sign may cancel."""
    if u.numel() == 0:
        return 0.0
    u, c = u.double().reshape(len(u), -1).abs(), c.double().reshape(len(c), -1).abs()
    largest = torch.maximum(torch.maximum(u, c), (u + c).square())
    return torch.finfo(torch.float32).eps * largest.sum(1).max().item()


def _cases(generator, device) -> list[Case]:
    found = []
    layouts = ("stacked", "views", "channels_last")
    for dtype, shape, layout in itertools.product(DTYPES, (*SMALL, *LARGE, (2, 3, 57, 61)), layouts):
        batch, channels, *rest = shape
        width = 2 * channels if layout == "views" else channels
        both = torch.randn(2 * batch, width, *rest, generator=generator)
        both[batch:] = both[:batch] + 0.1 * both[batch:]
        both = both.to(device, dtype)[:, :channels]
        if layout == "channels_last":
            both = both.contiguous(memory_format=torch.channels_last)
        u, c = both.chunk(2)
        slack = {0: moments_slack(u, c)}
        found.append(
            Case(f"{dtype}, {shape}, {layout}", (u, c), large=shape not in SMALL, dtypes=(dtype,) * 2, slack=slack)
        )
    return found


CASES = {"guidance_moments": _cases}
