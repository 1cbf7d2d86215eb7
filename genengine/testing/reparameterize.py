"""Cases of reparameterize and its backward: every dtype, layout, source of noise and KL."""

import itertools

import torch

from genengine.ops.reparameterize import reference
from genengine.testing._case import DTYPES, LARGE, SMALL, Case

_NOISE = ("drawn", "drawn by ids", "given")
_KL = ((0.0, False), (0.4, False), (0.0, True))  # (free_bits, monte_carlo)


def kl_slack(mean, logvar) -> float:
    """A float32 rounding of the sum of a sample's |terms|, the batch's largest; 36 bounds the square of a normal."""
    if mean.numel() == 0:
        return 0.0
    m, v = mean.double(), logvar.double()
    terms = m.square() + v.exp() * 36 + v.abs() + 36
    return torch.finfo(torch.float32).eps * terms.reshape(len(terms), -1).sum(1).max().item()


def gradient_slack(grad_z, grad_kl, mean, logvar, z) -> tuple[float, float]:
    """Two float32 roundings of the terms of dmean and dlogvar, which may cancel; z: as drawn."""
    if mean.numel() == 0:
        return 0.0, 0.0
    g, m, v, z = (t.double().abs() for t in (grad_z, mean, logvar, z))
    k = grad_kl.double().abs().reshape(-1, *[1] * (m.dim() - 1))
    spread = (z.double() - mean.double()).abs() + m  # |sigma eps|, and no less than what z - mean loses of it
    for_mean = g + k * (m + z)
    for_logvar = 0.5 * (for_mean * spread + k * (logvar.double().exp() + 1))
    return tuple(2 * torch.finfo(torch.float32).eps * terms.max().item() for terms in (for_mean, for_logvar))


def _tensors(generator, device, dtype, shape, memory):
    batch, channels, *rest = shape
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    if memory == torch.contiguous_format:  # two views with holes between their samples
        mean, logvar = draw(batch, 2 * channels, *rest).to(device, dtype).chunk(2, dim=1)
    else:
        mean, logvar = (draw(*shape).to(device, dtype).contiguous(memory_format=memory) for _ in range(2))
    noise, grad_z = (draw(*shape).to(device).contiguous(memory_format=memory) for _ in range(2))
    return mean, logvar, noise, grad_z.to(dtype), draw(batch).to(device)


def _maker(backward: bool):
    def make(generator, device) -> list[Case]:
        found = []
        memories = (torch.contiguous_format, torch.channels_last)
        options = list(itertools.product(_NOISE, _KL))
        for i, (dtype, shape, memory) in enumerate(itertools.product(DTYPES, (*SMALL, *LARGE), memories)):
            mean, logvar, noise, grad_z, grad_kl = _tensors(generator, device, dtype, shape, memory)
            seed, ids = torch.tensor(99, device=device), torch.arange(shape[0], device=device) + 2**32 - shape[0]
            for source, (free_bits, monte_carlo) in options[i % 3 :: 3]:  # every third pair, each in turn
                draw = (
                    (None, None, 0, noise) if source == "given" else (seed, ids if "ids" in source else None, 5, None)
                )
                tensors = (grad_z, grad_kl, mean, logvar) if backward else (mean, logvar)
                label = (
                    f"{dtype}, {shape}, {str(memory).removeprefix('torch.')}, {source}, {free_bits=}, {monte_carlo=}"
                )
                args = (*tensors, *draw, free_bits, monte_carlo)
                slack = {1: kl_slack(mean, logvar)}
                if backward:
                    z = reference(mean, logvar, *draw, free_bits, monte_carlo)[0]
                    slack = dict(enumerate(gradient_slack(*tensors, z)))
                found.append(Case(label, args, large=shape in LARGE, dtypes=(dtype, dtype), slack=slack))
        return found

    return make


CASES = {"reparameterize": _maker(backward=False), "reparameterize_backward": _maker(backward=True)}
