"""Solvers against textbook loops, and against the closed form of Gaussian data.

The loops are written from the papers with x0, eps and velocity found by solving the two equations that define
them, so they share no formula with the solvers. Tables are run by a plain NumPy interpreter of the row.
"""

import numpy as np
import pytest

from genengine import schedules, solvers
from genengine.paths import EDM, VE, Cosine, DDPMLinear, RectifiedFlow, VPLinear
from genengine.table import COLUMNS, CoefficientTable, unpack_flags

RF, VP = RectifiedFlow(), VPLinear()
DETERMINISTIC = ("euler", "heun", "dpm_2", "ddim", "dpmpp_2m", "lms")
CLIPPING = ("euler", "heun", "dpm_2", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde")
HIGHER_STOCHASTIC = ("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")
# of four steps, the last one to sigma = 0; where not given, 4 rows and 0 registers
ROWS = {
    "heun": 7, "dpm_2": 7, "edm": 7, "dpm_2_ancestral": 7, "dpmpp_2s_ancestral": 7, "dpmpp_sde": 7, "dpm_fast": 9,
}  # fmt: skip
HISTORY = {
    "heun": 2, "dpm_2": 1, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "lms": 3, "edm": 2, "dpm_2_ancestral": 1,
    "dpmpp_2s_ancestral": 1, "dpmpp_sde": 1, "dpmpp_2m_sde_heun": 1, "dpmpp_3m_sde": 2, "dpm_fast": 2,
}  # fmt: skip


def run_table(table, model, x, noise=None):
    """The row of genengine/table.py, one line each; model(x_in, t) returns the list of branches."""
    history = np.full((3, *x.shape), np.nan)
    x_in = table.first_c_in * x
    for k in range(table.num_rows):
        r = dict(zip(COLUMNS, table.rows[k, 0], strict=True))
        phi, writes = unpack_flags(r["flags"])
        out = model(x_in, r["t_model"])
        m = out[0] if len(out) == 1 else out[0] + r["g1"] * (out[1] - out[0])
        y = r["p"] * x + r["q"] * m
        y = np.clip(y, -r["r"], r["r"]) if phi else y
        after = r["a"] * x + r["b"] * m + r["c"] * y
        for j in range(3):
            if r[f"h{j + 1}"]:
                after = after + r[f"h{j + 1}"] * history[j]
        if r["s"]:
            after = after + r["s"] * noise[k]
        for j, write in enumerate(writes):
            if write:
                history[j] = (None, y, x)[write]
        x, x_in = after, r["c_in"] * after
    return x


class Network:
    """A nonlinear model with a definite answer for every (x, t), and what a textbook reads off it."""

    def __init__(self, path, prediction, clip=None, guidance_scale=None, seed=0):
        self.path, self.prediction, self.clip, self.guidance_scale = path, prediction, clip, guidance_scale
        self.weights = np.random.default_rng(seed).standard_normal((2, 5, 5)) / 2

    def branches(self, x, t):
        out = [np.tanh(x @ weight + t) + 0.3 * np.sin(x) for weight in self.weights]
        return out if self.guidance_scale is not None else out[:1]

    def __call__(self, x, t):
        """(x0, eps, velocity), x0 clipped and the others derived again from it."""
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)
        out = self.branches(x, t)
        if self.guidance_scale is not None:
            out = [out[0] + self.guidance_scale * (out[1] - out[0])]
        row = {
            "eps": (0, 1),
            "x0": (1, 0),
            "v": (-sigma, alpha),
            "velocity": (d_alpha, d_sigma),
            "score": (0, -1 / sigma if sigma else np.nan),
        }[self.prediction]
        x0, eps = np.linalg.solve([[alpha, sigma], row], np.stack([x.ravel(), out[0].ravel()]))
        x0, eps = x0.reshape(x.shape), eps.reshape(x.shape)
        if self.clip:
            x0 = np.clip(x0, -self.clip, self.clip)
            eps = (x - alpha * x0) / sigma
        return x0, eps, d_alpha * x0 + d_sigma * eps


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


def loop_ddim(model, path, grid, x, noise, eta=0.0):  # Song 2020 (DDIM), eqs. 12 and 16, for alpha^2 + sigma^2 = 1
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        bar, bar_next = path.alpha(t) ** 2, path.alpha(t_next) ** 2
        s = eta * np.sqrt((1 - bar_next) / (1 - bar)) * np.sqrt(1 - bar / bar_next)
        x0, eps, _ = model(x, t)
        x = np.sqrt(bar_next) * x0 + np.sqrt(max(1 - bar_next - s**2, 0)) * eps + s * noise[k]
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


def loop_dpmpp_2m(model, path, grid, x, noise):  # Lu 2022 (DPM-Solver++), Alg. 2
    previous = h_previous = None
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        x0 = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * x0
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        d = x0
        if previous is not None:
            r = h_previous / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = path.sigma(t_next) / path.sigma(t) * x - path.alpha(t_next) * np.expm1(-h) * d
        previous, h_previous = x0, h
    return x


def loop_dpmpp_2m_sde(model, path, grid, x, noise, eta=1.0):  # Lu 2022 (DPM-Solver++), midpoint
    previous = h_previous = None
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        x0 = model(x, t)[0]
        if path.sigma(t_next) == 0:
            return path.alpha(t_next) * x0
        h = (path.log_snr(t_next) - path.log_snr(t)) / 2
        gain = path.alpha(t_next) * -np.expm1(-(1 + eta) * h)
        x = path.sigma(t_next) / path.sigma(t) * np.exp(-eta * h) * x + gain * x0
        if previous is not None:
            x = x + 0.5 * gain * (x0 - previous) * h / h_previous
        x = x + path.sigma(t_next) * np.sqrt(-np.expm1(-2 * eta * h)) * noise[k]
        previous, h_previous = x0, h
    return x


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


def assert_equals_loop(name, path, grid, prediction, clip=None, guidance_scale=None, **options):
    rng = np.random.default_rng(1)
    x, noise = path.prior_scale(grid[0]) * rng.standard_normal((3, 5)), rng.standard_normal((len(grid), 3, 5))
    model = Network(path, prediction, clip, guidance_scale)
    arguments = dict(options) if clip is None else options | {"clip": clip}
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    table = solvers.SOLVERS[name](path, grid, prediction=prediction, **arguments)
    loop = globals()[f"loop_{name}"]
    expected = loop(model, path, grid, x, noise, **options)
    actual = run_table(table, model.branches, x, noise)
    assert np.ptp(expected) > 0.1
    # float64 rounding grows by sigma/alpha (150 on VPLinear at t = 1) in x0, hence 1e-10 of the largest entry
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity", "score"])
@pytest.mark.parametrize("name", [*CLIPPING, "ddim"])
def test_equals_textbook_for_every_prediction(name, prediction, clip):
    assert_equals_loop(name, VP, schedules.uniform(6, 0.98, 0.0), prediction, clip, guidance_scale=2.5)


@pytest.mark.parametrize(
    "path, grid, prediction",
    [
        (RF, schedules.shifted(6, 2.0, t_max=0.99), "velocity"),
        (RF, schedules.uniform(5, 0.9, 0.1), "x0"),
        (EDM(10.0), schedules.karras(6, 0.01, 10.0), "x0"),
        (VE(0.01, 10.0), schedules.uniform(6), "eps"),
        (Cosine(), schedules.logit_normal(6) * 0.98, "v"),
    ],
    ids=["RF", "RF-inside", "EDM", "VE", "Cosine"],
)
@pytest.mark.parametrize("name, clip", [*((n, clip) for n in CLIPPING for clip in (None, 0.6)), ("lms", None)])
def test_equals_textbook_on_every_path(name, clip, path, grid, prediction):
    assert_equals_loop(name, path, grid, prediction, clip)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_equals_textbook_from_the_singular_end(name):
    assert_equals_loop(name, RF, schedules.uniform(5), "velocity")
    assert_equals_loop(name, Cosine(), schedules.uniform(5), "v", clip=0.7)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [None, 0.6])
def test_ddim_with_eta_equals_textbook(eta, clip):
    assert_equals_loop("ddim", VP, schedules.uniform(6), "eps", clip, 1.7, eta=eta)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.6])
def test_eta_equals_textbook(name, eta):
    assert_equals_loop(name, VP, schedules.uniform(6, 0.95), "eps", eta=eta)
    assert_equals_loop(name, EDM(5.0), schedules.karras(6, 0.02, 5.0), "x0", eta=eta)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddpm_equals_textbook(prediction, clip, variance):
    path = DDPMLinear(0.01, 0.4, 12)
    assert_equals_loop("ddpm", path, schedules.uniform(12), prediction, clip, 3.0, variance=variance)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_equals_textbook(order):
    assert_equals_loop("lms", VP, schedules.uniform(9, 0.9), "eps", order=order)
    assert_equals_loop("lms", EDM(5.0), schedules.karras(9, 0.02, 5.0), "x0", order=order)


def test_relations_between_solvers():
    grid = schedules.uniform(6)
    rows = lambda name, path, **options: solvers.SOLVERS[name](path, grid, prediction="v", **options).rows  # noqa: E731
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)  # noqa: E731
    same(rows("ddim", VP, eta=1.0), rows("ddpm", VP))
    same(rows("ddim", VP, eta=0.3), rows("euler_ancestral", VP, eta=0.3))
    same(rows("ddim", RF), rows("euler", RF))
    same(rows("dpmpp_2m", VP), rows("dpmpp_2m_sde", VP, eta=0.0))


# Gaussian data N(MEAN, STD^2): the denoiser and the flow map are closed forms
MEAN, STD = 0.7, 0.5


def gaussian(path, t):
    """Mean and standard deviation of x_t."""
    return path.alpha(t) * MEAN, np.hypot(path.alpha(t) * STD, path.sigma(t))


class Exact:
    """The perfect network; with `unit` x is an affine form whose first entry multiplies the constant 1."""

    def __init__(self, path, prediction, unit=1.0):
        self.path, self.prediction, self.unit = path, prediction, unit

    def __call__(self, x, t):
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)
        mean, std = gaussian(self.path, t)
        centred = (x - mean * self.unit) / std**2
        x0, eps = MEAN * self.unit + alpha * STD**2 * centred, sigma * centred
        if self.prediction == "velocity":
            return [d_alpha * x0 + d_sigma * eps]
        return [{"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]]


def flow_errors(name, path, prediction, t_max, t_min, steps, **options):
    x = np.linspace(-2, 2, 9)
    (mean, std), (mean_end, std_end) = gaussian(path, t_max), gaussian(path, t_min)
    expected = mean_end + std_end / std * (x - mean)
    errors = []
    for num_steps in steps:
        grid = schedules.uniform(num_steps, t_max, t_min)
        table = solvers.SOLVERS[name](path, grid, prediction=prediction, **options)
        errors.append(np.abs(run_table(table, Exact(path, prediction), x) - expected).max())
    return np.array(errors)


@pytest.mark.parametrize(
    "name, order, options",
    [
        ("euler", 1, {}),
        ("ddim", 1, {}),
        ("heun", 2, {}),
        ("dpm_2", 2, {}),
        ("dpmpp_2m", 2, {}),
        ("lms", 1, {"order": 1}),
        ("lms", 2, {"order": 2}),
    ],
)
@pytest.mark.parametrize(
    "path, prediction, t_max, t_min",
    [(RF, "velocity", 0.95, 0.05), (VP, "eps", 0.9, 0.05), (Cosine(), "v", 0.95, 0.05)],
    ids=["RF", "VP", "Cosine"],
)
def test_convergence_order(name, order, options, path, prediction, t_max, t_min):
    errors = flow_errors(name, path, prediction, t_max, t_min, (40, 80, 160, 320), **options)
    # error(n) = C n^-order (1 + c/n + ...): the slope is order + O(1/n), so its deviation halves each time
    deviation = np.abs(np.log2(errors[:-1] / errors[1:]) - order)
    assert deviation[-1] < 0.07, (errors, deviation)
    assert deviation[-1] < 0.65 * deviation[0] + 0.01, (errors, deviation)


@pytest.mark.parametrize("name, order", [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_convergence_order_over_the_whole_path(name, order):
    errors = flow_errors(name, RF, "velocity", 1.0, 0.0, (40, 80, 160))
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.06)


def test_lms_order_4_beats_order_2():
    steps = (80,)
    assert (
        flow_errors("lms", VP, "eps", 0.9, 0.05, steps) < flow_errors("lms", VP, "eps", 0.9, 0.05, steps, order=2) / 20
    )


def sampled_moments(table, path, prediction, t_max):
    """Exact mean and variance of the samples: x is carried as an affine form in (1, x_T, z_0, z_1, ...)."""
    basis = np.eye(table.num_rows + 2)
    mean, std = gaussian(path, t_max)
    x = run_table(table, Exact(path, prediction, basis[0]), mean * basis[0] + std * basis[1], noise=basis[2:])
    return x[0], np.sum(x[1:] ** 2)


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddpm", {}),
        ("ddpm", {"variance": "large"}),
        ("ddim", {"eta": 0.5}),
        ("euler_ancestral", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"eta": 0.5}),
    ],
)
@pytest.mark.parametrize(
    "path, prediction, warp",  # t = u^warp puts the steps where the denoiser of this path changes
    [(VP, "eps", 2), (RF, "velocity", 1), (EDM(20.0), "x0", 3)],
    ids=["VP", "RF", "EDM"],
)
def test_stochastic_solvers_reach_the_mean_and_variance(name, options, path, prediction, warp):
    errors = []
    for num_steps in (100, 200, 400):
        grid = schedules.uniform(num_steps) ** warp
        table = solvers.SOLVERS[name](path, grid, prediction=prediction, **options)
        mean, variance = sampled_moments(table, path, prediction, 1.0)
        errors.append((abs(mean - MEAN), abs(variance - STD**2)))
    errors = np.array(errors)
    assert np.all(errors[-1] < (0.005, 0.01)), errors
    # first order at least: halving the step halves what is not yet rounding
    assert np.all(errors[1:] < 0.6 * errors[:-1] + 1e-9), errors


def test_deterministic_solvers_reach_the_mean_and_variance():
    for name in DETERMINISTIC:
        table = solvers.SOLVERS[name](VP, schedules.uniform(400, 0.99, 0.0), prediction="v")
        assert not table.needs_noise
        assert sampled_moments(table, VP, "v", 0.99) == pytest.approx((MEAN, STD**2), abs=0.01)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_tables_are_lean(name):
    grid = schedules.uniform(4, 0.9)
    table = solvers.SOLVERS[name](VP, grid, prediction="eps", guidance_scale=3.0)
    assert table.num_rows == ROWS.get(name, 4)
    assert table.num_history == HISTORY.get(name, 0)
    assert table.needs_noise == (name in (*STOCHASTIC, *HIGHER_STOCHASTIC))
    assert np.all(table.column("c") == 0), "without clipping y is folded into a and b"
    assert np.all(table.column("g1") == 3.0) and np.all(table.column("c_in") == 1.0)
    assert table.column("s")[-1] == 0 and unpack_flags(table.column("flags")[-1, 0])[1] == (0, 0, 0)
    assert table.name == name == solvers.SOLVERS[name].__name__ and table.init_scale == 1.0
    assert f"{name}: nfe {table.num_rows}, guidance 3" in table.describe()


def test_registers_that_nobody_reads_are_not_written():
    # from alpha = 0 the second step is first order too, and so is the last one, to sigma = 0
    table = solvers.dpmpp_2m(RF, schedules.uniform(5), prediction="velocity")
    assert [unpack_flags(flags)[1][0] for flags in table.column("flags")[:, 0]] == [0, 1, 1, 0, 0]


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


def test_discrete_paths_speak_training_steps():
    path = DDPMLinear()
    table = solvers.ddim(path, schedules.uniform(10), prediction="eps", model_time=path.model_time)
    np.testing.assert_allclose(table.t_model[:, 0], np.arange(999, 0, -100), atol=1e-9)


def test_per_sample_guidance_and_stacking():
    table = solvers.ddim(VP, schedules.uniform(4), prediction="v", guidance_scale=np.array([1.0, 5.0]))
    assert table.rows.shape == (4, 2, 16)
    stacked = CoefficientTable.stack([table, solvers.heun(RF, schedules.uniform(3), prediction="velocity")])
    assert stacked.validate().rows.shape == (6, 3, 16)


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize(
    "grid",
    [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.0], [1.0, -0.1], [[1.0, 0.0]], [1.0, np.nan, 0.0]],
    ids=str,
)
def test_bad_grids_are_refused(name, grid):
    with pytest.raises(ValueError, match="strictly falling times"):
        solvers.SOLVERS[name](VP, grid, prediction="eps")


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_singular_ends_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"alpha > 0, got alpha = 0 at t = 1.0; start the grid"):
        solvers.SOLVERS[name](RF, schedules.uniform(4), prediction="eps")
    with pytest.raises(ValueError, match="prediction must be one of"):
        solvers.SOLVERS[name](RF, schedules.uniform(4, 0.9), prediction="epsilon")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("euler", {"clip": 0.0}, "clip must be None or a finite radius"),
        ("euler", {"clip": -1.0}, "clip must be None or a finite radius"),
        ("ddim", {"eta": 1.1}, r"eta must be in \[0, 1\], got 1.1"),
        ("ddim", {"eta": -0.1}, r"eta must be in \[0, 1\]"),
        ("euler_ancestral", {"eta": -0.1}, "eta must be a finite number >= 0"),
        ("dpmpp_2m_sde", {"eta": np.nan}, "eta must be a finite number >= 0"),
        ("ddpm", {"variance": "learned"}, "variance must be 'small' or 'large', got 'learned'"),
        ("lms", {"order": 5}, "order must be 1, 2, 3 or 4, got 5"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"{message}"):
        solvers.SOLVERS[name](VP, schedules.uniform(4), prediction="eps", **options)
