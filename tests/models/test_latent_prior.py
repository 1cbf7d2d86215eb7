"""Mixtures of Gaussians: densities, expectation-maximisation on a known mixture, draws."""

import math

import pytest
import torch

from genengine.models import latent_prior
from genengine.models.latent_prior import MixturePrior


def known_mixture(num=6000):
    """Points of two known, correlated Gaussians, and their parameters."""
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[2.0, -1.0], [-1.0, 1.5]], dtype=torch.float64)
    factors = torch.tensor([[[0.6, 0.0], [0.3, 0.4]], [[1.0, 0.0], [-0.5, 0.8]]], dtype=torch.float64)
    k = (torch.rand(num) > 0.3).long()
    eps = torch.randn(num, 2, dtype=torch.float64)
    return means[k] + torch.einsum("nde,ne->nd", factors[k], eps), weights, means, factors


def test_densities_are_those_of_torch():
    z, _, means, factors = known_mixture(20)
    found = latent_prior.component_log_prob(z, means, factors)
    for k in range(2):
        expected = torch.distributions.MultivariateNormal(means[k], scale_tril=factors[k]).log_prob(z)
        torch.testing.assert_close(found[:, k], expected)


def test_em_finds_a_known_mixture():
    z, weights, means, factors = known_mixture()
    w, m, f = latent_prior.em_fit(z, 2, seed=1)
    order = m[:, 0].argsort(descending=True)
    w, m, f = w[order], m[order], f[order]
    torch.testing.assert_close(w, weights, rtol=0, atol=0.03)
    torch.testing.assert_close(m, means, rtol=0, atol=0.1)
    torch.testing.assert_close(f @ f.mT, factors @ factors.mT, rtol=0, atol=0.1)


def test_em_climbs_and_ends_where_its_step_changes_nothing():
    z, *_ = known_mixture(800)
    heights = []
    for iterations in (1, 2, 4, 8, 400):
        w, m, f = latent_prior.em_fit(z, 3, seed=0, iterations=iterations, tolerance=1e-12, floor=0.0)
        heights.append(torch.logsumexp(w.log() + latent_prior.component_log_prob(z, m, f), 1).mean().item())
    assert all(b >= a - 1e-9 for a, b in zip(heights[:-1], heights[1:], strict=True)) and heights[-1] > heights[0]
    r = torch.softmax(w.log() + latent_prior.component_log_prob(z, m, f), 1)  # the textbook step from there
    torch.testing.assert_close((r.T @ z) / r.sum(0)[:, None], m, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(r.mean(0), w, rtol=1e-3, atol=1e-3)


def test_one_component_has_the_moments_of_the_points():
    z, *_ = known_mixture(500)
    w, m, f = latent_prior.em_fit(z, 1, floor=0.0)
    assert w.item() == 1.0
    torch.testing.assert_close(m[0], z.mean(0))
    torch.testing.assert_close(f[0] @ f[0].T, torch.cov(z.T, correction=0))
    _, _, diagonal = latent_prior.em_fit(z, 1, covariance="diag", floor=0.0)
    torch.testing.assert_close(diagonal[0], z.std(0, correction=0).diag())


def test_a_fit_is_a_function_of_its_arguments():
    z, *_ = known_mixture(300)
    first = latent_prior.em_fit(z, 4, seed=3)
    torch.manual_seed(9)
    again = latent_prior.em_fit(z, 4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_repeated_points_do_not_break_it():
    z = torch.zeros(50, 3)
    w, m, f = latent_prior.em_fit(z, 4)
    assert torch.isfinite(w).all() and torch.isfinite(m).all() and torch.isfinite(f).all()
    with pytest.raises(ValueError, match=r"components must be 1 \.\. 50"):
        latent_prior.em_fit(z, 51)
    with pytest.raises(ValueError, match="covariance must be one of full, diag"):
        latent_prior.em_fit(z, 2, covariance="tied")


def fitted(classes=2):
    prior = MixturePrior(classes, 3, 2)
    assert not prior.fitted
    z, *_ = known_mixture(400)
    labels = torch.arange(400) % classes
    prior.fit(z + 5 * labels[:, None], labels if classes > 1 else None, covariance="full", seed=0)
    assert prior.fitted
    return prior


def test_log_prob_and_draws_agree():
    prior, num = fitted(), 20000
    labels = torch.arange(num) % 2
    z = prior.sample(num, labels, seed=1)
    grid = torch.linspace(-8, 16, 200)
    points = torch.cartesian_prod(grid, grid)
    cell = (grid[1] - grid[0]).item() ** 2
    for y in range(2):
        log_p = prior.log_prob(points, torch.full((len(points),), y))
        density = log_p.exp() * cell
        assert abs(density.sum() - 1) < 0.01
        mean = (density[:, None] * points).sum(0)
        torch.testing.assert_close(z[labels == y].mean(0), mean, rtol=0, atol=0.06)
        entropy = -(density * log_p).sum()
        assert abs(prior.log_prob(z[labels == y], labels[labels == y]).mean() + entropy) < 0.05


def test_draws_do_not_depend_on_the_batch_and_scale_with_temperature():
    prior = fitted()
    labels = torch.tensor([0, 1, 1, 0])
    ids = torch.tensor([5, 2, 90, 4])
    whole = prior.sample(4, labels, seed=1, sample_ids=ids)
    torch.testing.assert_close(prior.sample(1, labels[2:3], seed=1, sample_ids=ids[2:3]), whole[2:3])
    centres = prior.sample(4, labels, seed=1, sample_ids=ids, temperature=0.0)
    half = prior.sample(4, labels, seed=1, sample_ids=ids, temperature=0.5)
    torch.testing.assert_close(half, 0.5 * (whole + centres))
    assert all((prior.means[y] == centre).all(1).any() for y, centre in zip(labels, centres, strict=True))


def test_more_components_than_points_of_a_class():
    prior = MixturePrior(2, 5, 2)
    z = torch.randn(23, 2)
    labels = (torch.arange(23) < 3).long()
    prior.fit(z, labels, covariance="diag", seed=0)
    assert (prior.weights[1, 3:] == 0).all() and math.isclose(prior.weights[1].sum(), 1, rel_tol=1e-6)
    assert torch.isfinite(prior.log_prob(z, labels)).all()
    with pytest.raises(ValueError, match="got none of class 1"):
        prior.fit(z, torch.zeros(23, dtype=torch.int64), covariance="diag", seed=0)
