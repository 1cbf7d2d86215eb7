"""UniPC against the paper's separate predictor and corrector, and the exact flow."""

import numpy as np
import pytest
from solver_support import INSIDE, ON_PATHS, PREDICTIONS, RF, VP, assert_convergence_order, assert_equals_loop, graded

from genengine import schedules, solvers


def rho(r, hh, form):
    """Zhao 2023, the weights a_p (or c_p) of D_1.. for the nodes r; one node alone has 1/2."""
    if len(r) == 1:
        return np.array([0.5])
    b, phi, factorial = [], np.expm1(hh) / hh - 1, 1
    for k in range(1, len(r) + 1):
        b.append(phi * factorial / (hh if form == "bh1" else np.expm1(hh)))
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return np.linalg.solve(np.array([np.asarray(r) ** k for k in range(len(r))]), b)


def loop_unipc(model, path, grid, x, noise, order=2, form="bh2", lower_order_final=True):
    """Zhao 2023, Alg. 2 and 1 in data prediction; the state before every step is kept for the corrector."""
    lam, m, last = path.log_snr(grid) / 2, [], None
    num_steps = len(grid) - 1
    for i, t in enumerate(grid[:-1]):
        m.append(model(x, t)[0])
        if last is not None:  # correct the step that led here, from its own start
            base, big, nodes, d, hh = last
            d, nodes = [*d, m[i] - m[i - 1]], [*nodes, 1.0]
            x = base - big * sum(w * v for w, v in zip(rho(nodes, hh, form), d, strict=True))
        p = min(order, i + 1, num_steps - i if lower_order_final else order)
        alpha, ratio = path.alpha(grid[i + 1]), path.sigma(grid[i + 1]) / path.sigma(t)
        if path.sigma(grid[i + 1]) == 0:
            return alpha * m[i]
        h = lam[i + 1] - lam[i]
        nodes = [(lam[i - k] - lam[i]) / h for k in range(1, p)]
        d = [(m[i - k] - m[i]) / r for k, r in enumerate(nodes, 1)]
        base = ratio * x - alpha * np.expm1(-h) * m[i]
        big = alpha * (-h if form == "bh1" else np.expm1(-h))
        last = base, big, nodes, d, -h
        x = base - big * sum(w * v for w, v in zip(rho(nodes, -h, form), d, strict=True)) if d else base
    return x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_textbook_for_every_prediction(prediction, clip):
    assert_equals_loop(loop_unipc, VP, schedules.uniform(6, 0.98, 0.0), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("form", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_equals_textbook_on_every_path(path, grid, prediction, order, form):
    for clip in (None, 0.6):
        assert_equals_loop(loop_unipc, path, grid, prediction, clip, order=order, form=form)
        assert_equals_loop(loop_unipc, path, grid, prediction, clip, order=order, form=form, lower_order_final=False)


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_adds_an_order(order, path, prediction, t_max, t_min):
    case = (path, prediction, t_max, t_min, (80, 160, 320, 640))
    options = {"order": order, "lower_order_final": False, "grid": graded}
    assert_convergence_order("unipc", order + 1, *case, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_one_row_per_evaluation(order):
    table = solvers.unipc(VP, schedules.uniform(6, 0.9, 0.1), prediction="eps", order=order)
    assert table.num_rows == 6 and table.num_history == order


def test_a_start_without_signal_is_of_first_order():
    table = solvers.unipc(RF, schedules.uniform(4), prediction="velocity", order=3)
    np.testing.assert_allclose(table.rows[0, 0, [6, 7]], [1.0, -0.25], rtol=1e-12)  # alpha' x0 + (sigma'/sigma) x
    assert table.column("h1")[1] == 0 and table.num_history == 2
