import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genengine.paths import EDM, VE, Cosine, DDPMLinear, RectifiedFlow, ScaledLinear, VPLinear
from genengine.prediction import PREDICTIONS, target, to_eps, to_velocity, to_x0

PATHS = [RectifiedFlow(), VPLinear(), Cosine(), DDPMLinear(), ScaledLinear(), EDM(3.0), VE(0.01, 5.0)]
number = st.floats(-3, 3)


def output(prediction, x0, eps, alpha, sigma, d_alpha, d_sigma):
    """What a perfect network would say, from the definitions."""
    return {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "velocity": d_alpha * x0 + d_sigma * eps,
        "score": -eps / sigma if sigma else np.nan,
    }[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=repr)
@given(t=st.floats(0.02, 0.98), x0=number, eps=number)
def test_pairs_recover_everything(prediction, path, t, x0, eps):
    alpha, sigma, d_alpha, d_sigma = c = path.coefficients(t)
    x, out = alpha * x0 + sigma * eps, output(prediction, x0, eps, *c)
    velocity = d_alpha * x0 + d_sigma * eps
    # solving for x0 amplifies rounding by sigma/alpha (up to 140), for eps by alpha/sigma (up to 100)
    scale = 1e-12 * (1 + sigma / alpha + alpha / sigma)
    for convert, expected, size in (
        (to_x0, x0, 1),
        (to_eps, eps, 1),
        (to_velocity, velocity, abs(d_alpha) + d_sigma),
    ):
        p, q = convert(prediction, *c)
        assert p * x + q * out == pytest.approx(expected, abs=scale * size * 10)
    c_x0, c_eps = target(prediction, *c)
    assert c_x0 * x0 + c_eps * eps == pytest.approx(out, rel=1e-12, abs=1e-12)


def test_definition_has_v_orthogonal_to_x_on_vp_paths():
    alpha, sigma, d_alpha, d_sigma = VPLinear().coefficients(0.4)
    c_x0, c_eps = target("v", alpha, sigma, d_alpha, d_sigma)
    assert c_x0 * alpha + c_eps * sigma == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("x0, eps", [(0.7, -1.2), (0.0, 1.0)])
def test_finite_ends_of_rectified_flow(x0, eps):
    path = RectifiedFlow()
    for t in (0.0, 1.0):
        c = path.coefficients(t)
        x = (1 - t) * x0 + t * eps
        for prediction in ("v", "velocity"):
            out = output(prediction, x0, eps, *c)
            for convert, expected in ((to_x0, x0), (to_eps, eps), (to_velocity, eps - x0)):
                p, q = convert(prediction, *c)
                assert p * x + q * out == pytest.approx(expected, abs=1e-15)
    assert to_x0("velocity", *path.coefficients(1.0)) == (1.0, -1.0)  # x0 = x - t out
    assert to_x0("eps", *path.coefficients(0.0)) == (1.0, 0.0)  # x0 = x
    assert to_x0("score", *path.coefficients(0.0)) == (1.0, 0.0)
    assert to_eps("x0", *path.coefficients(1.0)) == (1.0, 0.0)  # eps = x
    assert to_velocity("x0", *path.coefficients(1.0)) == (1.0, -1.0)


@pytest.mark.parametrize(
    "convert, prediction, path, t, message",
    [
        (
            to_x0,
            "eps",
            RectifiedFlow(),
            1.0,
            "needs alpha > 0, got alpha = 0 at t = 1.0; start the grid below",
        ),
        (to_x0, "score", Cosine(), 1.0, "needs alpha > 0"),
        (to_velocity, "eps", Cosine(), 1.0, "needs alpha > 0"),
        (to_eps, "x0", RectifiedFlow(), 0.0, "needs sigma > 0, got sigma = 0 at t = 0.0; keep t above"),
        (to_velocity, "x0", EDM(), 0.0, "needs sigma > 0"),
        (to_velocity, "v", VPLinear(), 0.0, "needs finite derivatives .* at t = 0.0"),
        (to_x0, "velocity", VPLinear(), 0.0, "needs finite derivatives"),
        (to_eps, "velocity", VPLinear(), 0.0, "needs finite derivatives"),
        (target, "velocity", VPLinear(), 0.0, "needs finite derivatives"),
        (target, "score", EDM(), 0.0, "needs sigma > 0"),
    ],
)
def test_singular_ends_are_refused(convert, prediction, path, t, message):
    with pytest.raises(ValueError, match=f"prediction '{prediction}': {message}"):
        convert(prediction, *path.coefficients(t), t=t)


@pytest.mark.parametrize("convert", [to_x0, to_eps, to_velocity, target])
def test_unknown_prediction(convert):
    with pytest.raises(ValueError, match="prediction must be one of .* got 'noise'"):
        convert("noise", 0.5, 0.5, -1.0, 1.0)


@pytest.mark.parametrize("convert", [to_x0, to_eps, to_velocity, target])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_arrays_give_pairs_of_their_shape(convert, prediction):
    t = np.array([0.2, 0.5, 0.9])
    pair = convert(prediction, *VPLinear().coefficients(t))
    for k in range(3):
        one = convert(prediction, *VPLinear().coefficients(t[k]))
        np.testing.assert_allclose([c[k] for c in pair], one, rtol=1e-14)
    assert all(np.shape(c) == (3,) for c in pair)
    with pytest.raises(ValueError, match="alpha = 0|alpha = \\["):
        to_x0("eps", np.array([1.0, 0.0]), np.array([0.0, 1.0]), -np.ones(2), np.ones(2))
