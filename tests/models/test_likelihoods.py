"""Likelihoods of discrete pixels: they sum to one, match their formulas in float64, and are sampled as they say."""

import math

import numpy as np
import pytest
import torch

from genengine.models import likelihoods

LEVELS = 7
EXACT = ("logistic", "mixture", "gaussian", "categorical", "binomial")


def maps_of(pixels, b=3, size=2, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(b, pixels.num_maps(), size, size, generator=generator)


def values():
    return likelihoods.level_value(torch.arange(LEVELS), LEVELS)


def probabilities(pixels, maps):
    """P(level) of single-pixel, single-channel maps (B, P, 1, 1): (B, L)."""
    rows = [pixels.log_prob(maps, v.expand(len(maps), 1, 1, 1)) for v in values()]
    return torch.stack(rows, 1).exp()


def sigmoid(v):
    return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def textbook(name, p, level):
    """P(level) of one pixel from its parameters p, in float64 and the words of the definitions."""
    v, h, last = 2 * level / (LEVELS - 1) - 1, 1 / (LEVELS - 1), level == LEVELS - 1

    def binned(cdf):
        return (1.0 if last else cdf(v + h)) - (0.0 if level == 0 else cdf(v - h))

    if name == "logistic":
        return binned(lambda x: sigmoid((x - p[0]) * math.exp(-p[1])))
    if name == "gaussian":
        return binned(lambda x: 0.5 * math.erfc(-(x - p[0]) * math.exp(-p[1]) / math.sqrt(2)))
    if name == "mixture":  # two components: logits, means, log-scales
        weights = np.exp(p[:2]) / np.exp(p[:2]).sum()
        return sum(w * binned(lambda x, m=m, s=s: sigmoid((x - m) * math.exp(-s)))
                   for w, m, s in zip(weights, p[2:4], p[4:6], strict=True))  # fmt: skip
    if name == "categorical":
        return math.exp(p[level]) / sum(math.exp(q) for q in p)
    trials = LEVELS - 1
    return math.comb(trials, level) * sigmoid(p[0]) ** level * sigmoid(-p[0]) ** (trials - level)


@pytest.mark.parametrize("name", EXACT)
def test_log_prob_is_the_formula_and_sums_to_one(name):
    pixels = likelihoods.build(name, 1, LEVELS, 2)
    maps = maps_of(pixels, b=5, size=1)
    found = probabilities(pixels, maps).double()
    torch.testing.assert_close(found.sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-5, atol=0)
    expected = [[textbook(name, row.flatten().double().numpy(), i) for i in range(LEVELS)] for row in maps]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_the_mean_is_that_of_the_levels(name):
    pixels = likelihoods.build(name, 1, LEVELS, 2)
    maps = maps_of(pixels, b=5, size=1)
    expected = probabilities(pixels, maps) @ values()
    torch.testing.assert_close(pixels.mean(maps).flatten(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_samples_have_the_probabilities(name):
    pixels = likelihoods.build(name, 1, LEVELS, 2)
    maps, num = maps_of(pixels, b=1, size=1, seed=3), 20000
    drawn = pixels.sample(maps.expand(num, -1, -1, -1).contiguous(), seed=5).flatten()
    levels = likelihoods.level_index(drawn, LEVELS)
    assert torch.equal(likelihoods.level_value(levels, LEVELS), drawn)  # on the levels, to the bit
    share = torch.bincount(levels, minlength=LEVELS) / num
    p = probabilities(pixels, maps)[0]
    assert ((share - p).abs() < 5 * (p * (1 - p) / num).sqrt() + 1e-4).all()  # five standard errors


@pytest.mark.parametrize("name", likelihoods.NAMES)
def test_samples_are_functions_of_seed_sample_and_step(name):
    pixels = likelihoods.build(name, 3, LEVELS, 2)
    maps = maps_of(pixels, b=4)
    ids = torch.tensor([9, 4, 70, 1])
    whole = pixels.sample(maps, seed=1, sample_ids=ids, step=2)
    assert whole.shape == (4, 3, 2, 2) and whole.abs().max() <= 1
    assert torch.equal(whole[1:3], pixels.sample(maps[1:3].contiguous(), seed=1, sample_ids=ids[1:3], step=2))
    assert not torch.equal(whole, pixels.sample(maps, seed=1, sample_ids=ids, step=3))
    assert pixels.mean(maps).shape == whole.shape and pixels.log_prob(maps, whole).shape == (4,)


@pytest.mark.parametrize("name", ("logistic", "gaussian", "categorical", "binomial"))
def test_channels_and_pixels_add_up(name):
    """Three channels of 2 x 2 pixels are twelve single pixels, wherever the maps of a channel lie."""
    pixels, single = likelihoods.build(name, 3, LEVELS), likelihoods.build(name, 1, LEVELS)
    maps = maps_of(pixels, b=2)
    x = likelihoods.level_value(torch.arange(24).view(2, 3, 2, 2) % LEVELS, LEVELS)
    per = maps.unflatten(1, (pixels.num_maps() // 3, 3))
    expected = sum(single.log_prob(per[:, :, c], x[:, c : c + 1]) for c in range(3))
    torch.testing.assert_close(pixels.log_prob(maps, x), expected, rtol=1e-5, atol=1e-5)


def test_a_mixtures_channels_lean_on_those_before():
    """The mean of a coupled channel moves by tanh(coupling) times the one before."""
    pixels = likelihoods.build("mixture", 2, 257, 1)
    maps = torch.tensor([0.0, 0.5, -0.2, -4.0, -4.0, 0.7]).view(1, 6, 1, 1)
    expected = torch.tensor([0.5, -0.2 + math.tanh(0.7) * 0.5])
    torch.testing.assert_close(pixels.mean(maps).flatten(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", likelihoods.NAMES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradients_are_finite_far_out(name, scale):
    pixels = likelihoods.build(name, 1, 256, 3)
    maps = maps_of(pixels, b=4, size=4, scale=scale).requires_grad_()
    x = torch.linspace(-1, 1, 64).view(4, 1, 4, 4)
    log_p = pixels.log_prob(maps, x)
    log_p.sum().backward()
    assert torch.isfinite(log_p).all() and torch.isfinite(maps.grad).all() and maps.grad.abs().max() > 0
    assert (log_p < 0).all()


def test_a_gaussians_gradient_is_that_of_the_formula():
    pixels = likelihoods.build("gaussian", 1, LEVELS)
    maps = maps_of(pixels, b=6, size=1).requires_grad_()
    x = values()[:6].view(6, 1, 1, 1)
    pixels.log_prob(maps, x).sum().backward()
    for row, level, grad in zip(maps.detach().double(), range(6), maps.grad.double(), strict=True):
        p, h = row.flatten().numpy(), 1e-5
        for i in range(2):
            step = h * np.eye(2)[i]
            slope = math.log(textbook("gaussian", p + step, level)) - math.log(textbook("gaussian", p - step, level))
            assert abs(slope / (2 * h) - grad.flatten()[i].item()) < 1e-3 * (1 + abs(slope / (2 * h)))


def test_binary_pixels():
    bernoulli, binomial = likelihoods.build("bernoulli", 1, 2), likelihoods.build("binomial", 1, 2)
    maps = maps_of(bernoulli, b=4)
    x = bernoulli.sample(maps, seed=0)
    assert bernoulli.exact and set(x.unique().tolist()) == {-1.0, 1.0}
    p = torch.sigmoid(maps.double())
    expected = torch.where(x > 0, p, 1 - p).log().flatten(1).sum(1)
    for pixels in (bernoulli, binomial):
        torch.testing.assert_close(pixels.log_prob(maps, x).double(), expected, rtol=1e-5, atol=1e-6)
    grey = likelihoods.build("bernoulli", 1, 3)
    assert not grey.exact
    torch.testing.assert_close(grey.log_prob(maps, torch.zeros(4, 1, 2, 2)).double(),
                               (0.5 * (p.log() + (1 - p).log())).flatten(1).sum(1), rtol=1e-5, atol=1e-6)  # fmt: skip


def test_bad_likelihoods_are_refused():
    for arguments, message in (
        (("poisson", 1, 4), "name must be one of logistic"),
        (("mixture", 1, 4, 0), "components must be an int >= 1"),
        (("logistic", 5, 4), "1 to 4 channels, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            likelihoods.build(*arguments)
