"""Single-step solvers of the probability-flow ODE against their textbook loops and the exact flow."""

import numpy as np
import pytest
from solver_support import (
    INSIDE,
    ON_PATHS,
    PREDICTIONS,
    RF,
    SMOOTH,
    VP,
    assert_convergence_order,
    assert_equals_loop,
    flow_errors,
    run_table,
)

from genengine import schedules, solvers
from genengine.paths import EDM, Cosine


def loop_euler(model, path, grid, x, noise):
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x = x + (t_next - t) * model(x, t)[2]
    return x


def loop_heun(model, path, grid, x, noise):  # Karras 2022, Alg. 1, no churn
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        d = model(x, t)[2]
        x_next = x + (t_next - t) * d
        smooth = model.prediction == "velocity" and path == RF and not model.clip
        if path.sigma(t_next) > 0 or smooth:
            x_next = x + (t_next - t) * (d + model(x_next, t_next)[2]) / 2
        x = x_next
    return x


def loop_dpm_2(model, path, grid, x, noise):  # Lu 2022 (DPM-Solver), Alg. 1
    half_snr = lambda t: path.log_snr(t) / 2  # noqa: E731
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        if path.sigma(t_next) == 0:
            x = path.alpha(t_next) * model(x, t)[0]
            continue
        h = half_snr(t_next) - half_snr(t)
        s = path.t_of_log_snr(2 * (half_snr(t) + h / 2))
        u = path.alpha(s) / path.alpha(t) * x - path.sigma(s) * np.expm1(h / 2) * model(x, t)[1]
        x = path.alpha(t_next) / path.alpha(t) * x - path.sigma(t_next) * np.expm1(h) * model(u, s)[1]
    return x


def loop_midpoint(model, path, grid, x, noise):  # k2 = f(t + h/2, x + h/2 k1)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        h = t_next - t
        x = x + h * model(x + h / 2 * model(x, t)[2], t + h / 2)[2]
    return x


def loop_rk4(model, path, grid, x, noise):  # the classical tableau
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        smooth = model.prediction == "velocity" and path == RF and not model.clip
        if path.sigma(t_next) == 0 and not smooth:
            return loop_midpoint(model, path, (t, t_next), x, noise)
        h = t_next - t
        k1 = model(x, t)[2]
        k2 = model(x + h / 2 * k1, t + h / 2)[2]
        k3 = model(x + h / 2 * k2, t + h / 2)[2]
        k4 = model(x + h * k3, t_next)[2]
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loop", [loop_euler, loop_heun, loop_dpm_2, loop_midpoint, loop_rk4])
def test_equals_textbook_for_every_prediction(loop, prediction, clip):
    assert_equals_loop(loop, VP, schedules.uniform(6, 0.98, 0.0), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
@pytest.mark.parametrize("loop", [loop_euler, loop_heun, loop_dpm_2, loop_midpoint, loop_rk4])
def test_equals_textbook_on_every_path(loop, path, grid, prediction, clip):
    assert_equals_loop(loop, path, grid, prediction, clip)


@pytest.mark.parametrize("loop", [loop_euler, loop_heun, loop_midpoint, loop_rk4])
def test_equals_textbook_from_the_singular_end(loop):
    assert_equals_loop(loop, RF, schedules.uniform(5), "velocity")
    assert_equals_loop(loop, Cosine(), schedules.uniform(5), "v", clip=0.7)


@pytest.mark.parametrize("path, prediction, t_max, t_min", SMOOTH)
@pytest.mark.parametrize("name, order, options", [("euler", 1, {}), ("heun", 2, {}), ("dpm_2", 2, {})])
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    assert_convergence_order(name, order, path, prediction, t_max, t_min, **options)


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
def test_rk4_is_of_fourth_order(path, prediction, t_max, t_min):
    assert_convergence_order("rk4", 4, path, prediction, t_max, t_min, steps=(10, 20, 40, 80))


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE[1:])  # on RF, Gaussian data, it is of third order
def test_midpoint_is_of_second_order(path, prediction, t_max, t_min):
    assert_convergence_order("midpoint", 2, path, prediction, t_max, t_min)


def test_midpoint_and_rk4_over_the_whole_path():
    assert np.all(flow_errors("midpoint", RF, "velocity", 1.0, 0.0, (40, 80)) < (1e-5, 2e-6))
    assert np.all(flow_errors("rk4", RF, "velocity", 1.0, 0.0, (40, 80)) < (1e-7, 1e-8))


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2)])
def test_convergence_order_over_the_whole_path(name, order):
    errors = flow_errors(name, RF, "velocity", 1.0, 0.0, (40, 80, 160))
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.06)


def test_velocity_rows_are_exact():
    table = solvers.euler(RF, schedules.uniform(5), prediction="velocity")
    np.testing.assert_array_equal(table.column("a"), 1.0)
    np.testing.assert_array_equal(table.column("b")[:, 0], np.diff(schedules.uniform(5)))
    np.testing.assert_array_equal(table.t_model[:, 0], schedules.uniform(5)[:-1])


def test_heun_evaluates_the_data_end_only_where_it_is_regular():
    grid = schedules.uniform(3)
    assert solvers.heun(RF, grid, prediction="velocity").t_model[-1] == 0.0
    assert solvers.heun(RF, grid, prediction="velocity", clip=1.0).num_rows == 5
    assert solvers.heun(VP, grid, prediction="velocity").num_rows == 5
    assert solvers.heun(EDM(), grid, prediction="x0").num_rows == 5
    assert solvers.heun(VP, schedules.uniform(3, 1.0, 0.01), prediction="eps").num_rows == 6


def test_rk4_ends_with_a_midpoint_step_where_the_end_is_singular():
    assert solvers.rk4(RF, schedules.uniform(3), prediction="velocity").num_rows == 12
    for path, prediction in ((RF, "x0"), (VP, "velocity"), (EDM(), "x0")):
        table = solvers.rk4(path, schedules.uniform(3), prediction=prediction)
        assert table.num_rows == 10 and table.t_model[-1] == pytest.approx(1 / 6)


def test_model_time_and_input_scale():
    path, sigma_data = EDM(10.0), 0.5
    scale = lambda t: 1 / np.hypot(sigma_data, path.sigma(t))  # noqa: E731
    grid = schedules.karras(4, 0.1, 10.0)
    table = solvers.heun(path, grid, prediction="x0", model_time=lambda t: np.log(10 * t) / 4, input_scale=scale)
    times = np.array([grid[0], grid[1], grid[1], grid[2], grid[2], grid[3], grid[3]])
    np.testing.assert_allclose(table.t_model[:, 0], np.log(10 * times) / 4, rtol=1e-14)
    np.testing.assert_allclose(table.first_c_in, scale(grid[0]), rtol=1e-14)
    np.testing.assert_allclose(table.column("c_in")[:, 0], [*scale(times[1:]), 1.0], rtol=1e-14)
    assert table.init_scale == 10.0
    x = np.array([1.0, -2.0])
    seen = []
    run_table(table, lambda x_in, t: [seen.append(x_in) or np.tanh(x_in)], x)
    np.testing.assert_allclose(seen[0], x * scale(1.0), rtol=1e-14)
