import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genengine import schedules
from genengine.paths import EDM, VE, Cosine, RectifiedFlow, ScaledLinear, Sigmoid, Trigonometric, VPLinear

GRIDS = [
    schedules.uniform, schedules.karras, schedules.shifted, schedules.logit_normal, schedules.exponential,
    schedules.beta, schedules.linspace, schedules.trailing,
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_every_grid_falls_from_noise_to_data(grid, num_steps):
    t = grid(num_steps)
    assert t.shape == (num_steps + 1,) and t.dtype == np.float64
    assert t[0] == 1.0 and t[-1] == 0.0 and np.all(np.diff(t) < 0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("num_steps", [0, -3, 2.5, True])
def test_bad_num_steps(grid, num_steps):
    with pytest.raises(ValueError, match=f"{grid.__name__}: num_steps must be a whole number above 0, got"):
        grid(num_steps)


def test_uniform():
    np.testing.assert_allclose(schedules.uniform(4, 0.9, 0.1), [0.9, 0.7, 0.5, 0.3, 0.1], rtol=1e-14)
    for ends in ((0.5, 0.5), (0.2, 0.8), (1.1, 0.0), (1.0, -0.1), (np.nan, 0.0)):
        with pytest.raises(ValueError, match="fall strictly"):
            schedules.uniform(4, *ends)


def test_karras_matches_the_formula():
    sigma = schedules.karras(5, sigma_min=0.01, sigma_max=10.0, rho=5.0) * 10.0
    expected = [(10 ** (1 / 5) + i / 4 * (0.01 ** (1 / 5) - 10 ** (1 / 5))) ** 5 for i in range(5)] + [0.0]
    np.testing.assert_allclose(sigma, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "path, sigma_max",
    [
        (EDM(), 80.0),
        (VE(0.001, 80.0), 80.0),
        (VPLinear(), 100.0),
        (Cosine(), 80.0),
        (RectifiedFlow(), 80.0),
        (ScaledLinear(), float(np.exp(-0.5 * ScaledLinear().log_snr(1.0)))),
    ],
    ids=repr,
)
def test_karras_on_a_path_has_the_same_noise_levels(path, sigma_max):
    t = schedules.karras(8, 0.03, sigma_max, path=path)
    ratio = np.exp(-0.5 * path.log_snr(t[:-1]))
    np.testing.assert_allclose(ratio, schedules.karras(8, 0.03, sigma_max)[:-1] * sigma_max, rtol=1e-9)
    assert t[-1] == 0.0


def test_karras_refuses():
    for arguments in ({"sigma_min": 0.0}, {"sigma_min": 90.0}, {"rho": 0.0}, {"sigma_max": np.inf}):
        with pytest.raises(ValueError, match="karras: needs"):
            schedules.karras(4, **arguments)
    with pytest.raises(ValueError, match="does not reach every noise level"):
        schedules.karras(4, path=ScaledLinear())
    with pytest.raises(ValueError, match="does not reach every noise level"):
        schedules.karras(4, path=VE(sigma_min=0.01, sigma_max=80.0))


def test_exponential_is_even_in_log_sigma():
    t = schedules.exponential(6, 0.02, 50.0)
    np.testing.assert_allclose(t[:-1] * 50.0, np.geomspace(50.0, 0.02, 6), rtol=1e-12)
    path = VPLinear()
    t = schedules.exponential(6, 0.02, 50.0, path=path)
    np.testing.assert_allclose(np.exp(-0.5 * path.log_snr(t[:-1])), np.geomspace(50.0, 0.02, 6), rtol=1e-9)
    for arguments in ({"sigma_min": 0.0}, {"sigma_min": 90.0}, {"sigma_max": np.inf}):
        with pytest.raises(ValueError, match="exponential: needs"):
            schedules.exponential(4, **arguments)
    with pytest.raises(ValueError, match="exponential: the path does not reach every noise level"):
        schedules.exponential(4, path=ScaledLinear())


@pytest.mark.parametrize("path", [VPLinear(), Cosine(), RectifiedFlow(), Trigonometric(), VE(), Sigmoid()], ids=repr)
def test_log_snr_is_even_in_the_log_snr_of_the_path(path):
    t = schedules.log_snr(7, path, 0.99, 0.01)
    assert t[0] == 0.99 and t[-1] == 0.01
    steps = np.diff(path.log_snr(t))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-9)


def test_log_snr_refuses():
    for path, ends in ((RectifiedFlow(), ()), (VPLinear(), (1.0, 0.0))):
        with pytest.raises(ValueError, match="log_snr: the path's log-SNR must be finite at t_max=1.0 and t_min="):
            schedules.log_snr(4, path, *ends)
    with pytest.raises(ValueError, match="log_snr: times must fall strictly"):
        schedules.log_snr(4, VPLinear(), 0.2, 0.8)


def test_training_step_grids_are_the_papers_tables():
    """Lin 2024, table 2: the steps of T = 1000 that ten samples take, counted from 1; and Stable Diffusion's offset."""
    steps = lambda t: np.round(t[:-1] * 1000).astype(int).tolist()  # noqa: E731
    assert steps(schedules.leading(10)) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert steps(schedules.linspace(10)) == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert steps(schedules.trailing(10)) == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert steps(schedules.leading(4, steps_offset=1)) == [752, 502, 252, 2]
    assert steps(schedules.trailing(3)) == [1000, 667, 333]
    assert schedules.leading(3, 10)[:-1].tolist() == [0.7, 0.4, 0.1]
    assert schedules.leading(1)[0] == 0.001 and schedules.linspace(1)[0] == 1.0


@pytest.mark.parametrize("grid", [schedules.linspace, schedules.leading, schedules.trailing])
def test_training_step_grids_use_every_step_at_most(grid):
    np.testing.assert_allclose(grid(20, 20), schedules.uniform(20), rtol=1e-14)
    for num_timesteps in (7, 10.5):
        with pytest.raises(ValueError, match=f"{grid.__name__}: num_steps must be at most num_timesteps"):
            grid(8, num_timesteps)
    with pytest.raises(ValueError, match="leading: num_steps must be a whole number"):
        schedules.leading(0)


def test_leading_refuses_an_offset_beyond_the_last_step():
    assert schedules.leading(4, 10, 3)[0] == 1.0
    for offset in (4, -1, 0.5):
        with pytest.raises(ValueError, match="steps_offset must be a whole number from 0 to 3 here"):
            schedules.leading(4, 10, offset)


def test_beta_has_the_closed_forms():
    u = np.arange(9, -1, -1) / 9
    np.testing.assert_allclose(schedules.beta(9, 0.5, 0.5), np.sin(np.pi / 2 * u) ** 2, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedules.beta(9, 1.0, 1.0), u, rtol=1e-12)
    np.testing.assert_allclose(schedules.beta(9, 0.3, 1.0), u ** (1 / 0.3), rtol=1e-12)
    np.testing.assert_allclose(schedules.beta(9, 1.0, 4.0), 1 - (1 - u) ** 0.25, rtol=1e-12, atol=1e-15)
    t = schedules.beta(9, 2.0, 2.0)
    np.testing.assert_allclose(t * t * (3 - 2 * t), u, rtol=1e-12)
    np.testing.assert_allclose(schedules.beta(9, t_max=0.9, t_min=0.1), 0.1 + 0.8 * schedules.beta(9), rtol=1e-14)


@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.1, 3.0), (20.0, 0.7), (150.0, 900.0)])
def test_beta_quantiles_are_scipys(a, b):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    u = np.arange(50, -1, -1) / 50
    np.testing.assert_allclose(schedules.beta(50, a, b), stats.beta.ppf(u, a, b), rtol=1e-9, atol=1e-300)


def test_beta_refuses():
    for a, b in ((0.0, 1.0), (1.0, -1.0), (np.inf, 1.0), (1.0, np.nan)):
        with pytest.raises(ValueError, match="beta: a and b must be finite numbers above 0"):
            schedules.beta(4, a, b)
    with pytest.raises(ValueError, match="beta: times must fall strictly"):
        schedules.beta(4, t_max=1.1)


def test_shifted_dynamic():
    """Esser 2024 with Flux's constants: mu .5 at 256 tokens, 1.15 at 4096; sigma' = e^mu/(e^mu + 1/sigma - 1)."""
    assert schedules.shift_mu(256) == 0.5 and schedules.shift_mu(4096) == pytest.approx(1.15, rel=1e-14)
    mu, u = schedules.shift_mu(1024), schedules.uniform(7)[:-1]
    assert mu == pytest.approx(0.5 + 0.65 * 768 / 3840, rel=1e-14)
    t = schedules.shifted_dynamic(7, mu)
    np.testing.assert_allclose(t[:-1], np.exp(mu) / (np.exp(mu) + (1 / u - 1)), rtol=1e-13)
    assert t[-1] == 0.0
    np.testing.assert_allclose(schedules.shifted_dynamic(7, mu, "linear"), schedules.shifted(7, mu), rtol=1e-14)
    assert schedules.shift_mu(3, 0.0, 1.0, 1, 5) == 0.5


def test_shifted_dynamic_refuses():
    for arguments, message in (
        ((1.0, "square"), "form must be 'exponential' or 'linear', got 'square'"),
        ((np.nan,), "mu must be a finite number, got nan"),
        ((0.0, "linear"), "mu must be a finite number above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"shifted_dynamic: {message}"):
            schedules.shifted_dynamic(4, *arguments)
    with pytest.raises(ValueError, match="shifted_dynamic: num_steps must be"):
        schedules.shifted_dynamic(0, 1.0)
    for arguments in ((0,), (256, 0.5, 1.15, 8, 8)):
        with pytest.raises(ValueError, match="shift_mu: image_seq_len must be above 0"):
            schedules.shift_mu(*arguments)


def test_shifted():
    np.testing.assert_allclose(schedules.shifted(4, 3.0), [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-14)
    np.testing.assert_allclose(schedules.shifted(9, 1.0), schedules.uniform(9), rtol=1e-14)
    for shift in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="shift must be"):
            schedules.shifted(4, shift)


def test_logit_normal_grid_is_the_quantiles():
    t = schedules.logit_normal(8, mean=0.4, std=0.7)
    z = np.random.default_rng(0).standard_normal(200_000)
    draws = schedules.logit_normal_times(z, 0.4, 0.7)
    # a quantile estimate errs by sqrt(u(1-u)/n)/density, below 0.003 here
    np.testing.assert_allclose(t[1:-1], np.quantile(draws, np.arange(7, 0, -1) / 8), atol=0.01)
    assert schedules.logit_normal(2)[1] == 0.5
    with pytest.raises(ValueError, match="std > 0"):
        schedules.logit_normal(4, std=0.0)


@given(st.floats(0.001, 0.999), st.floats(0.1, 20.0))
def test_shift_is_undone_by_its_inverse(u, shift):
    t = schedules.shifted_times(u, shift)
    assert 0 < t < 1
    assert schedules.shifted_times(t, 1 / shift) == pytest.approx(u, rel=1e-12)
    # the shift divides the signal-to-noise ratio (1-t)/t of a rectified flow by `shift`
    assert (1 - t) / t == pytest.approx((1 - u) / u / shift, rel=1e-9)


@given(st.floats(-6, 6), st.floats(-2, 2), st.floats(0.1, 2))
def test_logit_normal_times_invert_to_the_normal_number(z, mean, std):
    t = schedules.logit_normal_times(z, mean, std)
    assert 0 < t < 1
    assert np.log(t / (1 - t)) == pytest.approx(mean + std * z, rel=1e-9, abs=1e-9)


def test_times_keep_shape_and_dtype():
    u = np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
    for times in (schedules.uniform_times, schedules.logit_normal_times, schedules.shifted_times):
        assert times(u).shape == (2, 3) and times(u).dtype == np.float32
    np.testing.assert_allclose(schedules.uniform_times(np.array([0.0, 0.5, 1.0]), 0.2, 0.8), [0.2, 0.5, 0.8])
    with pytest.raises(ValueError, match="uniform_times"):
        schedules.uniform_times(u, 0.5, 0.5)
