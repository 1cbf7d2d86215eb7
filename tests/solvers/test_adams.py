"""Multistep solvers of the noise form against their textbook loops and the exact flow."""

import numpy as np
import pytest
from solver_support import (
    INSIDE,
    ON_PATHS,
    PREDICTIONS,
    RF,
    VP,
    Network,
    assert_convergence_order,
    assert_equals_loop,
    flow_errors,
    graded,
    run_table,
)

from genengine import schedules, solvers
from genengine.paths import EDM, ScaledLinear, ZeroTerminalSNR


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


def loop_deis(model, path, grid, x, noise, order=3, lower_order_final=False):
    """Zhang and Chen 2022: d(x/alpha) = eps d(r), eps a polynomial in log r; quadrature in r, not in log r."""
    points, weights = np.polynomial.legendre.leggauss(100)
    r = path.sigma(grid) / path.alpha(grid)
    x, eps = x / path.alpha(grid[0]), []
    for i, t in enumerate(grid[:-1]):
        eps.append(model(path.alpha(t) * x, t)[1])
        limit = min(order, len(grid) - 1 - i) if lower_order_final else order
        used = range(i, max(-1, i - limit), -1) if r[i + 1] > 0 else [i]
        at = r[i] + (points + 1) / 2 * (r[i + 1] - r[i])
        for j in used:
            basis = np.prod([np.log(at / r[k]) / np.log(r[j] / r[k]) for k in used if k != j], axis=0)
            x = x + (weights * basis).sum() / 2 * (r[i + 1] - r[i]) * eps[j]
    return path.alpha(grid[-1]) * x


def transfer(path, x, eps, t, t_next, x0=None):
    """Liu 2022 (PNDM), in the form of Song 2020 (DDIM); x0 is the network's own, for a start without signal."""
    if path.alpha(t) > 0:
        x0 = (x - path.sigma(t) * eps) / path.alpha(t)
    return path.alpha(t_next) * x0 + path.sigma(t_next) * eps


def loop_plms(model, path, grid, x, noise):  # Liu 2022 (PNDM), the pseudo improved Euler step first
    eps = []
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x0, e, _ = model(x, t)
        eps.insert(0, e)
        if i == 0:
            if path.sigma(t_next) > 0 and path.alpha(t) > 0:
                e = (e + model(transfer(path, x, e, t, t_next), t_next)[1]) / 2
        elif i == 1:
            e = (3 * eps[0] - eps[1]) / 2
        elif i == 2:
            e = (23 * eps[0] - 16 * eps[1] + 5 * eps[2]) / 12
        else:
            e = (55 * eps[0] - 59 * eps[1] + 37 * eps[2] - 9 * eps[3]) / 24
        x = transfer(path, x, e, t, t_next, x0)
    return x


def loop_ipndm(model, path, grid, x, noise, order=4):  # Zhang and Chen 2022 (DEIS), iPNDM
    eps = []
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x0, e, _ = model(x, t)
        eps = [e, *eps][:order]
        if len(eps) == 2:
            e = (3 * eps[0] - eps[1]) / 2
        elif len(eps) == 3:
            e = (23 * eps[0] - 16 * eps[1] + 5 * eps[2]) / 12
        elif len(eps) == 4:
            e = (55 * eps[0] - 59 * eps[1] + 37 * eps[2] - 9 * eps[3]) / 24
        x = transfer(path, x, e, t, t_next, x0)
    return x


LOOPS = [loop_lms, loop_deis, loop_plms, loop_ipndm]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loop", LOOPS)
def test_equals_textbook_for_every_prediction(loop, prediction):
    assert_equals_loop(loop, VP, schedules.uniform(6, 0.98, 0.0), prediction, guidance_scale=2.5)


@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
@pytest.mark.parametrize("loop", LOOPS)
def test_equals_textbook_on_every_path(loop, path, grid, prediction):
    assert_equals_loop(loop, path, grid, prediction)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_equals_textbook(order):
    assert_equals_loop(loop_lms, VP, schedules.uniform(9, 0.9), "eps", order=order)
    assert_equals_loop(loop_lms, EDM(5.0), schedules.karras(9, 0.02, 5.0), "x0", order=order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_orders_equal_textbook(order):
    assert_equals_loop(loop_deis, VP, schedules.uniform(9, 0.9), "eps", order=order)
    assert_equals_loop(loop_deis, EDM(5.0), schedules.karras(9, 0.02, 5.0), "x0", order=order, lower_order_final=True)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_orders_equal_textbook(order):
    assert_equals_loop(loop_ipndm, VP, schedules.uniform(9, 0.9), "eps", order=order)


@pytest.mark.parametrize("path, prediction", [(ZeroTerminalSNR(ScaledLinear()), "v"), (RF, "velocity")], ids=str)
def test_a_start_without_signal_is_a_step_of_ddim(path, prediction):
    grid = schedules.uniform(7)
    assert_equals_loop(loop_plms, path, grid, prediction)
    assert_equals_loop(loop_ipndm, path, grid, prediction)
    x, model = np.random.default_rng(1).standard_normal((3, 5)), Network(path, prediction)
    x0, eps, _ = model(x, 1.0)
    after = path.alpha(grid[1]) * x0 + path.sigma(grid[1]) * eps
    for name, loop in (("lms", loop_lms), ("deis", loop_deis)):  # their weights leave the infinite noise level out
        table = solvers.SOLVERS[name](path, grid, prediction=prediction)
        expected = loop(model, path, grid[1:], after, None)
        np.testing.assert_allclose(run_table(table, model.branches, x), expected, rtol=1e-10, atol=1e-10)


def test_relations():
    rows = lambda name, path, grid, **options: solvers.SOLVERS[name](path, grid, prediction="v", **options).rows  # noqa: E731
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)  # noqa: E731
    grid = schedules.uniform(7, 0.9, 0.1)
    for name in ("lms", "deis", "ipndm"):
        same(rows(name, VP, grid, order=1), rows("ddim", VP, grid))
    same(rows("ipndm", EDM(5.0), grid), rows("lms", EDM(5.0), grid))  # even steps in sigma: the classical weights
    assert solvers.plms(VP, schedules.uniform(1), prediction="eps").num_rows == 1
    assert solvers.plms(VP, grid[:2], prediction="eps").num_rows == 2


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
@pytest.mark.parametrize(
    "name, order, options",
    [*(("lms", k, {"order": k}) for k in (1, 2, 3, 4)), *(("deis", k, {"order": k}) for k in (1, 2, 3))],
)
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    case = (path, prediction, t_max, t_min, (80, 160, 320, 640))
    assert_convergence_order(name, order, *case, grid=graded, **options)


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
@pytest.mark.parametrize("name", ["plms", "ipndm"])
def test_even_weights_are_of_second_order_on_uneven_noise_levels(name, path, prediction, t_max, t_min):
    assert_convergence_order(name, 2, path, prediction, t_max, t_min)


def test_lms_order_4_beats_order_2():
    steps = (80,)
    assert (
        flow_errors("lms", VP, "eps", 0.9, 0.05, steps) < flow_errors("lms", VP, "eps", 0.9, 0.05, steps, order=2) / 20
    )


def test_registers_are_as_many_as_the_order_needs():
    for name, orders in (("lms", 4), ("ipndm", 4), ("deis", 3)):
        for order in range(1, orders + 1):
            table = solvers.SOLVERS[name](VP, schedules.uniform(6, 0.9, 0.1), prediction="eps", order=order)
            assert table.num_history == order - 1 and table.num_rows == 6
