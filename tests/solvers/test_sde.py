"""Euler-Maruyama against the papers' loops and the moments of Gaussian data."""

import numpy as np
import pytest
from solver_support import (
    ON_PATHS,
    PREDICTIONS,
    RF,
    VP,
    Network,
    assert_equals_loop,
    assert_reaches_the_moments,
    run_table,
)

from genengine import schedules, solvers
from genengine.paths import EDM, VE

W = {  # w(t) by hand: VP beta(t), VE d sigma^2/dt, RF 2 t/(1 - t)
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: t,
    "constant": lambda path, t: 1.0,
    "decreasing": lambda path, t: 0.25 * (np.cos(np.pi * (1 - t)) + 1) ** 2,
    "increasing-decreasing": lambda path, t: np.sin(np.pi * t) ** 2,
}
BETA = lambda t: VP.beta_min + t * (VP.beta_max - VP.beta_min)  # noqa: E731


def loop_euler_maruyama(model, path, grid, x, noise, diffusion="sigma", scale=1.0, last_step="mean"):
    """Ma 2024, reverse time: x - h (velocity - w/2 score) + sqrt(w h) z."""
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        h, (x0, eps, velocity) = t - t_next, model(x, t)
        w = scale * (diffusion(t) if callable(diffusion) else W[diffusion](path, t))
        score = -eps / path.sigma(t)
        last = k == len(grid) - 2
        if last and last_step == "tweedie":
            x = path.alpha(t_next) * x0 + path.sigma(t_next) * eps
        elif last and last_step == "euler":
            x = x - h * velocity
        else:
            x = x - h * (velocity - w / 2 * score)
            x = x + np.sqrt(w * h) * noise[k] if last_step == "noise" or not last else x
    return x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_textbook_for_every_prediction(prediction, clip):
    assert_equals_loop(loop_euler_maruyama, VP, schedules.uniform(6, 0.98), prediction, clip, 2.5)


@pytest.mark.parametrize("diffusion", [*W, lambda t: 0.3 + t], ids=[*W, "function"])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
def test_equals_textbook_on_every_path(path, grid, prediction, diffusion):
    assert_equals_loop(loop_euler_maruyama, path, grid, prediction, diffusion=diffusion, scale=0.7)


@pytest.mark.parametrize("last_step", ["mean", "noise", "euler", "tweedie"])
@pytest.mark.parametrize("clip", [None, 0.6])
def test_last_steps_equal_textbook(last_step, clip):
    assert_equals_loop(loop_euler_maruyama, RF, schedules.uniform(6), "velocity", clip, last_step=last_step)
    assert_equals_loop(loop_euler_maruyama, VP, schedules.uniform(6, 1.0, 0.1), "eps", clip, last_step=last_step)


@pytest.mark.parametrize(
    "path, w",
    [
        (VP, BETA),
        (VE(0.01, 10.0), lambda t: 2 * 1e-4 * np.log(1e3) * 1e3 ** (2 * t)),
        (RF, lambda t: 2 * t / (1 - t)),
        (EDM(10.0), lambda t: 200 * t),
    ],
    ids=["VP", "VE", "RF", "EDM"],
)
def test_sde_is_the_reverse_of_the_forward_sde(path, w):
    """Song 2021 (score SDE): dx = f x dt + g dW forward has the reverse drift f x - g^2 score."""
    rng, grid = np.random.default_rng(3), schedules.uniform(5, 0.9, 0.2)
    x, noise, model = rng.standard_normal((3, 5)), rng.standard_normal((5, 3, 5)), Network(path, "eps")
    table = solvers.euler_maruyama(path, grid, prediction="eps", diffusion="sde", last_step="noise")
    actual = run_table(table, model.branches, x, noise)
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        score = -model.branches(x, t)[0] / path.sigma(t)
        f = path.d_alpha(t) / path.alpha(t)
        x = x + (t_next - t) * (f * x - w(t) * score) + np.sqrt(w(t) * (t - t_next)) * noise[k]
    np.testing.assert_allclose(actual, x, rtol=1e-9, atol=1e-9 * np.abs(x).max())


@pytest.mark.parametrize(
    "path, prediction, warp, options",
    [
        (VP, "eps", 2, {"diffusion": "sde"}),
        (EDM(20.0), "x0", 3, {"diffusion": "sde"}),
        (RF, "velocity", 1, {}),
        (RF, "velocity", 1, {"diffusion": "linear", "scale": 2.0, "last_step": "noise"}),
        (RF, "velocity", 1, {"diffusion": "increasing-decreasing", "last_step": "euler"}),
        (RF, "velocity", 1, {"diffusion": "decreasing", "last_step": "tweedie"}),
    ],
)
def test_samples_reach_the_mean_and_variance(path, prediction, warp, options):
    assert_reaches_the_moments("euler_maruyama", path, prediction, warp, **options)


def test_without_diffusion_it_is_euler():
    for path, prediction in ((RF, "velocity"), (VP, "eps")):
        grid = schedules.uniform(4, 1.0, 0.1)
        table = solvers.euler_maruyama(path, grid, prediction=prediction, scale=0.0)
        np.testing.assert_allclose(table.rows, solvers.euler(path, grid, prediction=prediction).rows, rtol=1e-14)
        assert not table.needs_noise


@pytest.mark.parametrize(
    "options, message",
    [
        ({"diffusion": "sqrt"}, "diffusion must be 'sde', 'sigma', .* got 'sqrt'"),
        ({"last_step": "none"}, "last_step must be 'mean', 'noise', 'euler' or 'tweedie', got 'none'"),
        ({"scale": -1.0}, "scale must be a finite number >= 0, got -1.0"),
        ({"scale": np.inf}, "scale must be a finite number >= 0, got inf"),
        ({"diffusion": "sde"}, "diffusion 'sde' is infinite where alpha = 0, got t = 1.0; start the grid"),
        ({"diffusion": lambda t: -t}, "diffusion must be finite and >= 0, got -1.0 at t = 1.0"),
        ({"diffusion": lambda t: np.nan}, "diffusion must be finite and >= 0, got nan at t = 1.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"euler_maruyama: {message}"):
        solvers.euler_maruyama(RF, schedules.uniform(4), prediction="velocity", **options)
