"""Multistep solvers against their textbook loops, the exact flow and the moments of Gaussian data."""

import numpy as np
import pytest
from solver_support import (
    ON_PATHS,
    PREDICTIONS,
    RF,
    SMOOTH,
    VP,
    WHOLE,
    assert_convergence_order,
    assert_equals_loop,
    assert_reaches_the_moments,
    flow_errors,
)

from genengine import schedules, solvers
from genengine.paths import EDM
from genengine.table import unpack_flags


def loop_dpmpp_2m(model, path, grid, x, noise):  # Lu 2022 (DPM-Solver++), Alg. 2
    previous = h_previous = None
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x0 = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * x0
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        d = x0
        if previous is not None:
            r = h_previous / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = path.sigma(t_next) / path.sigma(t) * x - path.alpha(t_next) * np.expm1(-h) * d
        previous, h_previous = x0, h
    return x


def loop_dpmpp_2m_sde(model, path, grid, x, noise, eta=1.0):  # Lu 2022 (DPM-Solver++), midpoint
    previous = h_previous = None
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x0 = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * x0
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        gain = path.alpha(t_next) * -np.expm1(-(1 + eta) * h)
        x = path.sigma(t_next) / path.sigma(t) * np.exp(-eta * h) * x + gain * x0
        if previous is not None:
            x = x + 0.5 * gain * (x0 - previous) * h / h_previous
        x = x + path.sigma(t_next) * np.sqrt(-np.expm1(-2 * eta * h)) * noise[k]
        previous, h_previous = x0, h
    return x


def loop_lms(model, path, grid, x, noise, order=4):  # Adams-Bashforth with Gauss-Legendre quadrature, on x / alpha
    points, weights = np.polynomial.legendre.leggauss(4)
    ratio = path.sigma(grid) / path.alpha(grid)
    x, derivatives = x / path.alpha(grid[0]), []
    for i, t in enumerate(grid[:-1]):
        derivatives.append(model(path.alpha(t) * x, t)[1])
        used = range(max(0, i - order + 1), i + 1)
        at = ratio[i] + (points + 1) / 2 * (ratio[i + 1] - ratio[i])
        for j in used:
            basis = np.prod([(at - ratio[k]) / (ratio[j] - ratio[k]) for k in used if k != j], axis=0)
            x = x + (weights * basis).sum() / 2 * (ratio[i + 1] - ratio[i]) * derivatives[j]
    return path.alpha(grid[-1]) * x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loop", [loop_dpmpp_2m, loop_dpmpp_2m_sde])
def test_equals_textbook_for_every_prediction(loop, prediction, clip):
    assert_equals_loop(loop, VP, schedules.uniform(6, 0.98, 0.0), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
@pytest.mark.parametrize("loop", [loop_dpmpp_2m, loop_dpmpp_2m_sde])
def test_equals_textbook_on_every_path(loop, path, grid, prediction, clip):
    assert_equals_loop(loop, path, grid, prediction, clip)


@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_lms_equals_textbook_on_every_path(path, grid, prediction):
    assert_equals_loop(loop_lms, path, grid, prediction)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.6])
def test_dpmpp_2m_sde_with_eta_equals_textbook(eta):
    assert_equals_loop(loop_dpmpp_2m_sde, VP, schedules.uniform(6, 0.95), "eps", eta=eta)
    assert_equals_loop(loop_dpmpp_2m_sde, EDM(5.0), schedules.karras(6, 0.02, 5.0), "x0", eta=eta)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_equals_textbook(order):
    assert_equals_loop(loop_lms, VP, schedules.uniform(9, 0.9), "eps", order=order)
    assert_equals_loop(loop_lms, EDM(5.0), schedules.karras(9, 0.02, 5.0), "x0", order=order)


@pytest.mark.parametrize("path, prediction, t_max, t_min", SMOOTH)
@pytest.mark.parametrize(
    "name, order, options", [("dpmpp_2m", 2, {}), ("lms", 1, {"order": 1}), ("lms", 2, {"order": 2})]
)
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    assert_convergence_order(name, order, path, prediction, t_max, t_min, **options)


def test_lms_order_4_beats_order_2():
    steps = (80,)
    assert (
        flow_errors("lms", VP, "eps", 0.9, 0.05, steps) < flow_errors("lms", VP, "eps", 0.9, 0.05, steps, order=2) / 20
    )


@pytest.mark.parametrize("path, prediction, warp", WHOLE)
@pytest.mark.parametrize("name, options", [("dpmpp_2m_sde", {}), ("dpmpp_2m_sde", {"eta": 0.5})])
def test_samples_reach_the_mean_and_variance(name, options, path, prediction, warp):
    assert_reaches_the_moments(name, path, prediction, warp, **options)


def test_registers_that_nobody_reads_are_not_written():
    # from alpha = 0 the second step is first order too, and so is the last one, to sigma = 0
    table = solvers.dpmpp_2m(RF, schedules.uniform(5), prediction="velocity")
    assert [unpack_flags(flags)[1][0] for flags in table.column("flags")[:, 0]] == [0, 1, 1, 0, 0]
