"""The same numbers as diffusers' schedulers, step for step, where both define a solver.

Their coefficients are float32, ours float64: 1e-5 of the largest entry allows for that over ten steps.
"""

import numpy as np
import pytest
from solver_support import RF, run_table

from genengine import schedules, solvers
from genengine.paths import ScaledLinear, Trigonometric

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
torch = pytest.importorskip("torch")

PATH = ScaledLinear()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHT = np.random.default_rng(7).standard_normal((5, 5)) / 2


def network(x, n):
    return np.tanh(x @ WEIGHT + n / 1000) + 0.3 * np.sin(x)


def theirs(scheduler, x, noise=(), scale=1.0):
    """The state after every step; noise is handed to steps that take it."""
    state = torch.from_numpy(x)
    for k, n in enumerate(scheduler.timesteps):
        output = torch.from_numpy(network(state.numpy(), float(n) * scale))
        given = {"variance_noise": torch.from_numpy(noise[k])} if len(noise) else {}
        state = scheduler.step(output, n, state, return_dict=False, **given)[0]
    return state.double().numpy()


def grid_of(scheduler, end=0.0):
    """Our times of their training steps, each once, then the end."""
    steps = np.array(list(dict.fromkeys(scheduler.timesteps.tolist())))
    return np.append((steps + 1) / 1000, end)


def draws(seed, num_steps):
    """x and the noise of every step."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, 5)), rng.standard_normal((num_steps, 3, 5))


def assert_same(table, expected, x, noise=None):
    actual = run_table(table, lambda x_in, t: [network(x_in, t)], x, noise)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def ours(name, scheduler, end=0.0, prediction="eps", **options):
    solver = (solvers.SOLVERS | solvers.INVERSE_SOLVERS)[name]
    return solver(PATH, grid_of(scheduler, end), prediction=prediction, model_time=PATH.model_time, **options)


@pytest.mark.parametrize("spacing, grid", [("leading", schedules.leading), ("trailing", schedules.trailing)])
@pytest.mark.parametrize("num_steps", [1, 7, 10, 50])
def test_training_step_grids(num_steps, spacing, grid):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, **BETAS)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_allclose(grid(num_steps), grid_of(scheduler), rtol=1e-14)


@pytest.mark.parametrize("num_steps", [2, 7, 10, 50])
def test_linspace(num_steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="linspace", **BETAS)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_allclose(schedules.linspace(num_steps), grid_of(scheduler), rtol=1e-14)


@pytest.mark.parametrize("grid", [schedules.karras, schedules.exponential])
def test_noise_levels(grid):
    scheduler = diffusers.EulerDiscreteScheduler(**{f"use_{grid.__name__}_sigmas": True}, **BETAS)
    scheduler.set_timesteps(9)
    levels = np.exp(-0.5 * PATH.log_snr(np.array([0.001, 1.0])))
    t = grid(9, *levels, path=PATH)
    np.testing.assert_allclose(np.exp(-0.5 * PATH.log_snr(t)), scheduler.sigmas, rtol=2e-5)


@pytest.mark.parametrize("form", ["exponential", "linear"])
def test_dynamic_shift(form):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=form)
    mu = schedules.shift_mu(1500)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 9, 9), mu=mu)
    np.testing.assert_allclose(schedules.shifted_dynamic(9, mu, form), scheduler.sigmas, rtol=1e-6)


def test_beta_levels():
    """Theirs puts both ends among the steps and 0 behind them."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    scheduler.set_timesteps(9)
    high, low = float(scheduler.sigmas[0]), float(scheduler.sigmas[-2])
    np.testing.assert_allclose(schedules.beta(8, t_max=high, t_min=low), scheduler.sigmas[:-1], rtol=1e-5)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction, theirs_name", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_ddpm(variance, prediction, theirs_name, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        variance_type=f"fixed_{variance}", prediction_type=theirs_name, clip_sample=True, clip_sample_range=0.8, **BETAS
    )
    scheduler.set_timesteps(10)
    x, noise = draws(0, 10)
    left = iter(noise)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(left)))
    table = ours("ddpm", scheduler, prediction=prediction, variance=variance, clip=0.8)
    assert_same(table, theirs(scheduler, x), x, noise)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip, eps", [(None, "x0"), (0.8, "x0"), (0.8, "model")])
def test_ddim(eta, clip, eps):
    scheduler = diffusers.DDIMScheduler(clip_sample=clip is not None, clip_sample_range=clip or 1.0, **BETAS)
    scheduler.set_timesteps(10)
    x, noise = draws(1, 10)
    state = torch.from_numpy(x)
    for k, n in enumerate(scheduler.timesteps):
        output = torch.from_numpy(network(state.numpy(), float(n)))
        given = {"eta": eta, "variance_noise": torch.from_numpy(noise[k]) if eta else None}
        step = scheduler.step(output, n, state, use_clipped_model_output=eps == "x0", **given)
        state = step.prev_sample
    assert_same(ours("ddim", scheduler, eta=eta, clip=clip, eps=eps), state.numpy(), x, noise)


def test_ddim_inverse():
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False, **BETAS)
    scheduler.set_timesteps(10)
    x, _ = draws(2, 1)
    grid = np.append(0.0, (scheduler.timesteps.numpy() + 1) / 1000)
    table = solvers.ddim_inverse(PATH, grid, prediction="eps", model_time=PATH.model_time, model_at="end")
    assert_same(table, theirs(scheduler, x), x)


@pytest.mark.parametrize("form", ["midpoint", "heun"])
@pytest.mark.parametrize("num_steps", [8, 20])
def test_dpmpp_2m(form, num_steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_type=form, **BETAS)
    scheduler.set_timesteps(num_steps)
    x, _ = draws(3, 1)
    assert_same(ours("dpmpp_2m", scheduler, form=form), theirs(scheduler, x), x)


@pytest.mark.parametrize("form", ["midpoint", "heun"])
def test_dpmpp_2m_sde(form):
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type=form, **BETAS)
    scheduler.set_timesteps(8)
    x, noise = draws(4, 8)
    assert_same(ours("dpmpp_2m_sde", scheduler, form=form), theirs(scheduler, x, noise), x, noise)


@pytest.mark.parametrize("num_steps, lower", [(8, True), (8, False), (20, False)])
def test_dpmpp_3m_is_the_published_form(num_steps, lower):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3, lower_order_final=lower, **BETAS)
    scheduler.set_timesteps(num_steps)
    x, _ = draws(5, 1)
    assert_same(ours("dpmpp_3m", scheduler, lower_order_final=lower), theirs(scheduler, x), x)


# to sigma = 0 theirs is singular unless the last steps are of lower order, and with bh1 not a number
@pytest.mark.parametrize(
    "form, ending, end, lower",
    [("bh2", "zero", 0.0, True), ("bh2", "sigma_min", 0.001, False), ("bh1", "sigma_min", 0.001, True)],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, lower, form, ending, end):
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=form, lower_order_final=lower, final_sigmas_type=ending, **BETAS
    )
    scheduler.set_timesteps(9)
    x, _ = draws(6, 1)
    table = ours("unipc", scheduler, end, order=order, form=form, lower_order_final=lower)
    assert_same(table, theirs(scheduler, x), x)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=True, **BETAS)
    scheduler.set_timesteps(9)
    x, _ = draws(7, 1)
    table = ours("deis", scheduler, 0.001, order=order, lower_order_final=True)
    assert_same(table, theirs(scheduler, x), x)


@pytest.mark.parametrize("num_steps", [4, 10])
def test_plms(num_steps):
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1, **BETAS)
    scheduler.set_timesteps(num_steps)
    x, _ = draws(8, 1)
    assert_same(ours("plms", scheduler), theirs(scheduler, x), x)


def test_ipndm():
    t = schedules.uniform(9, 0.95)
    scheduler = diffusers.IPNDMScheduler(trained_betas=np.sin(np.pi / 2 * t))
    scheduler.set_timesteps(9)
    x, _ = draws(9, 1)
    path = Trigonometric()
    table = solvers.ipndm(path, t, prediction="v", model_time=lambda t: 1000 * t)
    assert_same(table, theirs(scheduler, x, scale=1000), x)


def test_lcm(monkeypatch):
    scheduler = diffusers.LCMScheduler(clip_sample=False, **BETAS)
    scheduler.set_timesteps(5)
    x, noise = draws(10, 5)
    left = iter(noise)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(left)))
    assert_same(ours("lcm", scheduler), theirs(scheduler, x), x, noise)


@pytest.mark.parametrize("name", ["euler", "heun", "consistency"])
def test_flow_match(name, monkeypatch):
    known = {"euler": "FlowMatchEulerDiscrete", "heun": "FlowMatchHeunDiscrete", "consistency": "FlowMatchLCM"}
    scheduler = getattr(diffusers, known[name] + "Scheduler")(shift=3.0)
    scheduler.set_timesteps(7)
    x, noise = draws(11, 7)
    left = iter(noise)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(left)), raising=False)
    sigma = np.array(list(dict.fromkeys(scheduler.sigmas.double().tolist())))
    if name == "heun":  # theirs ends with a step of Euler, where a velocity model can be evaluated at t = 0
        sigma, scheduler.timesteps = sigma[:-1], scheduler.timesteps[:-1]
    table = getattr(solvers, name)(RF, sigma, prediction="velocity", model_time=lambda t: 1000 * t)
    assert_same(table, theirs(scheduler, x), x, noise)
