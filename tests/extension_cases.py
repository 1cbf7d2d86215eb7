"""What the tests of extensions share: a model, two paths with their grids, and what guidance does by itself."""

import torch

from genengine import paths, schedules, solvers
from genengine.ops import normal

FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
FLOW_GRID, VP_GRID = schedules.uniform(6), schedules.uniform(5, t_max=0.99, t_min=0.01)
SHAPE = (3, 2, 6, 5)
W = 4.0
Y = torch.tensor([1.0, 2.0, 3.0])
MASK = (torch.arange(30).reshape(6, 5) % 3 > 0).float()


def denoiser(x, t, y=None):
    """Elementwise, and different for every branch."""
    column = lambda v: v.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)  # noqa: E731
    y = torch.zeros_like(t) if y is None else y
    return torch.tanh(0.8 * x + column(t) + 0.3 * column(y) * x) + 0.1 * column(y)


def branches(ids=slice(None)):
    return {"cond": {"y": Y[ids]}, "uncond": {"y": 0 * Y[ids]}, "guidance": W}


def flow_table(**options):
    return solvers.euler(FLOW, FLOW_GRID, prediction="velocity", **options)


def initial(shape=SHAPE, seed=7):
    return normal(shape, seed=seed).double()


def each(samples, value):
    """(B,) as something that broadcasts against samples."""
    return value.reshape(-1, *[1] * (samples.dim() - 1))


def times(t, batch=3):
    return torch.full((batch,), float(t), dtype=torch.float64)


def plain(u, c, row):
    return u + W * (c - u)


def guided(x, t):
    return plain(*(denoiser(x, times(t, len(x)), y.double()) for y in (0 * Y[: len(x)], Y[: len(x)])), 0)
