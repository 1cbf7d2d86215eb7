"""What the tests of solvers share: a plain interpreter of table rows, networks with known answers, and checks.

`Network` is a nonlinear model from which textbook loops read x0, eps and velocity by solving the two equations that
define them, so that they share no formula with the solvers. `Exact` is the perfect network of Gaussian data, for which
the flow map and the moments of samples are closed forms.
"""

import numpy as np
import pytest

from genengine import schedules, solvers
from genengine.paths import EDM, VE, Cosine, RectifiedFlow, VPLinear
from genengine.table import COLUMNS, unpack_flags

RF, VP = RectifiedFlow(), VPLinear()
ALL = solvers.SOLVERS | solvers.INVERSE_SOLVERS
PREDICTIONS = ("eps", "x0", "v", "velocity", "score")
# Gaussian data N(MEAN, STD^2)
MEAN, STD = 0.7, 0.5

# a grid on every kind of path, with a prediction usual there
ON_PATHS = [
    pytest.param(RF, schedules.shifted(6, 2.0, t_max=0.99), "velocity", id="RF"),
    pytest.param(RF, schedules.uniform(5, 0.9, 0.1), "x0", id="RF-inside"),
    pytest.param(EDM(10.0), schedules.karras(6, 0.01, 10.0), "x0", id="EDM"),
    pytest.param(VE(0.01, 10.0), schedules.uniform(6), "eps", id="VE"),
    pytest.param(Cosine(), schedules.logit_normal(6) * 0.98, "v", id="Cosine"),
]
# path, prediction, t_max, t_min where the flow of Gaussian data is smooth
SMOOTH = [
    pytest.param(RF, "velocity", 0.95, 0.05, id="RF"),
    pytest.param(VP, "eps", 0.9, 0.05, id="VP"),
    pytest.param(Cosine(), "v", 0.95, 0.05, id="Cosine"),
]
# the same well inside, where solvers of high order reach their order before rounding
INSIDE = [
    pytest.param(RF, "velocity", 0.6, 0.3, id="RF"),
    pytest.param(VP, "eps", 0.5, 0.25, id="VP"),
    pytest.param(Cosine(), "v", 0.6, 0.3, id="Cosine"),
]
# path, prediction, warp (see assert_reaches_the_moments)
WHOLE = [
    pytest.param(VP, "eps", 2, id="VP"),
    pytest.param(RF, "velocity", 1, id="RF"),
    pytest.param(EDM(20.0), "x0", 3, id="EDM"),
]


def run_table(table, model, x, noise=None):
    """The row of genengine/table.py, one line each; model(x_in, t) returns the list of branches.

    For a learned variance a branch has twice the channels (axis 1), v in the second half of the last branch.
    """
    history = np.full((3, *x.shape), np.nan)
    x_in = table.first_c_in * x
    for k in range(table.num_rows):
        r = dict(zip(COLUMNS, table.rows[k, 0], strict=True))
        phi, writes = unpack_flags(r["flags"])
        out = model(x_in, r["t_model"])
        if r["l"]:
            v = out[-1][:, x.shape[1] :]
        out = [branch[:, : x.shape[1]] if branch.shape != x.shape else branch for branch in out]
        m = out[0] if len(out) == 1 else out[0] + r["g1"] * (out[1] - out[0])
        y = r["p"] * x + r["q"] * m
        y = np.clip(y, -r["r"], r["r"]) if phi else y
        after = r["a"] * x + r["b"] * m + r["c"] * y
        for j in range(3):
            if r[f"h{j + 1}"]:
                after = after + r[f"h{j + 1}"] * history[j]
        if r["s"]:
            after = after + r["s"] * (np.exp(r["l"] * v) if r["l"] else 1.0) * noise[k]
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


def assert_equals_loop(loop, path, grid, prediction, clip=None, guidance_scale=None, **options):
    """The table of solver X against loop_X(model, path, grid, x, noise, **options), in float64."""
    rng = np.random.default_rng(1)
    x = (path.prior_scale(grid[0]) or 1.0) * rng.standard_normal((3, 5))
    noise = rng.standard_normal((4 * len(grid), 3, 5))  # up to four rows per step
    model = Network(path, prediction, clip, guidance_scale)
    arguments = dict(options) if clip is None else options | {"clip": clip}
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    table = ALL[loop.__name__.removeprefix("loop_")](path, grid, prediction=prediction, **arguments)
    expected = loop(model, path, grid, x, noise, **options)
    actual = run_table(table, model.branches, x, noise)
    assert np.ptp(expected) > 0.1
    # float64 rounding grows by sigma/alpha (150 on VPLinear at t = 1) in x0, hence 1e-10 of the largest entry
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


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


def graded(num_steps, t_max, t_min):
    """A smooth grid whose first step is a num_steps-th of the mean step, so that a start of low order does no harm."""
    return t_max + (t_min - t_max) * (np.arange(num_steps + 1) / num_steps) ** 2


def flow_errors(name, path, prediction, t_max, t_min, steps, grid=schedules.uniform, **options):
    """The largest error against the exact flow map for each number of steps."""
    x = np.linspace(-2, 2, 9)
    (mean, std), (mean_end, std_end) = gaussian(path, t_max), gaussian(path, t_min)
    expected = mean_end + std_end / std * (x - mean)
    errors = []
    for num_steps in steps:
        table = ALL[name](path, grid(num_steps, t_max, t_min), prediction=prediction, **options)
        errors.append(np.abs(run_table(table, Exact(path, prediction), x) - expected).max())
    return np.array(errors)


def assert_convergence_order(name, expected, path, prediction, t_max, t_min, steps=(40, 80, 160, 320), **options):
    errors = flow_errors(name, path, prediction, t_max, t_min, steps, **options)
    # error(n) = C n^-order (1 + c/n + ...): the slope is the order + O(1/n), so its deviation halves each time
    deviation = np.abs(np.log2(errors[:-1] / errors[1:]) - expected)
    assert deviation[-1] < 0.07, (errors, deviation)
    assert deviation[-1] < 0.65 * deviation[0] + 0.01, (errors, deviation)


def sampled_moments(table, path, prediction, t_max):
    """Exact mean and variance of the samples: x is carried as an affine form in (1, x_T, z_0, z_1, ...)."""
    basis = np.eye(table.num_rows + 2)
    mean, std = gaussian(path, t_max)
    x = run_table(table, Exact(path, prediction, basis[0]), mean * basis[0] + std * basis[1], noise=basis[2:])
    return x[0], np.sum(x[1:] ** 2)


def assert_reaches_the_moments(name, path, prediction, warp, **options):
    """Mean and variance of the samples approach the data's; t = u^warp puts the steps where the denoiser changes."""
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
