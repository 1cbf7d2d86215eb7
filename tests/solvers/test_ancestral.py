"""Single-step solvers with fresh noise against their textbook loops and the moments of Gaussian data."""

import numpy as np
import pytest
from solver_support import (
    ON_PATHS,
    PREDICTIONS,
    SMOOTH,
    VP,
    WHOLE,
    Network,
    assert_convergence_order,
    assert_equals_loop,
    assert_reaches_the_moments,
    run_table,
)

from genengine import schedules, solvers
from genengine.paths import EDM, DDPMLinear


def loop_ddim(model, path, grid, x, noise, eta=0.0, eps="x0"):
    """Song 2020 (DDIM), eqs. 12 and 16, for alpha^2 + sigma^2 = 1."""
    unclipped = Network(path, model.prediction, None, model.guidance_scale)
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        bar, bar_next = path.alpha(t) ** 2, path.alpha(t_next) ** 2
        s = eta * np.sqrt((1 - bar_next) / (1 - bar)) * np.sqrt(1 - bar / bar_next)
        x0, direction, _ = model(x, t)
        if eps == "model":
            direction = unclipped(x, t)[1]
        x = np.sqrt(bar_next) * x0 + np.sqrt(max(1 - bar_next - s**2, 0)) * direction + s * noise[k]
    return x


def loop_ddpm(model, path, grid, x, noise, variance="small"):  # Ho 2020, eq. 7 and Alg. 2, over all training steps
    beta = path.betas
    bar = np.cumprod(1 - beta)
    for k, n in enumerate(reversed(range(len(beta)))):
        x0, _, _ = model(x, (n + 1) / len(beta))
        before = bar[n - 1] if n > 0 else 1.0
        x = np.sqrt(before) * beta[n] / (1 - bar[n]) * x0 + np.sqrt(1 - beta[n]) * (1 - before) / (1 - bar[n]) * x
        if n > 0:
            x = x + np.sqrt(beta[n] * ((1 - before) / (1 - bar[n]) if variance == "small" else 1)) * noise[k]
    return x


def loop_euler_ancestral(model, path, grid, x, noise, eta=1.0):  # in sigma, on x / alpha
    x = x / path.alpha(grid[0])
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        sigma, sigma_next = path.sigma(t) / path.alpha(t), path.sigma(t_next) / path.alpha(t_next)
        denoised = model(path.alpha(t) * x, t)[0]
        up = min(sigma_next, eta * np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = np.sqrt(sigma_next**2 - up**2)
        x = x + (x - denoised) / sigma * (down - sigma) + up * noise[k]
    return path.alpha(grid[-1]) * x


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loop", [loop_ddim, loop_euler_ancestral])
def test_equals_textbook_for_every_prediction(loop, prediction, clip):
    assert_equals_loop(loop, VP, schedules.uniform(6, 0.98, 0.0), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("path, grid, prediction", ON_PATHS)
@pytest.mark.parametrize("loop", [loop_euler_ancestral])
def test_equals_textbook_on_every_path(loop, path, grid, prediction, clip):
    assert_equals_loop(loop, path, grid, prediction, clip)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [None, 0.6])
def test_ddim_with_eta_equals_textbook(eta, clip):
    assert_equals_loop(loop_ddim, VP, schedules.uniform(6), "eps", clip, 1.7, eta=eta)
    assert_equals_loop(loop_ddim, VP, schedules.uniform(6), "v", clip, 1.7, eta=eta, eps="model")


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.6])
def test_euler_ancestral_with_eta_equals_textbook(eta):
    assert_equals_loop(loop_euler_ancestral, VP, schedules.uniform(6, 0.95), "eps", eta=eta)
    assert_equals_loop(loop_euler_ancestral, EDM(5.0), schedules.karras(6, 0.02, 5.0), "x0", eta=eta)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddpm_equals_textbook(prediction, clip, variance):
    path = DDPMLinear(0.01, 0.4, 12)
    assert_equals_loop(loop_ddpm, path, schedules.uniform(12), prediction, clip, 3.0, variance=variance)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("guided", [False, True])
def test_ddpm_with_a_learned_range_equals_textbook(guided, clip):
    """Nichol and Dhariwal 2021, eq. 15: variance beta^v beta_tilde^(1 - v), v = (network + 1)/2, over all steps."""
    path, rng = DDPMLinear(0.01, 0.4, 12), np.random.default_rng(5)
    x, noise, weights = rng.standard_normal((3, 5)), rng.standard_normal((12, 3, 5)), rng.standard_normal((2, 5, 10))

    def branches(x, t):
        return [np.tanh(x @ weight / 2 + t) for weight in weights[: 1 + guided]]

    table = solvers.ddpm(
        path, schedules.uniform(12), prediction="eps", variance="learned_range", clip=clip,
        guidance_scale=2.5 if guided else 1.0,
    )  # fmt: skip
    actual = run_table(table, branches, x, noise)
    beta = path.betas
    bar = np.cumprod(1 - beta)
    for k, n in enumerate(reversed(range(12))):
        out = branches(x, (n + 1) / 12)
        eps = out[0][:, :5] if not guided else out[0][:, :5] + 2.5 * (out[1][:, :5] - out[0][:, :5])
        x0 = (x - np.sqrt(1 - bar[n]) * eps) / np.sqrt(bar[n])
        x0 = np.clip(x0, -clip, clip) if clip else x0
        before = bar[n - 1] if n > 0 else 1.0
        x = np.sqrt(before) * beta[n] / (1 - bar[n]) * x0 + np.sqrt(1 - beta[n]) * (1 - before) / (1 - bar[n]) * x
        if n > 0:
            v = (out[-1][:, 5:] + 1) / 2
            variance = beta[n] ** v * (beta[n] * (1 - before) / (1 - bar[n])) ** (1 - v)
            x = x + np.sqrt(variance) * noise[k]
    np.testing.assert_allclose(actual, x, rtol=1e-10, atol=1e-10)
    assert table.column("l")[-1] == 0 and np.all(table.column("l")[:-1] > 0)


@pytest.mark.parametrize("path, prediction, t_max, t_min", SMOOTH)
@pytest.mark.parametrize("name, order, options", [("ddim", 1, {})])
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    assert_convergence_order(name, order, path, prediction, t_max, t_min, **options)


@pytest.mark.parametrize("path, prediction, warp", WHOLE)
@pytest.mark.parametrize(
    "name, options", [("ddpm", {}), ("ddpm", {"variance": "large"}), ("ddim", {"eta": 0.5}), ("euler_ancestral", {})]
)
def test_samples_reach_the_mean_and_variance(name, options, path, prediction, warp):
    assert_reaches_the_moments(name, path, prediction, warp, **options)


def test_discrete_paths_speak_training_steps():
    path = DDPMLinear()
    table = solvers.ddim(path, schedules.uniform(10), prediction="eps", model_time=path.model_time)
    np.testing.assert_allclose(table.t_model[:, 0], np.arange(999, 0, -100), atol=1e-9)
