"""VAE: the loss is the paper's, bounds are bounds and converge, draws are functions, sampling is what it says."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from genengine import data, models, ops
from genengine.evaluate import evaluate_samples
from genengine.models import VAE
from genengine.models.latent_prior import MixturePrior
from genengine.nets.vae import VAEConfig
from genengine.train import STATE_FILE, Run, preset, train

SMALL = {"name": "vae", "image_size": 8, "in_channels": 1, "kind": "mlp", "widths": (24,), "latent_dim": 4,
         "num_classes": 3}  # fmt: skip
PRETRAINED = Path(models.__file__).resolve().parents[1] / "pretrained"


def model(seed=0, net=None, **options):
    """A small model with every weight at work."""
    vae = VAE.from_config({"family": "vae", "net": SMALL | (net or {}), "num_levels": 17, **options}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vae.net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vae


def batch(b=6, channels=1, size=8):
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 17, (b, channels, size, size), generator=generator)
    return levels / 8 - 1, torch.arange(b) % 3


# ---- training ----


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_the_loss_is_the_formula_and_differentiable(kl):
    vae = model(beta=0.7, warmup=10, kl=kl, net={"dropout": 0.3, "conditional": True})
    x0, labels = batch()
    ids = torch.tensor([5, 900, 3, 77, 1000, 2])
    terms = vae.terms(x0, labels, seed=9, sample_ids=ids, step=4)
    draw = {"seed": 9, "sample_ids": ids, "step": 4}
    masks = vae.net.dropout_masks(6, **draw)
    mean, logvar = vae.net.encode(x0, labels, masks)
    eps = ops.normal(mean.shape, stream="reparameterize", **draw)
    z = mean + (0.5 * logvar).exp() * eps
    nll = -vae.pixels.log_prob(vae.net.decode(z, labels, masks), x0).mean()
    if kl == "analytic":
        expected_kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()
    else:
        log_q = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(z).sum(1)
        expected_kl = (log_q - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)).mean()
    torch.testing.assert_close(terms["loss"], nll + 0.7 * 0.5 * expected_kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["kl"], expected_kl, rtol=1e-4, atol=1e-4)
    terms["loss"].backward()
    for name, parameter in vae.net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_the_kl_divergence_is_warmed_up():
    vae = model(warmup=4, beta=2.0).eval()
    x0, _ = batch()
    parts = [vae.terms(x0, seed=0, step=step) for step in (0, 1, 3, 50)]
    weights = [((t["loss"] - t["nll"]) / t["kl"]).item() for t in parts]
    assert weights == pytest.approx([0.5, 1.0, 2.0, 2.0], rel=1e-4)


def test_free_bits_cost_nothing_and_pull_nothing():
    x0, _ = batch()
    free = model(free_bits=1e4)
    terms = free.terms(x0, seed=0)
    assert terms["kl"].item() == pytest.approx(4 * 1e4)
    plain = model(beta=0.0)
    plain.loss(x0, seed=0).backward()
    terms["loss"].backward()
    for a, b in zip(free.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_same_arguments_give_the_same_loss():
    vae = model(net={"dropout": 0.2})
    torch.manual_seed(0)
    first = vae.loss(*batch(), seed=3, step=2)
    torch.manual_seed(1)
    assert torch.equal(first, vae.loss(*batch(), seed=3, step=2))
    assert not torch.equal(first, vae.loss(*batch(), seed=3, step=3))
    x0, labels = batch()
    assert torch.equal(first, vae.loss(x0, None, seed=3, step=2))  # an unconditional network looks at no labels
    conditional = model(net={"conditional": True})
    assert not torch.equal(conditional.loss(x0, labels, seed=3), conditional.loss(x0, labels.flip(0), seed=3))


@pytest.mark.parametrize("likelihood", ["mixture", "gaussian", "categorical", "binomial", "bernoulli"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_colour_every_likelihood_and_both_kinds(likelihood, kind):
    net = {"in_channels": 3, "kind": kind, "widths": (8, 8), "groups": 4}
    vae = model(net=net, likelihood=likelihood, components=2)
    x0, _ = batch(3, channels=3)
    vae.loss(x0, seed=0).backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.net.parameters())
    assert vae.sample(2, prior="normal").shape == (2, 3, 8, 8)
    assert vae.reconstruct(x0).shape == (3, 3, 8, 8)


# ---- bounds ----


class LinearGaussian(nn.Module):
    """z ~ N(0, 1), x = W z + sigma eps, with a posterior that is deliberately off."""

    def __init__(self, sigma=0.7):
        super().__init__()
        self.config = VAEConfig(image_size=2, in_channels=1, out_channels=2, kind="mlp", widths=(1,), latent_dim=3)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.sigma = sigma

    def encode(self, x, y=None, masks=None):
        w, flat = self.weight, x.flatten(1)
        precision = torch.eye(3) + w.T @ w / self.sigma**2
        mean = flat @ w @ torch.linalg.inv(precision) / self.sigma**2
        variance = torch.diagonal(torch.linalg.inv(precision))
        return mean + 0.3, (2.0 * variance).log().expand(len(x), -1)

    def decode(self, z, y=None, masks=None):
        return (z @ self.weight.T).view(-1, 1, 2, 2)

    def log_prob(self, maps, x):
        return torch.distributions.Normal(maps, self.sigma).log_prob(x).flatten(1).sum(1)


class Density:
    """Stands for a likelihood, but is a density, so that the marginal is known."""

    exact = True

    def __init__(self, net):
        self.log_prob = net.log_prob


def linear_gaussian(prior_factor=None):
    """The model, its mixture prior if asked for, and the exact log-marginal as a function."""
    net = LinearGaussian()
    vae = VAE(net, likelihood="logistic", prior_components=1)
    vae.pixels = Density(net)
    factor = torch.eye(3)
    if prior_factor is not None:
        factor = prior_factor
        net.prior = MixturePrior(1, 1, 3)
        net.prior.weights.fill_(1.0)
        net.prior.factors[0, 0] = factor
    w = net.weight.detach()
    covariance = w @ factor @ factor.T @ w.T + net.sigma**2 * torch.eye(4)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    return vae, lambda x: marginal.log_prob(x.flatten(1))


@pytest.mark.parametrize("factor", [None, torch.tensor([[0.8, 0, 0], [0.3, 1.1, 0], [-0.2, 0.1, 0.6]])])
def test_bounds_rise_to_the_known_marginal(factor):
    vae, log_marginal = linear_gaussian(factor)
    x = torch.randn(50, 1, 2, 2)
    exact = log_marginal(x)
    elbo = vae.log_prob(x, draws=400)
    bounds = [vae.iwae(x, k=k) for k in (1, 10, 4000)]
    gaps = [(exact - b).mean().item() for b in (elbo, *bounds)]
    assert gaps[0] > 0.2  # the posterior is off, so there is a gap to close
    assert gaps[1] == pytest.approx(gaps[0], rel=0.5) and gaps[2] < 0.6 * gaps[0] and abs(gaps[3]) < 0.05 * gaps[0]
    assert (exact - elbo > -0.1).all()
    torch.testing.assert_close(bounds[2], exact, rtol=0, atol=0.15)


def test_the_elbo_is_its_definition():
    """E_q[log p(x | z)] - KL(q || p) in closed form for the linear-Gaussian model."""
    vae, _ = linear_gaussian()
    x = torch.randn(5, 1, 2, 2)
    mean, logvar = vae.net.encode(x)
    w, variance = vae.net.weight.detach(), logvar.exp().detach()
    error = (x.flatten(1) - mean.detach() @ w.T).square().sum(1) + (variance[:, None, :] * w.square()).sum((1, 2))
    sigma = vae.net.sigma
    expected = -0.5 * error / sigma**2 - 4 * math.log(sigma * math.sqrt(2 * math.pi))
    expected = expected - 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)
    torch.testing.assert_close(vae.log_prob(x, draws=20000), expected.detach(), rtol=0, atol=0.4)


def test_bounds_do_not_depend_on_how_draws_are_batched():
    vae = model()
    x0, _ = batch()
    whole = vae.iwae(x0, k=12, seed=4)
    torch.testing.assert_close(whole, vae.iwae(x0, k=12, seed=4, batch=1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(whole, vae.iwae(x0, k=12, seed=4, batch=17), rtol=1e-5, atol=1e-3)
    assert not torch.allclose(whole, vae.iwae(x0, k=12, seed=5))
    torch.manual_seed(5)
    assert torch.equal(whole, vae.iwae(x0, k=12, seed=4)) and vae.net.training
    bits = vae.bits_per_dim(x0, seed=1)
    torch.testing.assert_close(bits, -vae.log_prob(x0, seed=1) / (64 * math.log(2)))


def test_without_labels_a_conditional_model_sums_over_the_classes():
    vae = model(net={"conditional": True})
    x0, _ = batch()
    for bound in (vae.log_prob, lambda x, labels=None: vae.iwae(x, labels, k=7)):
        each = torch.stack([bound(x0, torch.full((6,), y)) for y in range(3)])
        torch.testing.assert_close(bound(x0), torch.logsumexp(each, 0) - math.log(3), rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="labels must be given for a conditional model"):
        vae.reconstruct(x0)


def test_what_is_measured_is_what_the_bounds_say():
    for conditional in (False, True):
        vae = model(net={"conditional": conditional}, prior_components=2)
        x0, labels = batch()
        vae.fit_prior(x0, labels)
        given = labels if conditional else None
        found = vae.measure(x0, labels, seed=2)
        assert list(found)[0] == "bits_per_dim" and all(value.shape == (6,) for value in found.values())
        torch.testing.assert_close(found["bits_per_dim"], vae.bits_per_dim(x0, given, seed=2, prior="gmm"))
        expected = -vae.iwae(x0, given, seed=2, prior="normal") / (64 * math.log(2))
        torch.testing.assert_close(found["iwae_500_bits_per_dim_normal_prior"], expected)
        error = (vae.reconstruct(x0, given) - x0).square().flatten(1).mean(1)
        torch.testing.assert_close(found["reconstruction_mse"], error)
    assert "bits_per_dim" not in model(likelihood="bernoulli").measure(x0)


def test_a_bound_of_what_is_no_likelihood_is_refused():
    x0, _ = batch()
    with pytest.raises(RuntimeError, match="'bernoulli' is no likelihood of 17 levels"):
        model(likelihood="bernoulli").log_prob(x0)
    with pytest.raises(ValueError, match="draws and batch must be ints >= 1"):
        model().iwae(x0, k=0)
    with pytest.raises(RuntimeError, match="prior 'gmm' has not been fitted"):
        model().log_prob(x0, prior="gmm")


# ---- latents and samples ----


def test_sampling_is_the_prior_the_decoder_and_the_pixels():
    vae = model(net={"conditional": True})
    labels = torch.tensor([0, 2, 1, 1])
    ids = torch.arange(7, 11)
    z = 0.8 * ops.normal((4, 4), seed=3, sample_ids=ids, stream="init")
    maps = vae.net.decode(z, labels)
    options = {"seed": 3, "first_id": 7, "temperature": 0.8}
    torch.testing.assert_close(vae.sample(4, labels, pixels="mean", **options), vae.pixels.mean(maps))
    with torch.no_grad():
        drawn = vae.pixels.sample(maps, seed=3, sample_ids=ids)
    assert torch.equal(vae.sample(4, labels, **options), drawn)
    assert vae.net.training and not drawn.requires_grad


@pytest.mark.parametrize("prior", ["normal", "gmm"])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_sample_does_not_depend_on_its_batch(prior, conditional):
    vae = model(net={"conditional": conditional}, prior_components=2)
    vae.fit_prior(*batch(60), seed=1)
    labels = [0, 1, 2, 0, 1, 2] if conditional else None
    options = {"prior": prior, "seed": 4, "pixels": "mean"}
    whole = vae.sample(6, labels, **options)
    part = vae.sample(2, labels and labels[2:4], first_id=2, **options)
    torch.testing.assert_close(whole[2:4], part, rtol=1e-5, atol=1e-5)
    assert vae.sample(0, [] if conditional else None, prior=prior).shape == (0, 1, 8, 8)


def test_latents_and_a_new_mixture_are_ordinary_tensors():
    vae = model()
    x0, _ = batch(40)
    z = vae.encode(x0)[0]
    (z * torch.ones(1, requires_grad=True)).sum().backward()  # tensors of inference mode refuse that
    assert not vae.decode(z).is_inference()
    vae.fit_prior(x0, components=3)
    vae.load_state_dict({name: value.clone() for name, value in vae.state_dict().items()}, "memory")


def test_auto_takes_the_mixture_once_it_is_fitted():
    vae = model(prior_components=3)
    x0, labels = batch(40)
    assert torch.equal(vae.sample(3), vae.sample(3, prior="normal"))
    with pytest.raises(RuntimeError, match="prior 'gmm' has not been fitted; call fit_prior"):
        vae.sample(3, prior="gmm")
    vae.finish(x0, labels, seed=0)
    assert torch.equal(vae.sample(3), vae.sample(3, prior="gmm"))
    assert not torch.equal(vae.sample(3), vae.sample(3, prior="normal"))
    assert torch.equal(vae.log_prob(x0), vae.log_prob(x0, prior="gmm"))
    assert vae.log_prob(x0).mean() > vae.log_prob(x0, prior="normal").mean()  # it was fitted to these latents
    before = vae.net.prior.means.clone()
    vae.fit_prior(x0, components=5)
    assert vae.net.prior.means.shape == (1, 5, 4) and before.shape == (1, 3, 4)
    assert vae.config()["prior_components"] == 5
    none = model(prior_components=0)
    none.finish(x0, labels, seed=0)
    assert not any("prior" in name for name in none.net.state_dict())


def test_latents_decode_to_reconstructions_paths_and_traversals():
    vae = model(net={"conditional": True})
    x0, labels = batch()
    mean, logvar = vae.encode(x0, labels)
    assert mean.shape == logvar.shape == (6, 4)
    rebuilt = vae.reconstruct(x0, labels)
    torch.testing.assert_close(rebuilt, vae.decode(mean, labels))
    path = vae.interpolate(x0, x0.flip(0), 5, labels=labels)
    assert path.shape == (6, 5, 1, 8, 8)
    torch.testing.assert_close(path[:, 0], rebuilt, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.interpolate(x0, x0.flip(0), 5, labels=labels, kind="lerp")[:, 2],
                               vae.decode(0.5 * (mean + vae.encode(x0.flip(0), labels)[0]), labels),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    walk = vae.traverse(x0, 2, [-1.0, 0.0, 3.0], labels)
    moved = mean.clone()
    moved[:, 2] = 3.0
    torch.testing.assert_close(walk[:, 2], vae.decode(moved, labels), rtol=1e-4, atol=1e-4)
    assert vae.traverse(None, 0, [0.0, 1.0], [1]).shape == (1, 2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"dim must be in 0 \.\. 3, got 4"):
        vae.traverse(x0, 4, [0.0], labels)
    assert vae.net.training


def test_bad_arguments_are_refused():
    vae = model()
    for options, message in (
        ({"prior": "vamp"}, "prior must be one of auto, gmm, normal"),
        ({"pixels": "mode"}, "pixels must be one of sample, mean"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0"),
        ({"labels": 1}, "labels must be None for a network without classes"),
    ):
        with pytest.raises(ValueError, match=message):
            vae.sample(2, **options)
    with pytest.raises(ValueError, match=r"x0 must be floating point \(B, C, H, W\) = \(B, 1, 8, 8\)"):
        vae.reconstruct(torch.zeros(2, 1, 9, 9))
    with torch.no_grad():
        vae.net.decoder.layers[-1].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        vae.sample(2, check_finite=True)
    for options, message in (
        ({"beta": -1.0}, "beta must be a finite number >= 0"),
        ({"kl": "exact"}, "kl must be 'analytic' or 'monte_carlo'"),
        ({"kl": "monte_carlo", "free_bits": 0.1}, "free_bits must be 0 with kl='monte_carlo'"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"net": {"out_channels": 5}}, "net must have out_channels = 2 for the likelihood 'logistic', got 5"),
    ):
        with pytest.raises(ValueError, match=f"models/VAE: {message}"):
            model(**options)
    for config, message in (
        ({"family": "vae", "net": SMALL, "gamma": 1}, "entries must be among .*beta.*, got 'gamma'"),
        ({"family": "flow"}, "entry 'family' must be 'vae'"),
        ({"family": "vae", "net": {"name": "dit"}}, "entry 'net' must be a dict with the name 'vae'"),
        ({"family": "vae", "net": SMALL | {"depth": 3}}, "fields must be among .*, got depth"),
    ):
        with pytest.raises(ValueError, match=message):
            VAE.from_config(config)


def test_save_and_load_keep_everything(tmp_path):
    vae = model(net={"conditional": True}, likelihood="mixture", components=3, beta=0.5, prior_components=2)
    vae.fit_prior(*batch(60))
    vae.save(tmp_path / "vae.safetensors", extra={"note": 1})
    again = models.load(tmp_path / "vae.safetensors")
    assert isinstance(again, VAE) and again.config() == vae.config() and not again.net.training
    state = again.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in vae.net.state_dict().items())
    assert torch.equal(again.sample(4, [0, 1, 2, 0], seed=1), vae.sample(4, [0, 1, 2, 0], seed=1))


def test_training_learns_resumes_and_fits_the_prior(tmp_path):
    config = preset("vae", "smoke", steps=40, batch_size=64, model={"net": {"dropout": 0.1}, "prior_components": 1})
    whole = train(config, tmp_path / "whole", progress=False)
    vae = VAE.load(whole)
    x0, _ = data.digits("test")
    assert vae.bits_per_dim(x0).mean() < 2.9 and vae.net.prior.fitted  # a histogram of all pixels: 2.98
    part = Run(config)
    for _ in range(15):
        part.train_step()
    (tmp_path / "parts").mkdir()
    part.save(tmp_path / "parts" / STATE_FILE)
    resumed = VAE.load(train(config, tmp_path / "parts", resume=True, progress=False))
    assert all(torch.equal(a, b) for a, b in zip(vae.net.state_dict().values(), resumed.net.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_the_conditional_preset_is_conditional():
    config = preset("vae", "digits_conditional")
    run = Run(dataclasses.replace(config, steps=1))
    assert run.model.num_classes == 10 and run.model.net.prior.weights.shape[0] == 10


def test_the_shipped_model_meets_every_bar():
    vae = VAE.pretrained("digits")
    x0, _ = data.digits("test")
    bits = 64 * math.log(2)
    elbo, iwae = vae.bits_per_dim(x0).mean().item(), -vae.iwae(x0, k=500).mean().item() / bits
    assert iwae < elbo
    report = evaluate_samples(vae.sample(1437, seed=0))
    report["bits_per_dim"], report["iwae_500_bits_per_dim"] = elbo, iwae
    assert not report.failures(VAE.bars), report.failures(VAE.bars)


def test_the_shipped_file_is_the_one_recorded():
    record = json.loads((PRETRAINED / "vae_digits.json").read_text(encoding="utf-8"))
    assert record["test"]["failures"] == record["validation"]["failures"] == []
    assert record["sha256"] == hashlib.sha256((PRETRAINED / "vae_digits.safetensors").read_bytes()).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_gpu_gives_what_the_cpu_gives(kind):
    net = {"kind": kind, "widths": (16, 32), "conditional": True, "dropout": 0.2}
    on_cpu, on_gpu = model(net=net), model(net=net).to("cuda")
    x0, labels = batch(60)
    draw = {"seed": 9, "sample_ids": torch.arange(60) * 11, "step": 3}
    losses = on_cpu.loss(x0, labels, **draw), on_gpu.loss(x0.cuda(), labels, **draw)
    torch.testing.assert_close(losses[0], losses[1].cpu(), rtol=1e-4, atol=1e-4)
    on_cpu.fit_prior(x0, labels)
    on_gpu.net.prior.load_state_dict(on_cpu.net.prior.state_dict())
    options = {"seed": 2, "pixels": "mean"}
    torch.testing.assert_close(on_cpu.sample(6, **options), on_gpu.sample(6, **options).cpu(), rtol=1e-3, atol=1e-3)
    bounds = on_cpu.iwae(x0, labels, k=5), on_gpu.iwae(x0.cuda(), labels, k=5).cpu()
    torch.testing.assert_close(*bounds, rtol=1e-3, atol=1e-1)
