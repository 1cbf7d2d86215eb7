"""EDM's stochastic sampler against Karras 2022, Alg. 2, and against the closed form of Gaussian data."""

import numpy as np
import pytest
from solver_support import (
    MEAN,
    ON_PATHS,
    PREDICTIONS,
    RF,
    SMOOTH,
    STD,
    VP,
    Network,
    assert_convergence_order,
    assert_equals_loop,
    gaussian,
    run_table,
    sampled_moments,
)

from genengine import schedules, solvers
from genengine.paths import EDM

METHODS = ("heun", "euler", "dpm_2")
CHURN = {"s_churn": 1.5, "s_tmin": 0.3, "s_noise": 1.02}


def loop_edm(model, path, grid, x, noise, method="heun", s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0):
    """Alg. 2 on u = x/alpha with noise level r = sigma/alpha; x is x_hat of the first step, as tables start there."""
    t_of = lambda r: path.t_of_log_snr(-2 * np.log(r)) if r > 0 else grid[-1]  # noqa: E731
    slope = lambda u, r: model(path.alpha(t_of(r)) * u, t_of(r))[1]  # d u/dr = eps  # noqa: E731
    levels = path.sigma(grid) / path.alpha(grid)
    num_steps, row = len(grid) - 1, -1
    gamma = np.where((s_tmin <= levels) & (levels <= s_tmax), min(s_churn / num_steps, np.sqrt(2) - 1), 0)
    hats = levels + gamma * levels
    u = x / path.alpha(t_of(hats[0]))
    for i in range(num_steps):
        r, r_next = hats[i], levels[i + 1]
        if i > 0:
            u = u + np.sqrt(r**2 - levels[i] ** 2) * s_noise * noise[row]
        d = slope(u, r)
        euler = u + (r_next - r) * d
        row += 1
        if method == "euler" or r_next == 0:
            u = euler
        elif method == "heun":
            u = u + (r_next - r) * (d / 2 + slope(euler, r_next) / 2)
            row += 1
        else:
            middle = np.exp((np.log(r) + np.log(r_next)) / 2)
            u = u + (r_next - r) * slope(u + (middle - r) * d, middle)
            row += 1
    return path.alpha(grid[-1]) * u


@pytest.mark.parametrize("options", [{}, CHURN, {"s_churn": 99.0, "s_tmin": 0.1, "s_tmax": 2.0}], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_equals_the_algorithm_on_every_path(path, grid, prediction, method, options):
    grid = grid * 0.7  # room for churn
    for clip in (None, 0.6):
        assert_equals_loop(loop_edm, path, grid, prediction, clip, method=method, **options)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_algorithm_for_every_prediction(method, prediction, clip):
    grid = schedules.uniform(6, 0.7)
    assert_equals_loop(loop_edm, VP, grid, prediction, clip, guidance_scale=2.5, method=method, **CHURN)


@pytest.mark.parametrize("method", METHODS)
def test_without_churn_it_is_the_deterministic_solver(method):
    path, grid = EDM(12.0), schedules.karras(5, 0.02, 12.0)
    model, x = Network(path, "x0"), 12 * np.random.default_rng(0).standard_normal((3, 5))
    plain = solvers.SOLVERS[method](path, grid, prediction="x0")
    churned = solvers.edm(path, grid, prediction="x0", method=method)
    np.testing.assert_allclose(
        run_table(churned, model.branches, x), run_table(plain, model.branches, x), rtol=1e-12, atol=1e-12
    )
    assert churned.init_scale == plain.init_scale == 12.0 and not churned.needs_noise


@pytest.mark.parametrize("method, order", [("heun", 2), ("euler", 1), ("dpm_2", 2)])
@pytest.mark.parametrize("path, prediction, t_max, t_min", SMOOTH)
def test_convergence_order(method, order, path, prediction, t_max, t_min):
    assert_convergence_order("edm", order, path, prediction, t_max, t_min, method=method)


def test_the_first_churn_is_in_the_start():
    path = EDM(20.0)
    grid = schedules.karras(4, 0.02, 10.0, path=path)
    gamma = 1.2 / 4
    for s_noise in (1.0, 1.1):
        table = solvers.edm(path, grid, prediction="x0", s_churn=1.2, s_noise=s_noise)
        assert table.init_scale == pytest.approx(10 * np.sqrt(1 + s_noise**2 * (2 * gamma + gamma**2)), rel=1e-12)
        assert path.sigma(table.t_model[0, 0]) == pytest.approx(10 * (1 + gamma), rel=1e-12)
    late = solvers.edm(path, grid, prediction="x0", s_churn=1.2, s_tmax=9.0)
    assert late.init_scale == pytest.approx(10.0, rel=1e-12) and late.t_model[0, 0] == grid[0]
    vp = solvers.edm(VP, schedules.uniform(4, 0.8), prediction="eps", s_churn=1.2)
    assert vp.init_scale == pytest.approx(1.0, rel=1e-12)  # there x_hat is as large as x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path, prediction, t_max", [(EDM(40.0), "x0", 0.5), (VP, "eps", 0.95)], ids=["EDM", "VP"])
def test_churn_keeps_mean_and_variance(method, path, prediction, t_max):
    errors = []
    for num_steps in (100, 200, 400):
        grid = t_max * schedules.uniform(num_steps) ** 3
        start = path.sigma(grid[0]) / path.alpha(grid[0])
        table = solvers.edm(path, grid, prediction=prediction, method=method, s_churn=8.0, s_tmax=0.9 * start)
        assert np.count_nonzero(table.column("s")) > num_steps / 2
        mean, variance = sampled_moments(table, path, prediction, t_max)
        errors.append((abs(mean - MEAN), abs(variance - STD**2)))
    errors = np.array(errors)
    assert np.all(errors[-1] < (0.005, 0.01)), errors
    assert np.all(errors[1:] < 0.6 * errors[:-1] + 1e-9), errors


def test_a_fresh_start_with_churn_has_the_variance_of_its_noise_level():
    path, grid = EDM(40.0), schedules.karras(200, 0.01, 20.0, path=EDM(40.0))
    table = solvers.edm(path, grid, prediction="x0", s_churn=20.0)
    hot = table.t_model[0, 0]
    mean, std = gaussian(path, hot)
    assert table.init_scale == pytest.approx(np.sqrt(std**2 - STD**2), rel=1e-12)
    mean, variance = sampled_moments(table, path, "x0", hot)
    assert (mean, variance) == pytest.approx((MEAN, STD**2), abs=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "rk4"}, "edm: method must be 'heun', 'euler' or 'dpm_2', got 'rk4'"),
        ({"s_churn": -1.0}, "edm: s_churn must be a finite number >= 0, got -1.0"),
        ({"s_churn": np.inf}, "edm: s_churn must be a finite number >= 0"),
        ({"s_noise": -0.1}, "edm: s_noise must be a finite number >= 0"),
        ({"s_tmin": np.nan}, "edm: s_tmin and s_tmax must be numbers"),
        ({"s_churn": 1.0}, "beyond t = 1; pass a smaller s_tmax, start the grid later"),
    ],
)
def test_bad_options_are_refused(options, message):
    for path in (EDM(5.0), VP):
        with pytest.raises(ValueError, match=message):
            solvers.edm(path, schedules.uniform(4), prediction="x0", **options)
    with pytest.raises(ValueError, match="edm: grid must start where alpha > 0"):
        solvers.edm(RF, schedules.uniform(4), prediction="velocity")
