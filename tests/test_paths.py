import numpy as np
import pytest

from genengine.paths import (
    EDM,
    VE,
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMSigmoid,
    RectifiedFlow,
    ScaledLinear,
    Sigmoid,
    Trigonometric,
    VPLinear,
    ZeroTerminalSNR,
)

VP = [
    VPLinear(), VPLinear(0.5, 8.0), Cosine(), Cosine(s=0.0), DDPMLinear(), ScaledLinear(), DDPMCosine(),
    ZeroTerminalSNR(ScaledLinear()), ZeroTerminalSNR(DDPMLinear()), DDPMSigmoid(), ZeroTerminalSNR(DDPMSigmoid()),
    Trigonometric(), Sigmoid(), Sigmoid(-1.0, 3.0, 0.8), Sigmoid(0.0, 3.0, 0.3),
]  # fmt: skip
COSINE = np.cos((np.arange(11) / 10 + 0.01) / 1.01 * np.pi / 2) ** 2  # Nichol 2021 eq. 17
OTHERS = [RectifiedFlow(), EDM(), EDM(sigma_max=3.0), VE()]
ALL = VP + OTHERS
# off the knots i/1000 and i/20 of the discrete paths, where log alpha has kinks
TIMES = np.array([0.00125, 0.02125, 0.20125, 0.50025, 0.77725, 0.99875])


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_derivatives_match_central_differences(path):
    h = 1e-6
    alpha, sigma, d_alpha, d_sigma = path.coefficients(TIMES)
    for value, derivative, function in ((alpha, d_alpha, path.alpha), (sigma, d_sigma, path.sigma)):
        np.testing.assert_array_equal(value, function(TIMES))
        numeric = (function(TIMES + h) - function(TIMES - h)) / (2 * h)
        # truncation h^2 f'''/6, with f''' ~ f/t^3 at t = 0.00125, plus rounding 1e-16 |f|/h
        np.testing.assert_allclose(derivative, numeric, rtol=1e-6, atol=1e-9 * np.abs(value).max())


@pytest.mark.parametrize("path", VP, ids=repr)
def test_variance_preserving(path):
    t = np.linspace(0, 1, 101)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1, rtol=1e-14)
    assert path.prior_scale(0.9) == 1.0


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_ends_and_monotonicity(path):
    t = np.linspace(0, 1, 101)
    assert path.alpha(0.0) == 1.0
    assert path.sigma(0.0) == (path.sigma_min if isinstance(path, VE) else 0.0)
    assert not np.signbit(path.sigma(0.0))
    assert np.all(np.diff(path.sigma(t)) > 0) and np.all(np.diff(path.alpha(t)) <= 0)
    assert np.all(np.diff(path.log_snr(t)) < 0)


@pytest.mark.parametrize("path", ALL, ids=repr)
def test_log_snr_and_its_inverse(path):
    alpha, sigma = path.alpha(TIMES), path.sigma(TIMES)
    np.testing.assert_allclose(path.log_snr(TIMES), np.log(alpha**2 / sigma**2), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(path.t_of_log_snr(path.log_snr(TIMES)), TIMES, rtol=1e-8)
    assert isinstance(path.t_of_log_snr(float(path.log_snr(0.5))), float)


@pytest.mark.parametrize("path", [RectifiedFlow(), EDM(), Cosine(), VPLinear(), Trigonometric(), Sigmoid()], ids=repr)
def test_infinite_log_snr_is_the_data_end(path):
    assert path.log_snr(0.0) == np.inf
    assert path.t_of_log_snr(np.inf) == pytest.approx(0.0, abs=1e-15)


def test_exact_ends():
    assert Cosine().alpha(1.0) == 0.0 and Cosine().log_snr(1.0) == -np.inf
    assert RectifiedFlow().alpha(1.0) == 0.0
    for path in (Trigonometric(), Sigmoid(), Sigmoid(0.0, 3.0, 0.3)):
        assert path.alpha(1.0) == 0.0 and path.sigma(1.0) == pytest.approx(1.0, rel=1e-15)
        assert path.log_snr(1.0) == -np.inf and path.t_of_log_snr(-np.inf) == pytest.approx(1.0, rel=1e-14)
    assert EDM(80.0).prior_scale(1.0) == 80.0
    assert VE(0.01, 50.0).sigma(1.0) == pytest.approx(50.0, rel=1e-15)


def test_closed_forms():
    t = 0.3
    integral = 0.1 * t + 0.5 * 19.9 * t * t  # of beta, Song 2021 eq. 33
    assert VPLinear().alpha(t) == pytest.approx(np.exp(-0.5 * integral), rel=1e-14)
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731  Nichol 2021 eq. 17
    assert Cosine().alpha(t) ** 2 == pytest.approx(f(t) / f(0), rel=1e-14)
    assert (Cosine(s=0.0).alpha(t), Cosine(s=0.0).sigma(t)) == pytest.approx(
        (np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)), rel=1e-14
    )


def test_trigonometric_is_the_cosine_path_without_its_offset():
    t = np.linspace(0, 1, 17)
    for mine, other in zip(Trigonometric().coefficients(t), Cosine(s=0.0).coefficients(t), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("start, end, tau", [(-3, 3, 1.0), (-3, 3, 0.9), (0, 3, 0.3), (-1, 2, 5.0)])
def test_sigmoid_is_the_papers_gamma(start, end, tau):
    """Jabri 2022: gamma(t), which is alpha^2."""
    t, logistic = np.linspace(0, 1, 17), lambda u: 1 / (1 + np.exp(-u))
    low, high = logistic(start / tau), logistic(end / tau)
    gamma = (high - logistic((t * (end - start) + start) / tau)) / (high - low)
    path = Sigmoid(start, end, tau)
    np.testing.assert_allclose(path.alpha(t) ** 2, gamma, rtol=1e-9, atol=1e-14)
    assert path.d_alpha(1.0) == -np.inf and path.d_sigma(0.0) == np.inf


@pytest.mark.parametrize(
    "path, betas",
    [
        (DDPMLinear(), np.linspace(1e-4, 0.02, 1000)),
        (ScaledLinear(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
        (DDPMLinear(0.01, 0.5, 20), np.linspace(0.01, 0.5, 20)),
        (DDPMSigmoid(0.001, 0.3, 30), 0.299 / (np.exp(-np.linspace(-6, 6, 30)) + 1) + 0.001),
        (DDPMCosine(0.01, 10, 0.9), np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.9)),
    ],
    ids=repr,
)
def test_discrete_paths_hit_the_training_steps(path, betas):
    n = np.arange(len(betas))
    t = (n + 1) / len(betas)
    np.testing.assert_allclose(path.alpha(t) ** 2, np.cumprod(1 - betas), rtol=1e-11)
    np.testing.assert_allclose(path.model_time(t), n, atol=1e-10)
    # at a training step the derivative is that of the interval on its left
    left = np.log(np.cumprod(1 - betas))
    left = 0.5 * np.diff(np.concatenate([[0], left])) * len(betas)
    np.testing.assert_allclose(path.d_alpha(t) / path.alpha(t), left, rtol=1e-9)


@pytest.mark.parametrize("base", [ScaledLinear(), DDPMLinear(0.01, 0.5, 20)], ids=repr)
def test_zero_terminal_snr_is_the_papers_algorithm(base):
    """Lin 2024, Alg. 1: shift sqrt(alpha bar) to 0 at the last step, scale it back at the first."""
    root = np.sqrt(np.cumprod(1 - base.betas))
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    path, t = ZeroTerminalSNR(base), (np.arange(len(root)) + 1) / len(root)
    np.testing.assert_allclose(path.alpha(t), expected, rtol=1e-11, atol=1e-16)
    assert path.alpha(1.0) == 0.0 and path.log_snr(1.0) == -np.inf and path.alpha(t[0]) == pytest.approx(root[0])
    np.testing.assert_allclose(np.sqrt(np.cumprod(1 - path.betas)), expected, rtol=1e-10, atol=1e-15)
    left = np.diff(np.concatenate([[1.0], expected])) * len(root)
    np.testing.assert_allclose(path.d_alpha(t), left, rtol=1e-9)
    np.testing.assert_allclose(path.model_time(t), np.arange(len(root)), atol=1e-10)


def test_discrete_inverse_says_when_a_level_is_never_reached():
    path = ScaledLinear()
    assert np.isnan(path.t_of_log_snr(path.log_snr(1.0) - 0.1))
    assert path.t_of_log_snr(path.log_snr(1.0)) == 1.0


def test_derivatives_at_the_data_end():
    assert VPLinear().d_sigma(0.0) == np.inf and Cosine().d_sigma(0.0) == np.inf
    assert Cosine(s=0.0).d_sigma(0.0) == pytest.approx(np.pi / 2)


@pytest.mark.parametrize("t", [-0.01, 1.01, np.nan, np.array([0.5, 2.0])], ids=str)
@pytest.mark.parametrize("path", ALL, ids=repr)
def test_times_outside_are_refused(path, t):
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        path.coefficients(t)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPLinear(0.0, 1.0),
        lambda: VPLinear(2.0, 1.0),
        lambda: Cosine(-0.1),
        lambda: Cosine(1.0),
        lambda: EDM(0.0),
        lambda: EDM(np.inf),
        lambda: VE(0.0, 1.0),
        lambda: VE(2.0, 1.0),
        lambda: DDPMLinear(0.1, 1.0),
        lambda: ScaledLinear(num_timesteps=0),
        lambda: ScaledLinear(num_timesteps=10.5),
        lambda: DDPMCosine(1.0),
        lambda: DDPMCosine(beta_max=1.0),
        lambda: DDPMCosine(num_timesteps=0),
        lambda: DDPMSigmoid(0.02, 0.01),
        lambda: DDPMSigmoid(num_timesteps=0),
        lambda: Sigmoid(3.0, -3.0),
        lambda: Sigmoid(tau=0.0),
        lambda: Sigmoid(end=np.inf),
        lambda: ZeroTerminalSNR(Cosine()),
        lambda: ZeroTerminalSNR(DDPMLinear(num_timesteps=1)),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match="must be|needs"):
        make()


def test_paths_are_values():
    assert VPLinear() == VPLinear(0.1, 20.0) and hash(ScaledLinear()) == hash(ScaledLinear())
    with pytest.raises(AttributeError):
        VPLinear().beta_min = 1.0
