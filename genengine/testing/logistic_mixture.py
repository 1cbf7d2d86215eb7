"""Cases of logistic_mixture: log-probabilities, their backward, and samples; every dtype, layout, channel count."""

import itertools

import torch

from genengine.ops.logistic_mixture import LOWEST_LOG_SCALE, params_per_component
from genengine.testing._case import DTYPES, Case

# (B, C, K, pixels, bins): less than a tile of pixels, one each, and many; the last ones are slow where interpreted
_SMALL = ((2, 3, 2, (5, 7), 256), (3, 1, 3, (17,), 2), (5, 4, 1, (1, 1), 32), (1, 2, 5, (4, 4), 65536))
_LARGE = ((2, 3, 10, (12, 13), 256), (1, 1, 10, (14, 14), 256))
_EPS = torch.finfo(torch.float32).eps


def amplitude(channels, params) -> float:
    """How far a rounding carries: the largest sum over channels of e^-s (|x| + |m| + 1), by which a relative error of x
    or of a mean enters the ends of a bin."""
    if params.numel() == 0:
        return 0.0
    k = params.shape[1] // params_per_component(channels)
    wide = params.double().nan_to_num()
    means, log_scales = (
        wide.narrow(1, (1 + i * channels) * k, channels * k).unflatten(1, (channels, k)) for i in range(2)
    )
    return (torch.exp(-log_scales.clamp_min(LOWEST_LOG_SCALE)) * (channels + 1 + means.abs())).sum(1).max().item()


def log_prob_slack(channels, params) -> float:
    return _EPS * amplitude(channels, params)


def gradient_slack(grad, channels, params) -> float:
    """The ends move a gradient as they move the log-probability, times e^-s where it is a mean's."""
    far = amplitude(channels, params)
    return _EPS * grad.abs().max().item() * (1 + far / channels) * far if grad.numel() else 0.0


def data(generator, batch, channels, pixels, bins):
    """Values near the grid, the ends among them, float32."""
    index = torch.randint(0, bins, (batch, channels, *pixels), generator=generator).double()
    index[torch.rand(index.shape, generator=generator) < 0.1] = 0
    index[torch.rand(index.shape, generator=generator) < 0.1] = bins - 1
    off = 0.2 * (torch.rand(index.shape, generator=generator) - 0.5)
    return ((index + off) * (2 / (bins - 1)) - 1).float()


def parameters(generator, batch, channels, k, pixels, lowest=-3.0):
    """Log-scales from `lowest` to 3, some below the clamp if it is."""
    params = torch.randn(batch, k * params_per_component(channels), *pixels, generator=generator)
    params[:, k : k * (1 + channels)] *= 0.5
    scales = params[:, k * (1 + channels) : k * (1 + 2 * channels)]
    scales.copy_(lowest + (3 - lowest) * torch.rand(scales.shape, generator=generator))
    return params


def _inputs(generator, device):
    combinations = itertools.product(DTYPES, (*_SMALL, *_LARGE))
    for i, (dtype, (batch, channels, k, pixels, bins)) in enumerate(combinations):
        params = parameters(generator, batch, channels, k, pixels, lowest=(-3.0, -9.0)[i % 2]).to(device, dtype)
        if i % 4 > 1 and len(pixels) == 2:
            params = params.contiguous(memory_format=torch.channels_last)
        x = data(generator, batch, channels, pixels, bins).to(device)
        label = f"{dtype}, {batch=}, {channels=}, {k=}, {pixels=}, {bins=}, strides {params.stride()}"
        yield label, x, params, bins, {"large": (batch, channels, k, pixels, bins) in _LARGE, "dtypes": (dtype, dtype)}


def _log_prob(generator, device) -> list[Case]:
    return [
        Case(label, (x, params, bins), slack={0: log_prob_slack(x.shape[1], params)}, **kind)
        for label, x, params, bins, kind in _inputs(generator, device)
    ]


def _log_prob_backward(generator, device) -> list[Case]:
    found = []
    for label, x, params, bins, kind in _inputs(generator, device):
        grad = torch.randn(x.shape[0], *x.shape[2:], generator=generator).to(device)
        slack = {0: gradient_slack(grad, x.shape[1], params)}
        found.append(Case(label, (grad, x, params, bins), slack=slack, **kind))
    return found


def _sample(generator, device) -> list[Case]:
    found = []
    for i, (label, x, params, bins, kind) in enumerate(_inputs(generator, device)):
        batch, temperature = x.shape[0], (1.0, 0.7, 3.0)[i % 3]
        seed = torch.tensor(99 + i) if i % 2 else torch.arange(batch) - 1
        ids = torch.arange(batch, device=device) + 2**32 - batch if i % 3 else None
        args = (params, x.shape[1], bins, temperature, seed.to(device), ids, 5)
        found.append(Case(f"{label}, {temperature=}", args, exact=True, **kind))
    return found


CASES = {
    "logistic_mixture_log_prob": _log_prob,
    "logistic_mixture_log_prob_backward": _log_prob_backward,
    "logistic_mixture_sample": _sample,
}
