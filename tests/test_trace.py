"""Third-party samplers read into tables: coefficients by hand, runs side by side, and refusals."""

import numpy as np
import pytest
import torch

import genengine
from genengine import paths, schedules, solvers
from genengine.table import Phi, Write, unpack_flags
from genengine.trace import NotAffine, trace

SIGMAS = np.array([10.0, 6.0, 3.0, 1.0, 0.2, 0.0])


def columns(table, *names):
    return np.stack([table.column(name)[:, 0] for name in names], axis=1)


# ---- step functions ----------------------------------------------------------------------------------------------


def test_a_step_without_memory():
    table = trace(lambda x, output, row: (1 + row) * x - 0.5 * output, 3)
    np.testing.assert_allclose(columns(table, "a", "b"), [[1, -0.5], [2, -0.5], [3, -0.5]], rtol=1e-12)
    assert table.num_history == 0 and not table.needs_noise and table.name == "<lambda>"
    np.testing.assert_array_equal(table.t_model[:, 0], [0, 1, 2])


def test_earlier_outputs_take_the_registers_they_need():
    def adams(memory):
        def step(x, output, row):
            memory.append(output)
            return x - sum(weight * m for weight, m in zip((1.5, -0.7, 0.2), reversed(memory), strict=False))

        return step

    class Fresh:  # every copy starts with an empty memory
        timesteps = torch.arange(6)

        def __init__(self):
            self.outputs = []

        def step(self, model_output, timestep, sample):
            return (adams(self.outputs)(sample, model_output, int(timestep)),)

    table = trace(Fresh())
    assert table.num_history == 2
    history = sorted(columns(table, "h1", "h2")[4])
    np.testing.assert_allclose(history, [-0.2, 0.7], rtol=1e-9)


def test_a_clamp_becomes_phi():
    table = trace(lambda x, output, row: 0.25 * x + 0.5 * (2 * x - 3 * output).clamp(-1.5, 1.5), 2)
    assert [unpack_flags(flags)[0] for flags in table.column("flags")[:, 0]] == [Phi.CLAMP] * 2
    p, q, r, a, b, c = columns(table, "p", "q", "r", "a", "b", "c")[0]
    np.testing.assert_allclose([a, b, c * p, c * q, c * r], [0.25, 0, 1.0, -1.5, 0.75], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("p, q", [(1.0, 1.0), (1.0, 0.999), (0.0, 1.0), (1.0, 0.0), (1e-3, 40.0)])
def test_a_clamp_of_any_combination(p, q, signs):
    clamp = lambda x, output: (signs[0] * p * x + signs[1] * q * output).clamp(-1, 1)  # noqa: E731
    table = trace(lambda x, output, row: 0.3 * x + 0.1 * output - 0.6 * clamp(x, output), 2)
    assert np.all(table.column("flags")[:, 0] == Phi.CLAMP)


def test_a_saved_state_takes_a_register():
    class TwoStage:
        timesteps = torch.arange(4)

        def __init__(self):
            self.saved = None

        def step(self, model_output, timestep, sample):
            if self.saved is None:
                self.saved = sample
                return (sample + 0.5 * model_output,)
            saved, self.saved = self.saved, None
            return (saved + model_output,)

    table = trace(TwoStage(), name="midpoint")
    assert [unpack_flags(flags)[1][0] for flags in table.column("flags")[:, 0]] == [Write.X, 0, Write.X, 0]
    np.testing.assert_allclose(columns(table, "a", "b", "h1"), [[1, 0.5, 0], [0, 1, 1]] * 2)
    assert table.name == "midpoint"


def test_noise_is_the_tables_own():
    table = trace(lambda x, output, row: x - output + (0.1 + row) * torch.randn_like(x), 2)
    np.testing.assert_allclose(table.column("s")[:, 0], [0.1, 1.1])
    with pytest.raises(NotAffine, match="row 0 adds two draws of noise"):
        trace(lambda x, output, row: x + torch.randn_like(x) + 2 * torch.randn(x.shape), 1)


@pytest.mark.parametrize(
    "step, reason",
    [
        (lambda x, output, row: x.tanh() - output, "row 0 .* differs from its table"),
        (lambda x, output, row: x - output * x, "row 0 .* differs from its table"),
        (lambda x, output, row: x - output.mean(), "not affine|does not act on elements alone|constant"),
        (lambda x, output, row: x.flip(-1) - output, "does not act on elements alone"),
        (lambda x, output, row: x - output + 1, r"row 0 adds a constant \(1\)"),
        (lambda x, output, row: x / 0.0, "row 0 is not a number, or infinite"),
        (lambda x, output, row: x[..., :2], "of shape .* returned"),
        (lambda x, output, row: x.missing(), "row 0: its step.* raised AttributeError"),
        (lambda x, output, row: x + torch.empty_like(x).normal_(), "differs|draws"),
    ],
)
def test_refusals_name_the_row_and_the_reason(step, reason):
    with pytest.raises(NotAffine, match=f"(?s)trace: refused: .*({reason})"):
        trace(step, 2, name="refused")


def test_too_much_memory_is_refused():
    class Sum:
        timesteps = torch.arange(9)

        def __init__(self):
            self.outputs = []

        def step(self, model_output, timestep, sample):
            self.outputs.append(model_output)
            return (sample - sum((j + 1.0) ** 0.5 * m for j, m in enumerate(self.outputs[-5:])),)

    with pytest.raises(NotAffine, match="more than 3 tensors of history"):
        trace(Sum())


def test_what_is_no_sampler():
    with pytest.raises(
        TypeError,
        match="sampler must be a scheduler .*, a loop with sigmas=, or a step function with num_steps=, got int",
    ):
        trace(3)
    with pytest.raises(TypeError, match="got <lambda>"):
        trace(lambda x: x)


def test_a_traced_table_runs_in_sample():
    path, grid = paths.RectifiedFlow(), schedules.uniform(7)
    table = trace(lambda x, output, row: x + (grid[row + 1] - grid[row]) * output, 7)
    denoiser = lambda x, t: torch.tanh(x) + 0.1  # noqa: E731
    ours = genengine.sample(denoiser, table, (2, 3, 4), seed=1)
    expected = genengine.sample(denoiser, solvers.euler(path, grid, prediction="velocity"), (2, 3, 4), seed=1)
    assert torch.equal(ours, expected)


# ---- loops -------------------------------------------------------------------------------------------------------


def heun_loop(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - model(x, sigma * x.new_ones([x.shape[0]]))) / sigma
        dt = sigma_next - sigma
        if sigma_next == 0:
            x = x + d * dt
        else:
            x_next = x + d * dt
            x = x + dt * (d + (x_next - model(x_next, sigma_next * x.new_ones([x.shape[0]]))) / sigma_next) / 2
    return x


def ancestral_loop(model, x, sigmas, eta=1.0, noise_sampler=None):
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
        down = (sigma_next**2 - up**2) ** 0.5
        x = x + (x - model(x, sigma)) / sigma * (down - sigma)
        x = x + noise_sampler(sigma, sigma_next) * up
    return x


def test_a_loop_is_the_solver_it_claims_to_be():
    path, grid = paths.EDM(10.0), SIGMAS / 10.0
    denoiser = lambda x, t: torch.tanh(x) * 0.7  # noqa: E731
    run = lambda table: genengine.sample(denoiser, table, (2, 5, 4), seed=3)  # noqa: E731
    ours, solver = run(trace(heun_loop, sigmas=SIGMAS)), run(solvers.heun(path, grid, prediction="x0"))
    torch.testing.assert_close(ours, solver, rtol=1e-5, atol=1e-5)
    table = trace(ancestral_loop, sigmas=SIGMAS, options={"eta": 0.6})
    solver = run(solvers.euler_ancestral(path, grid, prediction="x0", eta=0.6))
    torch.testing.assert_close(run(table), solver, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(table.t_model[:, 0], SIGMAS[:-1])
    assert table.init_scale == 10.0


def test_loops_that_are_no_table():
    def adaptive(model, x, sigmas):
        for sigma in sigmas[:-1]:
            x = x - model(x, sigma)
            if x.abs().max() > 0:
                x = x - 0.1 * model(x, sigma)
        return x

    with pytest.raises(NotAffine, match="adaptive: how often the loop evaluates the model depends on the values"):
        trace(adaptive, sigmas=SIGMAS)

    def squared(model, x, sigmas):
        for sigma in sigmas[:-1]:
            x = x - model(x, sigma) ** 2
        return x

    with pytest.raises(NotAffine, match="squared: .*(not affine|no combination)"):
        trace(squared, sigmas=SIGMAS)

    def churned(model, x, sigmas):
        x = x + torch.randn_like(x)
        for sigma in sigmas[:-1]:
            x = x - model(x, sigma)
        return x

    with pytest.raises(NotAffine, match="noise before its first evaluation"):
        trace(churned, sigmas=SIGMAS)


# ---- schedulers of diffusers -------------------------------------------------------------------------------------


def test_a_scheduler_is_left_as_it_was_and_may_be_traced_from_the_middle():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(12)
    whole, tail = trace(scheduler), trace(scheduler, begin=5)
    assert scheduler.step_index is None and whole.num_rows == 12 and tail.num_rows == 7
    assert tail.column("h1")[0, 0] == 0 != whole.column("h1")[5, 0], "a run from the middle warms up again"
    scheduler.step(torch.zeros(1, 1), scheduler.timesteps[0], torch.zeros(1, 1))
    with pytest.raises(NotAffine, match="has stepped already; call set_timesteps again"):
        trace(scheduler)
    assert trace(scheduler, 12).num_rows == 12
    with pytest.raises(NotAffine, match="no timesteps are set"):
        trace(diffusers.DDPMWuerstchenScheduler())
    assert "dpmpp: nfe 12" in trace(scheduler, 12, name="dpmpp").describe()


def test_thresholding_and_learned_variance_of_a_scheduler():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    table = trace(diffusers.DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=2.0), 6)
    assert all(int(flags) & 3 == Phi.DYNAMIC_THRESHOLD for flags in table.column("flags")[:, 0])
    table = trace(diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False), 10)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    bar, bar_next = (
        scheduler.alphas_cumprod[t].double(),
        scheduler.alphas_cumprod[scheduler.previous_timestep(t)].double(),
    )
    beta = 1 - bar / bar_next
    low = torch.log((1 - bar_next) / (1 - bar) * beta)
    high = torch.log(beta)  # v goes from the posterior's log variance to log beta: Nichol and Dhariwal 2021, eq. 15
    assert table.column("l")[3, 0] != 0
    assert 2 * np.log(table.column("s")[3, 0]) == pytest.approx(float((low + high) / 2), rel=1e-3)


@pytest.mark.parametrize(
    "name, reason", [("CogVideoXDPMScheduler", "timestep_back"), ("RePaintScheduler", "original_image")]
)
def test_schedulers_that_step_on_more_are_refused(name, reason):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with pytest.raises(NotAffine, match=f"trace: {name}: row 0: .*{reason}"):
        trace(getattr(diffusers, name)(), 10)


def test_a_traced_threshold_runs_with_the_extension():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, thresholding=True, sample_max_value=2.0)
    table = trace(scheduler, 6)
    x = 3 * torch.randn(2, 3, 8, 8)
    model = lambda x, t: torch.tanh(x)  # noqa: E731
    threshold = genengine.extensions.DynamicThreshold(quantile=0.995, max_value=2.0)
    ours = genengine.sample(model, table, x=x, extensions=(threshold,))
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_samplers_that_write_to_their_x():
    def step(x, output, row):
        return x.add_(output, alpha=-0.1)

    def loop(model, x, sigmas):
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            x += (x - model(x, sigma.expand(len(x)))) / sigma * (sigma_next - sigma)
        return x

    assert trace(step, 4).column("b")[:, 0].tolist() == pytest.approx([-0.1] * 4)
    assert trace(loop, sigmas=[10.0, 5.0, 2.0, 1.0]).num_rows == 3
