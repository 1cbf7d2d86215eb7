"""DPM-Solver++ singlestep against its textbook loops and the exact flow."""

import numpy as np
import pytest
from solver_support import INSIDE, ON_PATHS, PREDICTIONS, VP, assert_convergence_order, assert_equals_loop

from genengine import schedules, solvers


def loop_dpmpp_singlestep(model, path, grid, x, noise, order=2):  # Lu 2022 (DPM-Solver++ Alg. 1, DPM-Solver Alg. 2)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        m = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * m
        start = path.log_snr(t) / 2
        h = path.log_snr(t_next) / 2 - start
        decay = lambda s: path.sigma(s) / path.sigma(t)  # noqa: B023, E731
        at = lambda r: path.t_of_log_snr(2 * (start + r * h))  # noqa: B023, E731
        if order == 2:
            r1 = 0.5
            s = at(r1)
            u = decay(s) * x - path.alpha(s) * np.expm1(-r1 * h) * m
            d = (1 - 1 / (2 * r1)) * m + 1 / (2 * r1) * model(u, s)[0]
            x = decay(t_next) * x - path.alpha(t_next) * np.expm1(-h) * d
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = at(r1), at(r2)
            u1 = decay(s1) * x - path.alpha(s1) * np.expm1(-r1 * h) * m
            d1 = model(u1, s1)[0] - m
            phi = np.expm1(-r2 * h) / (r2 * h) + 1
            u2 = decay(s2) * x - path.alpha(s2) * np.expm1(-r2 * h) * m + r2 / r1 * path.alpha(s2) * phi * d1
            d2 = model(u2, s2)[0] - m
            phi = np.expm1(-h) / h + 1
            x = decay(t_next) * x - path.alpha(t_next) * np.expm1(-h) * m + path.alpha(t_next) / r2 * phi * d2
    return x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [2, 3])
def test_equals_textbook_for_every_prediction(order, prediction, clip):
    assert_equals_loop(loop_dpmpp_singlestep, VP, schedules.uniform(4, 0.98, 0.0), prediction, clip, 2.5, order=order)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
@pytest.mark.parametrize("order", [2, 3])
def test_equals_textbook_on_every_path(order, path, grid, prediction, clip):
    assert_equals_loop(loop_dpmpp_singlestep, path, grid, prediction, clip, order=order)


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
@pytest.mark.parametrize("order", [2, 3])
def test_convergence_order(order, path, prediction, t_max, t_min):
    assert_convergence_order("dpmpp_singlestep", order, path, prediction, t_max, t_min, order=order)


@pytest.mark.parametrize("order", [2, 3])
def test_rows_and_registers(order):
    table = solvers.dpmpp_singlestep(VP, schedules.uniform(4), prediction="eps", order=order)
    assert table.num_rows == 3 * order + 1 and table.num_history == order - 1
