"""What the tests of engines share: a model, and the comparison with `sample`."""

import torch

import genengine
from genengine import paths, schedules

FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
SHAPE = (3, 2, 4, 4)
GRID = schedules.uniform(5, t_max=0.99, t_min=0.01)


def denoiser(x, t, y=None, gain=0.3):
    column = lambda v: v.reshape(-1, 1, 1, 1).to(x.dtype)  # noqa: E731
    y = torch.zeros_like(t) if y is None else y
    return torch.tanh(gain * x + column(t) + 0.1 * column(y))


def guided(k=1.0):
    y = k + torch.arange(3.0)
    return {"cond": {"y": y}, "uncond": {"y": torch.zeros(3)}}


def agree(engine, table, *args, **kwargs):
    """The engine's x, equal to that of `sample` uncaptured."""
    found = engine.sample(table, *args, **kwargs)
    expected = genengine.sample(engine.denoiser, table, *args, capture="never", **kwargs)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    return found
