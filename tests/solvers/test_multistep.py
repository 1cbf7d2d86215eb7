"""DPM-Solver++ multistep against their textbook loops, the exact flow and the moments of Gaussian data."""

import numpy as np
import pytest
from solver_support import (
    INSIDE,
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
    graded,
)

from genengine import schedules, solvers
from genengine.paths import EDM
from genengine.table import unpack_flags


def loop_dpmpp_2m(model, path, grid, x, noise, form="midpoint"):  # Lu 2022 (DPM-Solver++), Alg. 2
    previous = h_previous = None
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x0 = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * x0
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        x = path.sigma(t_next) / path.sigma(t) * x - path.alpha(t_next) * np.expm1(-h) * x0
        if previous is not None:
            slope = (x0 - previous) / h_previous  # d x0 / d lambda
            if form == "midpoint":
                x = x - path.alpha(t_next) * np.expm1(-h) * slope * h / 2
            else:  # the integral of exp(lambda - lambda') (lambda - lambda_t) slope
                x = x + path.alpha(t_next) * (h + np.expm1(-h)) * slope
        previous, h_previous = x0, h
    return x


def loop_dpmpp_2m_sde(model, path, grid, x, noise, eta=1.0, form="midpoint"):  # Lu 2022 (DPM-Solver++)
    previous = h_previous = None
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x0 = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * x0
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        gain = path.alpha(t_next) * -np.expm1(-(1 + eta) * h)
        x = path.sigma(t_next) / path.sigma(t) * np.exp(-eta * h) * x + gain * x0
        if previous is not None:
            weight = 0.5 * gain if form == "midpoint" else path.alpha(t_next) - gain / (h + eta * h)
            x = x + weight * (x0 - previous) * h / h_previous
        x = x + path.sigma(t_next) * np.sqrt(-np.expm1(-2 * eta * h)) * noise[k]
        previous, h_previous = x0, h
    return x


def loop_dpmpp_3m(model, path, grid, x, noise, form="published", lower_order_final=False):
    """Lu 2022 (DPM-Solver++), multistep; "exact": a parabola through the last three x0, integrated numerically."""
    lam, denoised = path.log_snr(grid) / 2, []
    points, weights = np.polynomial.legendre.leggauss(30)
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        denoised.append(model(x, t)[0])
        order = min(3, i + 1, len(grid) - 1 - i if lower_order_final else 3)
        alpha, ratio, x0 = path.alpha(t_next), path.sigma(t_next) / path.sigma(t), denoised[-1]
        if path.sigma(t_next) == 0:
            return alpha * x0
        h = lam[i + 1] - lam[i]
        x = ratio * x - alpha * np.expm1(-h) * x0
        if order == 1:
            continue
        r0 = (lam[i] - lam[i - 1]) / h
        d0 = (x0 - denoised[-2]) / r0
        if order == 2:
            x = x - alpha * np.expm1(-h) * d0 / 2
            continue
        if form == "published":
            r1 = (lam[i - 1] - lam[i - 2]) / h
            d1 = (denoised[-2] - denoised[-3]) / r1
            first, second = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
            x = x + alpha * (np.expm1(-h) / h + 1) * first - alpha * ((np.expm1(-h) + h) / h**2 - 0.5) * second
        else:
            at = lam[i] + (points + 1) / 2 * h
            for j in range(3):
                others = [lam[i - k] for k in range(3) if k != j]
                basis = np.prod([(at - node) / (lam[i - j] - node) for node in others], axis=0)
                integral = (weights * (basis - (j == 0)) * np.exp(at - lam[i + 1])).sum() * h / 2
                x = x + alpha * integral * denoised[-1 - j]
    return x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loop", [loop_dpmpp_2m, loop_dpmpp_2m_sde, loop_dpmpp_3m])
def test_equals_textbook_for_every_prediction(loop, prediction, clip):
    assert_equals_loop(loop, VP, schedules.uniform(6, 0.98, 0.0), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
@pytest.mark.parametrize("loop", [loop_dpmpp_2m, loop_dpmpp_2m_sde, loop_dpmpp_3m])
def test_equals_textbook_on_every_path(loop, path, grid, prediction, clip):
    assert_equals_loop(loop, path, grid, prediction, clip)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.6])
def test_dpmpp_2m_sde_with_eta_equals_textbook(eta):
    assert_equals_loop(loop_dpmpp_2m_sde, VP, schedules.uniform(6, 0.95), "eps", eta=eta)
    assert_equals_loop(loop_dpmpp_2m_sde, EDM(5.0), schedules.karras(6, 0.02, 5.0), "x0", eta=eta)


@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_forms_equal_textbook(path, grid, prediction):
    for clip in (None, 0.6):
        assert_equals_loop(loop_dpmpp_2m, path, grid, prediction, clip, form="heun")
        assert_equals_loop(loop_dpmpp_2m_sde, path, grid, prediction, clip, form="heun", eta=0.7)
        assert_equals_loop(loop_dpmpp_3m, path, grid, prediction, clip, form="exact")
        assert_equals_loop(loop_dpmpp_3m, path, grid, prediction, clip, lower_order_final=True)


@pytest.mark.parametrize("path, prediction, t_max, t_min", SMOOTH)
@pytest.mark.parametrize("name, order, options", [("dpmpp_2m", 2, {}), ("dpmpp_2m", 2, {"form": "heun"})])
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    assert_convergence_order(name, order, path, prediction, t_max, t_min, **options)


@pytest.mark.parametrize("path, prediction, t_max, t_min", INSIDE)
def test_exact_dpmpp_3m_is_of_third_order_and_the_published_one_of_second(path, prediction, t_max, t_min):
    case = (path, prediction, t_max, t_min)
    assert_convergence_order("dpmpp_3m", 3, *case, (80, 160, 320, 640), form="exact", grid=graded)
    published = flow_errors("dpmpp_3m", *case, (320, 640, 1280), grid=graded)
    np.testing.assert_allclose(np.log2(published[:-1] / published[1:])[-1], 2, atol=0.1)


@pytest.mark.parametrize("path, prediction, warp", WHOLE)
@pytest.mark.parametrize(
    "name, options", [("dpmpp_2m_sde", {}), ("dpmpp_2m_sde", {"eta": 0.5}), ("dpmpp_2m_sde", {"form": "heun"})]
)
def test_samples_reach_the_mean_and_variance(name, options, path, prediction, warp):
    assert_reaches_the_moments(name, path, prediction, warp, **options)


def test_registers_that_nobody_reads_are_not_written():
    # from alpha = 0 the second step is first order too, and so is the last one, to sigma = 0
    table = solvers.dpmpp_2m(RF, schedules.uniform(5), prediction="velocity")
    assert [unpack_flags(flags)[1][0] for flags in table.column("flags")[:, 0]] == [0, 1, 1, 0, 0]
