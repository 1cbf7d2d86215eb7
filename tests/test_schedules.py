import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genengine import schedules
from genengine.paths import EDM, VE, Cosine, RectifiedFlow, ScaledLinear, VPLinear

GRIDS = [schedules.uniform, schedules.karras, schedules.shifted, schedules.logit_normal]


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
