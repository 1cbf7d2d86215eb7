"""Guidance and thresholds that the outputs decide: each equal to a textbook loop in float64."""

import numpy as np
import pytest
import torch
from extension_cases import (
    FLOW_GRID,
    SHAPE,
    VP,
    VP_GRID,
    W,
    Y,
    branches,
    denoiser,
    each,
    flow_table,
    initial,
    plain,
    times,
)
from hypothesis import given
from hypothesis import strategies as st

import genengine
from genengine import extensions as ext
from genengine import solvers
from genengine.extensions.threshold import row_quantile
from genengine.ops import normal

# ---- guidance ----------------------------------------------------------------------------------------------------


def rescaled(u, c, row, phi=0.7):
    """Lin 2024, eqs. 14-16."""
    m, dims = plain(u, c, row), list(range(1, u.dim()))
    factor = c.std(dims, keepdim=True) / m.std(dims, keepdim=True)
    return phi * m * factor + (1 - phi) * m


def zero_star(u, c, row, steps=2):
    """Fan 2025."""
    s = (u * c).flatten(1).sum(1) / (u * u).flatten(1).sum(1)
    su = each(u, s) * u
    return su + W * (c - su) if row >= steps else 0 * u


def projected(u, c, row, eta=0.25, threshold=2.5):
    """Sadat 2024, Alg. 1, without momentum."""
    diff = c - u
    norm = diff.flatten(1).norm(dim=1)
    diff = diff * each(u, torch.minimum(torch.ones_like(norm), threshold / norm))
    unit = c / each(u, c.flatten(1).norm(dim=1))
    parallel = each(u, (diff * unit).flatten(1).sum(1)) * unit
    return c + (W - 1) * (diff - parallel + eta * parallel)


def per_channel(u, c, row):
    return torch.cat([u[:, :1] + 3 * (c[:, :1] - u[:, :1]), c[:, 1:]], 1)


def in_interval(u, c, row):
    return plain(u, c, row) if 0.2 < FLOW_GRID[row] <= 0.7 else c


GUIDANCE = [
    (ext.Rescale(0.7), rescaled),
    (ext.CFGZeroStar(zero_init_steps=2), zero_star),
    (ext.Projected(eta=0.25, norm_threshold=2.5), projected),
    (ext.Projected(eta=1.0), plain),
    (ext.PerChannelGuidance([3.0, 1.0]), per_channel),
    (ext.GuidanceInterval(0.2, 0.7), in_interval),
]


@pytest.mark.parametrize(("extension", "combine"), GUIDANCE, ids=[type(e).__name__ for e, _ in GUIDANCE])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_guidance_against_the_textbook(extension, combine, layout):
    x = initial()
    got = genengine.sample(
        denoiser, flow_table(), x=x.float().contiguous(memory_format=layout), extensions=(extension,), **branches()
    )
    for row, (t, t_next) in enumerate(zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True)):
        u, c = (denoiser(x, times(t), y.double()) for y in (0 * Y, Y))
        x = x + (t_next - t) * combine(u, c, row)
    assert (got - x).abs().max() < 1e-5 and got.is_contiguous(memory_format=layout)
    unextended = genengine.sample(denoiser, flow_table(), x=initial().float(), **branches())
    assert ((got - unextended).abs().max() > 1e-2) == (combine is not plain)


@pytest.mark.parametrize("name", ["Rescale", "Projected"])
def test_guidance_of_close_branches_keeps_its_digits(name):
    """c differs from u by a thousandth: its length and the spread of m come from differences, not from sums."""
    close = lambda x, t, y: torch.sin(x) + 0.5 + 1e-3 * y.reshape(-1, 1, 1, 1).to(x.dtype) * torch.sin(9 * x)  # noqa: E731
    extension = {"Rescale": ext.Rescale(1.0), "Projected": ext.Projected(1.0, norm_threshold=1e-3)}[name]
    x = initial()
    got = genengine.sample(close, flow_table(), x=x.float(), extensions=(extension,), **branches())
    combine = {
        "Rescale": lambda u, c: rescaled(u, c, 0, 1.0),
        "Projected": lambda u, c: projected(u, c, 0, 1.0, 1e-3),
    }[name]
    for t, t_next in zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True):
        x = x + (t_next - t) * combine(*(close(x, times(t), y.double()) for y in (0 * Y, Y)))
    assert (got - x).abs().max() < 3e-6


def test_weights_that_cancel_leave_finite_numbers():
    """phi = 1 and a constant conditional output: std(c) is 0, and so is m."""
    constant = lambda x, t, y: torch.where(y.reshape(-1, 1, 1, 1) > 0, 0.5, torch.tanh(x))  # noqa: E731
    x = genengine.sample(constant, flow_table(), SHAPE, seed=7, extensions=(ext.Rescale(1.0),), **branches())
    assert (x - initial()).abs().max() < 1e-3
    zero = lambda x, t, y: torch.zeros_like(x)  # noqa: E731
    for extension in (ext.CFGZeroStar(0), ext.Projected(0.0, 1.0), ext.Rescale()):
        x = genengine.sample(zero, flow_table(), SHAPE, seed=7, extensions=(extension,), **branches())
        assert torch.equal(x, normal(SHAPE, seed=7))


def test_per_channel_weights_per_sample_and_sixteen_bits():
    weights = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 5.0]])
    x = initial()
    run = lambda **options: genengine.sample(  # noqa: E731
        denoiser, flow_table(), x=x.float(), extensions=(ext.PerChannelGuidance(weights),), **branches(), **options
    )
    got, coarse = run(), run(model_dtype=torch.bfloat16)
    for t, t_next in zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True):
        u, c = (denoiser(x, times(t), y.double()) for y in (0 * Y, Y))
        x = x + (t_next - t) * (u + weights[:, :, None, None] * (c - u))
    assert (got - x).abs().max() < 1e-5 and (coarse - x).abs().max() < 0.1


# ---- thresholds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quantile": 0.5}, {"quantile": 0.9, "max_value": 1.5}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dynamic_threshold_against_the_textbook(options, layout):
    """DDIM on eps with x0 thresholded, eps derived again from it (Saharia 2022)."""
    table = solvers.ddim(VP, VP_GRID, prediction="eps", clip=1.0)
    x = 2 * initial()
    got = genengine.sample(
        denoiser, table, x=x.float().contiguous(memory_format=layout), extensions=(ext.DynamicThreshold(**options),),
        **branches(),
    )  # fmt: skip
    radii = []
    for t, t_next in zip(VP_GRID[:-1], VP_GRID[1:], strict=True):
        u, c = (denoiser(x, times(t), y.double()) for y in (0 * Y, Y))
        x0 = (x - VP.sigma(t) * plain(u, c, 0)) / VP.alpha(t)
        r = torch.quantile(x0.abs().flatten(1), options.get("quantile", 0.995), dim=1)
        r = r.clamp(1.0, options.get("max_value", np.inf))
        radii.append(r)
        y = torch.maximum(torch.minimum(x0, each(x, r)), -each(x, r)) / each(x, r)
        eps = (x - VP.alpha(t) * y) / VP.sigma(t)
        x = VP.alpha(t_next) * y + VP.sigma(t_next) * eps
    assert (got - x).abs().max() < 2e-5 and torch.stack(radii).max() > 1.2


@given(n=st.integers(1, 300), quantile=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_quantile_is_torch_s(n, quantile, seed):
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    expected = torch.quantile(values.double(), quantile, dim=1)
    assert (row_quantile(values, quantile) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.94, 0.995, 1.0])
def test_quantile_of_many_values_and_ties(quantile):
    values = torch.randn(2, 5000).mul(4).round()
    expected = torch.quantile(values.double(), quantile, dim=1)
    assert (row_quantile(values, quantile) - expected).abs().max() < 1e-6
