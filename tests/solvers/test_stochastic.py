"""Ancestral and SDE solvers of higher order against textbook loops and the closed form of Gaussian data.

The loops work on u = x/alpha at noise level r = sigma/alpha, with exponential integrators in lambda = -log r.
"""

import numpy as np
import pytest
from solver_support import (
    EDM,
    INSIDE,
    ON_PATHS,
    PREDICTIONS,
    RF,
    SMOOTH,
    VP,
    assert_convergence_order,
    assert_equals_loop,
    assert_reaches_the_moments,
    flow_errors,
)

from genengine import schedules, solvers

NAMES = ("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "dpm_fast")
ETAS = [None, 0.0, 0.4, 1.6]


class Textbook:
    """The model on u at noise level r, and the levels of the grid."""

    def __init__(self, model, path, grid):
        self.model, self.path, self.last = model, path, grid[-1]
        self.levels = path.sigma(grid) / path.alpha(grid)

    def outputs(self, u, r):
        """(x0, eps)."""
        t = min(float(self.path.t_of_log_snr(-2 * np.log(r))), 1.0)  # the first may round to beyond the end
        return self.model(self.path.alpha(t) * u, t)[:2]


def split(r, r_next, eta):
    up = min(r_next, eta * np.sqrt(r_next**2 * (r**2 - r_next**2) / r**2))
    return np.sqrt(r_next**2 - up**2), up


def ancestral(model, path, grid, x, noise, eta, second_stage):
    book, row = Textbook(model, path, grid), 0
    u = x / path.alpha(grid[0])
    for r, r_next in zip(book.levels[:-1], book.levels[1:], strict=True):
        down, up = split(r, r_next, eta)
        x0, eps = book.outputs(u, r)
        if down == 0:
            u = x0
        else:
            middle = np.exp(0.5 * (np.log(r) + np.log(down)))
            u = second_stage(u, r, down, *book.outputs(x0 + middle * eps, middle))
            row += 1
        u = u + up * noise[row]
        row += 1
    return path.alpha(grid[-1]) * u


def loop_dpm_2_ancestral(model, path, grid, x, noise, eta=1.0):
    """DPM-Solver-2 with eps of the middle, ancestral noise."""
    h = lambda r, down: np.log(r / down)  # noqa: E731
    stage = lambda u, r, down, x0, eps: u - down * np.expm1(h(r, down)) * eps  # noqa: E731
    return ancestral(model, path, grid, x, noise, eta, stage)


def loop_dpmpp_2s_ancestral(model, path, grid, x, noise, eta=1.0):
    """Lu 2022 (DPM-Solver++), Alg. 1 with r = 1/2, ancestral noise."""
    h = lambda r, down: np.log(r / down)  # noqa: E731
    stage = lambda u, r, down, x0, eps: np.exp(-h(r, down)) * u - np.expm1(-h(r, down)) * x0  # noqa: E731
    return ancestral(model, path, grid, x, noise, eta, stage)


def loop_dpmpp_sde(model, path, grid, x, noise, eta=1.0, r=0.5):
    """Two ancestral first-order steps from u; the second with x0 extrapolated through the middle."""
    book, row = Textbook(model, path, grid), 0
    u = x / path.alpha(grid[0])
    for now, end in zip(book.levels[:-1], book.levels[1:], strict=True):
        x0, _ = book.outputs(u, now)
        if end == 0:
            u = x0
            continue
        middle = np.exp(np.log(now) + r * (np.log(end) - np.log(now)))
        down, up = split(now, middle, eta)
        first = down / now * u + (1 - down / now) * x0 + up * noise[row]
        second, _ = book.outputs(first, middle)
        x0 = x0 + (second - x0) / (2 * r)
        down, up = split(now, end, eta)
        u = down / now * u + (1 - down / now) * x0 + up * noise[row + 1]
        row += 2
    return path.alpha(grid[-1]) * u


def exponential(model, path, grid, x, noise, eta, order):
    """x0 as the interpolating polynomial in lambda, integrated against (1 + eta) e^{(1 + eta) s} by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    book, seen = Textbook(model, path, grid), []
    u = x / path.alpha(grid[0])
    for k, (r, r_next) in enumerate(zip(book.levels[:-1], book.levels[1:], strict=True)):
        x0, _ = book.outputs(u, r)
        if r_next == 0:
            u = x0
            continue
        now, h = -np.log(r), np.log(r / r_next)
        seen = [(now, x0), *seen][:order]
        s = h * (nodes + 1) / 2  # lambda - now
        kernel = (1 + eta) * np.exp((1 + eta) * (s - h)) * weights * h / 2
        u = np.exp(-(1 + eta) * h) * u
        for j, (at, value) in enumerate(seen):
            others = [other for k, (other, _) in enumerate(seen) if k != j]
            u = u + value * np.sum(kernel * np.prod([(now + s - other) / (at - other) for other in others], axis=0))
        u = u + r_next * np.sqrt(1 - np.exp(-2 * eta * h)) * noise[k]
    return path.alpha(grid[-1]) * u


def loop_dpmpp_3m_sde(model, path, grid, x, noise, eta=1.0):
    """The published form: the integral of the quadratic has 2 phi_3."""
    book, seen = Textbook(model, path, grid), []
    u = x / path.alpha(grid[0])
    for k, (r, r_next) in enumerate(zip(book.levels[:-1], book.levels[1:], strict=True)):
        x0, _ = book.outputs(u, r)
        if r_next == 0:
            u = x0
            continue
        h = np.log(r / r_next)
        total = (1 + eta) * h
        u = np.exp(-total) * u - np.expm1(-total) * x0
        phi_2 = np.expm1(-total) / total + 1
        if len(seen) == 2:
            (h_1, x1), (h_2, x2) = seen
            slope, slope_before = (x0 - x1) * h / h_1, (x1 - x2) * h / h_2
            bend = (slope - slope_before) / ((h_1 + h_2) / h)
            u = u + phi_2 * (slope + bend * h_1 / h) - (phi_2 / total - 0.5) * bend
        elif seen:
            u = u + phi_2 * (x0 - seen[0][1]) * h / seen[0][0]
        u = u + r_next * np.sqrt(1 - np.exp(-2 * eta * h)) * noise[k]
        seen = [(h, x0), *seen][:2]
    return path.alpha(grid[-1]) * u


def loop_dpm_fast(model, path, grid, x, noise, orders=None, eta=0.0):
    """Lu 2022 (DPM-Solver), Algs. 1 and 2, in lambda; ancestral noise that stops at the end of the grid."""
    book, row = Textbook(model, path, grid), 0
    count = len(grid) - 1
    orders = orders or ([1] if count == 1 else [3] * (count - 2) + [2, 1])
    u = x / path.alpha(grid[0])
    eps_at = lambda u, lam: book.outputs(u, np.exp(-lam))[1]  # noqa: E731
    for r, r_next, order in zip(book.levels[:-1], book.levels[1:], orders, strict=True):
        down = max(split(r, r_next, eta)[0], book.levels[-1])
        if down == 0:
            u, row = book.outputs(u, r)[0] + r_next * noise[row], row + 1
            continue
        lam, h = -np.log(r), np.log(r / down)
        eps = eps_at(u, lam)
        if order == 1:
            u = u - down * np.expm1(h) * eps
        elif order == 2:
            half = eps_at(u - np.exp(-lam - h / 2) * np.expm1(h / 2) * eps, lam + h / 2)
            u = u - down * np.expm1(h) * half
        else:
            a, b = h / 3, 2 * h / 3
            d_1 = eps_at(u - np.exp(-lam - a) * np.expm1(a) * eps, lam + a) - eps
            u_2 = u - np.exp(-lam - b) * (np.expm1(b) * eps + 2 * (np.expm1(b) / b - 1) * d_1)
            d_2 = eps_at(u_2, lam + b) - eps
            u = u - down * (np.expm1(h) * eps + 1.5 * (np.expm1(h) / h - 1) * d_2)
        row += order
        u = u + np.sqrt(max(r_next**2 - down**2, 0)) * noise[row - 1]
    return path.alpha(grid[-1]) * u


LOOPS = {name: globals()[f"loop_{name}"] for name in NAMES}


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_equals_textbook_on_every_path(name, path, grid, prediction, eta):
    if eta == 1.6 and name in ("dpm_2_ancestral", "dpmpp_2s_ancestral"):
        eta = 1.2  # all noise fresh in some steps, not in all
    options = {} if eta is None else {"eta": eta}
    if path.sigma(grid[-1]) > 0 and name != "dpm_fast" and path.t_of_log_snr(np.inf) < 0:
        grid = grid * 0.7 + 0.3  # VE ends above 0: middles of ancestral steps lie below the last level
    for clip in (None, 0.6):
        assert_equals_loop(LOOPS[name], path, grid, prediction, clip, **options)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_textbook_for_every_prediction(name, prediction, clip):
    assert_equals_loop(LOOPS[name], VP, schedules.uniform(6, 0.98), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("r", [0.2, 0.7, 1.0])
def test_dpmpp_sde_with_its_second_evaluation_elsewhere(r):
    assert_equals_loop(loop_dpmpp_sde, VP, schedules.uniform(6, 0.95), "eps", r=r)


@pytest.mark.parametrize("orders", [[1, 1, 1, 1], [2, 3, 1, 2], [3, 3, 3, 3], None])
@pytest.mark.parametrize("t_min", [0.1, 0.0])
def test_dpm_fast_orders(orders, t_min):
    for eta in (0.0, 0.8):
        options = {"eta": eta} if orders is None else {"eta": eta, "orders": orders}
        assert_equals_loop(loop_dpm_fast, VP, schedules.uniform(4, 0.9, t_min), "eps", **options)
    table = solvers.dpm_fast(VP, schedules.uniform(4, 0.9, t_min), prediction="eps", **options)
    expected = sum(orders or [3, 3, 2, 1])
    assert table.num_rows == expected - ((orders or [1])[-1] - 1) * (t_min == 0)  # a step to 0 is one row


def test_dpmpp_3m_sde_is_exact_for_a_linear_x0():
    """Where x0 is linear in lambda the third difference vanishes, and the textbook integral is met exactly."""
    path, grid = EDM(5.0), schedules.karras(6, 0.1, 5.0)[:-1]

    class Linear:
        prediction, clip = "x0", None

        def __call__(self, x, t):
            x0 = 0.3 - 0.2 * np.log(path.sigma(t)) + 0 * x
            return x0, (x - x0) / path.sigma(t), None

    x, noise = np.random.default_rng(0).standard_normal((2, 6, 4))
    for eta in (0.0, 1.0):
        arguments = (Linear(), path, grid, 5 * x, noise, eta)
        first = exponential(*arguments, 2)
        np.testing.assert_allclose(loop_dpmpp_3m_sde(*arguments), first, rtol=1e-12)


@pytest.mark.parametrize(
    "name, order, options",
    [
        ("dpm_2_ancestral", 2, {"eta": 0.0}),
        ("dpmpp_2s_ancestral", 2, {"eta": 0.0}),
        ("dpmpp_sde", 2, {"eta": 0.0}),
        ("dpmpp_sde", 2, {"eta": 0.0, "r": 0.3}),
    ],
)
@pytest.mark.parametrize("path, prediction, t_max, t_min", SMOOTH)
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    assert_convergence_order(name, order, path, prediction, t_max, t_min, **options)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
def test_dpm_fast_converges_with_the_order_of_its_steps(order, path, prediction, t_max, t_min):
    steps = (10, 20, 40, 80)
    errors = [flow_errors("dpm_fast", path, prediction, t_max, t_min, (n,), orders=[order] * n)[0] for n in steps]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert abs(slopes[-1] - order) < 0.1 and abs(slopes[-1] - order) < 0.65 * abs(slopes[0] - order) + 0.01, slopes


@pytest.mark.parametrize(
    "name, options", [(n, {}) for n in NAMES if n != "dpm_fast"] + [(n, {"eta": 0.5}) for n in NAMES]
)
@pytest.mark.parametrize("path, prediction, warp", [(VP, "eps", 2), (EDM(20.0), "x0", 3)], ids=["VP", "EDM"])
def test_samples_reach_the_mean_and_variance(name, options, path, prediction, warp):
    assert_reaches_the_moments(name, path, prediction, warp, **options)


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_are_refused(name):
    for eta in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{name}: eta must be a finite number >= 0, got {eta}"):
            solvers.SOLVERS[name](VP, schedules.uniform(4), prediction="eps", eta=eta)


def test_bad_nodes_and_orders_are_refused():
    for r in (0.0, 1.1, np.nan):
        with pytest.raises(ValueError, match=rf"dpmpp_sde: r must be in \(0, 1\], got {r}"):
            solvers.dpmpp_sde(VP, schedules.uniform(4), prediction="eps", r=r)
    for orders in ([3, 3, 2], [4, 3, 2, 1], [3, 3, 2, 0]):
        with pytest.raises(ValueError, match="dpm_fast: orders must hold 1, 2 or 3 for each of 4 steps"):
            solvers.dpm_fast(VP, schedules.uniform(4), prediction="eps", orders=orders)


@pytest.mark.parametrize("name", [n for n in NAMES if "m_sde" not in n])
def test_a_start_without_signal_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: grid must start where alpha > 0"):
        solvers.SOLVERS[name](RF, schedules.uniform(4), prediction="velocity")


def test_a_step_from_pure_noise_leaves_no_history():
    """There lambda is -inf: the next step begins anew, at first order."""
    table = solvers.dpmpp_3m_sde(RF, schedules.uniform(5), prediction="velocity")
    assert np.all(table.column("h1")[:2] == 0) and np.any(table.column("h1")[2:] != 0)
