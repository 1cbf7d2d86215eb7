"""Solvers from data to noise against their textbook loops and the exact flow."""

import numpy as np
import pytest
from solver_support import INSIDE, PREDICTIONS, RF, VP, Exact, assert_convergence_order, assert_equals_loop, run_table

from genengine import schedules, solvers
from genengine.paths import EDM
from genengine.table import unpack_flags


def loop_ddim_inverse(model, path, grid, x, noise, model_at="start"):  # Song 2020 (DDIM), section 4.3
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        if model_at == "end":  # the network is asked at t_next, and its output read as eps at t
            eps = model.branches(x, t_next)[0]
            x0 = (x - path.sigma(t) * eps) / path.alpha(t)
        else:
            x0, eps, _ = model(x, t)
        x = path.alpha(t_next) * x0 + path.sigma(t_next) * eps
    return x


def loop_dpmpp_2m_inverse(model, path, grid, x, noise):  # Lu 2022 (DPM-Solver++), Alg. 2 with h < 0
    previous = h_previous = None
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x0, eps, _ = model(x, t)
        if path.sigma(t) == 0 or path.alpha(t_next) == 0:  # an infinite step
            x = path.alpha(t_next) * x0 + path.sigma(t_next) * eps
            continue
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        d = x0 if previous is None else x0 + h / h_previous / 2 * (x0 - previous)
        x = path.sigma(t_next) / path.sigma(t) * x - path.alpha(t_next) * np.expm1(-h) * d
        previous, h_previous = x0, h
    return x


LOOPS = [loop_ddim_inverse, loop_dpmpp_2m_inverse]
RISING = schedules.uniform(6, 0.98, 0.05)[::-1]


def rising(num_steps, t_max, t_min):
    return schedules.uniform(num_steps, t_min, t_max)[::-1]


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loop", LOOPS)
def test_equals_textbook_for_every_prediction(loop, prediction, clip):
    assert_equals_loop(loop, VP, RISING, prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("loop", LOOPS)
def test_equals_textbook_from_the_data(loop):
    assert_equals_loop(loop, VP, schedules.uniform(6)[::-1], "eps")
    assert_equals_loop(loop, VP, schedules.uniform(6)[::-1], "v")
    assert_equals_loop(loop, RF, schedules.uniform(6)[::-1], "velocity")
    assert_equals_loop(loop, EDM(5.0), schedules.karras(6, 0.02, 5.0)[::-1], "eps")


def test_ddim_inverse_at_the_end_of_the_step():
    for grid in (RISING, schedules.uniform(6)[::-1]):
        assert_equals_loop(loop_ddim_inverse, VP, grid, "eps", model_at="end")
    table = solvers.ddim_inverse(VP, schedules.uniform(4)[::-1], prediction="eps", model_at="end")
    np.testing.assert_allclose(table.t_model[:, 0], [0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
@pytest.mark.parametrize("name, order", [("ddim_inverse", 1), ("dpmpp_2m_inverse", 2)])
def test_convergence_order(name, order, path, prediction, t_max, t_min):
    assert_convergence_order(name, order, path, prediction, t_min, t_max, grid=rising)


def test_there_and_back_again():
    grid, x = schedules.uniform(200, 0.9, 0.1), np.linspace(-2, 2, 9)
    noisy = run_table(solvers.dpmpp_2m_inverse(VP, grid[::-1], prediction="eps"), Exact(VP, "eps"), x)
    back = run_table(solvers.dpmpp_2m(VP, grid, prediction="eps"), Exact(VP, "eps"), noisy)
    np.testing.assert_allclose(back, x, atol=1e-3)
    assert np.abs(noisy - x).max() > 0.5


def test_tables_are_lean():
    for name, history in (("ddim_inverse", 0), ("dpmpp_2m_inverse", 1)):
        table = solvers.INVERSE_SOLVERS[name](VP, RISING, prediction="eps")
        assert table.num_rows == 6 and table.num_history == history and not table.needs_noise
        assert table.name == name and unpack_flags(table.column("flags")[-1, 0])[1] == (0, 0, 0)


@pytest.mark.parametrize("name", solvers.INVERSE_SOLVERS)
def test_errors(name):
    solver, up = solvers.INVERSE_SOLVERS[name], schedules.uniform(4)[::-1]
    with pytest.raises(ValueError, match=r"strictly rising times in \[0, 1\], got .* reversed with \[::-1\]"):
        solver(VP, schedules.uniform(4), prediction="eps")
    with pytest.raises(ValueError, match="clip leaves eps undetermined where sigma = 0, got t = 0.0"):
        solver(VP, up, prediction="eps", clip=1.0)
    with pytest.raises(ValueError, match="prediction 'x0': needs sigma > 0, got sigma = 0 at t = 0.0"):
        solver(VP, up, prediction="x0")
    with pytest.raises(ValueError, match="prediction 'score': needs sigma > 0, got sigma = 0 at t = 0.0"):
        solver(VP, up, prediction="score")
    with pytest.raises(ValueError, match="model_at must be 'start' or 'end', got 'middle'"):
        solvers.ddim_inverse(VP, up, prediction="eps", model_at="middle")
