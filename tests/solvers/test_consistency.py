"""Solvers for consistency networks against the papers' loops, and the exact consistency function."""

import numpy as np
import pytest
from solver_support import ON_PATHS, PREDICTIONS, RF, VP, Network, assert_equals_loop, gaussian, run_table

from genengine import schedules, solvers
from genengine.paths import EDM


def loop_consistency(model, path, grid, x, noise):  # Song 2023, Alg. 1, on x = x0 + sigma z (and x0 at the data end)
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x0 = model(x, t)[0]
        epsilon = path.sigma(grid[-1]) / path.alpha(grid[-1])
        level = path.sigma(t_next) / path.alpha(t_next)
        x = path.alpha(t_next) * (x0 + np.sqrt(max(level**2 - epsilon**2, 0)) * noise[k])
    return x


def loop_lcm(model, path, grid, x, noise, timestep_scaling=10.0, sigma_data=0.5, num_timesteps=1000):  # Luo 2023
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        s = (num_timesteps * t - 1) * timestep_scaling
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s / (s**2 + sigma_data**2) ** 0.5
        denoised = c_out * model(x, t)[0] + c_skip * x
        x = path.alpha(t_next) * denoised + path.sigma(t_next) * noise[k] if t_next > 0 else denoised
    return x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_textbook_for_every_prediction(prediction, clip):
    grid = schedules.uniform(5, 0.98)
    assert_equals_loop(loop_consistency, VP, grid, prediction, clip, 2.5)
    assert_equals_loop(loop_lcm, VP, grid, prediction, clip, 2.5)
    scalings = {"timestep_scaling": 0.3, "sigma_data": 0.7, "num_timesteps": 30}
    assert_equals_loop(loop_lcm, VP, grid, prediction, clip, **scalings)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_equals_textbook_on_every_path(path, grid, prediction, clip):
    assert_equals_loop(loop_consistency, path, grid, prediction, clip)


def test_flow_match_lcm_is_consistency_on_a_rectified_flow():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((3, 5)), rng.standard_normal((4, 3, 5))
    grid, model = schedules.shifted(4), Network(RF, "velocity")
    table = solvers.consistency(RF, grid, prediction="velocity")
    actual = run_table(table, model.branches, x, noise)
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x0 = x - t * model.branches(x, t)[0]
        x = t_next * noise[k] + (1 - t_next) * x0
    np.testing.assert_allclose(actual, x, rtol=1e-13)
    assert table.num_history == 0 and table.column("s")[-1] == 0


def test_the_exact_consistency_function_gives_exact_samples():
    path = EDM(20.0)
    grid = np.array([1.0, 0.3, 0.1, 0.001])
    (end_mean, end_std), basis = gaussian(path, grid[-1]), np.eye(5)

    def consistency_function(x, t):
        mean, std = gaussian(path, t)
        return [end_mean * basis[0] + end_std / std * (x - mean * basis[0])]

    mean, std = gaussian(path, 1.0)
    table = solvers.consistency(path, grid, prediction="x0")
    x = run_table(table, consistency_function, mean * basis[0] + std * basis[1], noise=basis[2:])
    assert (x[0], np.sum(x[1:] ** 2)) == pytest.approx((end_mean, end_std**2), rel=1e-12)


@pytest.mark.parametrize("option", ["timestep_scaling", "sigma_data", "num_timesteps"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_bad_scalings_are_refused(option, value):
    with pytest.raises(ValueError, match=f"lcm: {option} must be a finite number above 0, got"):
        solvers.lcm(VP, schedules.uniform(4), prediction="eps", **{option: value})
