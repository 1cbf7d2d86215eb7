"""DDPM: losses and the variational bound are the papers' formulas, samplers are textbook loops, draws are functions."""

import json
import math

import numpy as np
import pytest
import torch

from genengine import data, models, ops, paths, solvers
from genengine.evaluate import evaluate_samples
from genengine.models import DDPM, variational
from genengine.models.base import PRETRAINED
from genengine.nets.dit import DiT
from genengine.nets.unet import UNet

UNET = {"image_size": 8, "in_channels": 1, "channels": 8, "multipliers": (1, 2), "num_blocks": 1, "attention": (4,),
        "head_dim": 8, "num_groups": 4, "num_classes": 3}  # fmt: skip
DIT = {"image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3,
       "learn_sigma": False, "time_features": 8}  # fmt: skip
LINEAR = paths.DDPMLinear(0.01, 0.3, 12)


def model(seed=0, net=None, kind="unet", **options):
    """A small model with every layer filled, so that the output depends on time, class and pixels."""
    net = (UNet.from_config(UNET, seed=seed, **(net or {})) if kind == "unet" else
           DiT.from_config(DIT, seed=seed, **(net or {})))  # fmt: skip
    ddpm = DDPM(net, **({"num_timesteps": 12, "prediction": "v", "num_levels": 17} | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ddpm.net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ddpm


def batch(b=6, channels=1, size=8, levels=17):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, levels, (b, channels, size, size), generator=generator)
    return images * (2 / (levels - 1)) - 1, torch.arange(b) % 3


def chain(path, total):
    """alpha bar, beta and beta tilde of each step from the products of DDPM, in NumPy."""
    bar = path.alpha(np.arange(total + 1) / total) ** 2
    beta = 1 - bar[1:] / bar[:-1]
    tilde = beta * (1 - bar[:-1]) / (1 - bar[1:])
    return bar, beta, tilde


def guess_of(ddpm, x_t, out, bar):
    """x0 from the network's output, textbook formulas."""
    alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
    if ddpm.prediction == "eps":
        return (x_t - sigma * out) / alpha
    return out if ddpm.prediction == "x0" else alpha * x_t - sigma * out


# ---- the bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [LINEAR, paths.Cosine(), paths.ZeroTerminalSNR(LINEAR)], ids=lambda p: type(p).__name__
)
def test_the_steps_are_the_posteriors_of_ddpm(path):
    steps, (bar, beta, tilde) = variational.Steps.of(path, 12), chain(path, 12)
    np.testing.assert_allclose(np.exp(steps.log_large), beta, rtol=1e-9)
    np.testing.assert_allclose(np.exp(steps.log_small[1:]), tilde[1:], rtol=1e-9)
    assert steps.log_small[0] == steps.log_small[1]  # Ho's clipping
    np.testing.assert_allclose(steps.c_x0, np.sqrt(bar[:-1]) * beta / (1 - bar[1:]), rtol=1e-9)  # Ho 2020, eq. 7
    np.testing.assert_allclose(steps.c_x, np.sqrt(1 - beta) * (1 - bar[:-1]) / (1 - bar[1:]), rtol=1e-7, atol=1e-12)


CASES = [
    ("eps", "small", LINEAR),
    ("x0", "large", LINEAR),
    ("v", "learned", paths.Cosine()),
    ("eps", "learned", LINEAR),
]


@pytest.mark.parametrize(("prediction", "variance", "path"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_variational_terms_are_the_textbook_chain(prediction, variance, path):
    """KL of each step from means and variances of torch's normals; the decoder from their distribution function."""
    ddpm = model(net={"learn_sigma": variance == "learned"}, path=path, prediction=prediction, variance=variance)
    x0, labels = batch()
    ids, total = torch.tensor([5, 900, 3, 77, 1000, 2]), 12
    terms = ddpm.variational_terms(x0, labels, seed=9, sample_ids=ids)
    bar, beta, tilde = chain(path, total)
    tilde[0] = tilde[1]
    clean = x0.double()
    normal = torch.distributions.Normal
    columns = []
    for n in range(total):
        eps = ops.normal(x0.shape, seed=9, sample_ids=ids, step=n, stream="diffuse").double()
        x_t = math.sqrt(bar[n + 1]) * clean + math.sqrt(1 - bar[n + 1]) * eps
        with torch.no_grad():
            out = ddpm.net(x_t.float(), torch.full((6,), (n + 1) / total), labels).double()
        variances = {"small": tilde[n], "large": beta[n]}
        if variance == "learned":
            out, v = out.chunk(2, 1)
            log_var = (v + 1) / 2 * math.log(beta[n]) + (1 - v) / 2 * math.log(tilde[n])
        else:
            log_var = torch.full_like(clean, math.log(variances[variance]))
        guess = guess_of(ddpm, x_t, out, bar[n + 1]).clamp(-1, 1)
        std = torch.exp(log_var / 2)
        if n == 0:
            p = normal(guess, std)
            upper = torch.where(clean > 1 - 1e-6, torch.ones_like(clean), p.cdf(clean + 1 / 16))
            lower = torch.where(clean < -1 + 1e-6, torch.zeros_like(clean), p.cdf(clean - 1 / 16))
            columns.append(-torch.log((upper - lower).clamp(min=1e-12)).flatten(1).sum(1))
            continue
        first, second = math.sqrt(bar[n]) * beta[n] / (1 - bar[n + 1]), math.sqrt(1 - beta[n]) * (1 - bar[n])
        means = [first * guess_ + second / (1 - bar[n + 1]) * x_t for guess_ in (clean, guess)]
        kl = torch.distributions.kl_divergence(normal(means[0], math.sqrt(tilde[n])), normal(means[1], std))
        columns.append(kl.flatten(1).sum(1))
    torch.testing.assert_close(terms.diffusion.double(), torch.stack(columns[1:], 1), rtol=1e-3, atol=1e-3)
    if columns[0].max() < 300:  # beyond, the textbook's difference of distribution functions has no digits
        torch.testing.assert_close(terms.decoder.double(), columns[0], rtol=1e-3, atol=1e-2)
    prior = torch.distributions.kl_divergence(
        normal(math.sqrt(bar[-1]) * clean, math.sqrt(1 - bar[-1])), normal(torch.zeros(()), torch.ones(()))
    )
    torch.testing.assert_close(terms.prior.double(), prior.flatten(1).sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-ddpm.log_prob(x0, labels, seed=9, sample_ids=ids), terms.total)
    parts = ddpm.measure(x0, labels, seed=9)
    whole = sum(parts[f"{name}_bits_per_dim"] for name in ("prior", "diffusion", "decoder"))
    torch.testing.assert_close(parts["bits_per_dim"], whole)
    torch.testing.assert_close(parts["bits_per_dim"], ddpm.bits_per_dim(x0, labels, seed=9))


def test_the_discretised_gaussian_is_a_distribution_over_levels_and_keeps_its_tails():
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64)
    for mean, log_var in ((0.3, -4.0), (-1.2, 0.0), (0.999, -9.0)):
        log_mass = variational.discretised_gaussian(levels, torch.tensor(mean), torch.tensor(log_var).double(), 17)
        assert log_mass.exp().sum() == pytest.approx(1.0, abs=1e-5)
    mean = torch.tensor(0.9, requires_grad=True)
    far = variational.discretised_gaussian(torch.tensor(-1.0), mean, torch.tensor(-8.0), 17)  # 104 standard deviations
    z = (0.9 + 1 - 1 / 16) * math.exp(4)
    assert float(far.detach()) == pytest.approx(-z * z / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-4)
    (slope,) = torch.autograd.grad(far, mean)
    assert float(slope) == pytest.approx(-z * math.exp(4), rel=1e-3)  # the gradient still points home


def test_the_bound_holds_where_the_likelihood_is_known():
    """All pixels one level: a perfect network's chain gives it almost all the mass; a chain of noise does not."""

    class Perfect(torch.nn.Module):
        """Knows that every image is black."""

        config, null_class, num_timesteps = UNet.from_config(UNET).config, 3, 0

        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def for_schedule(self, t_rows, y=None):
            return lambda x, row: self.value.expand_as(x)

    x0 = torch.full((2, 1, 8, 8), -1.0)
    perfect = DDPM(Perfect(-1.0), num_timesteps=100, prediction="x0", variance="large", num_levels=17)
    terms = perfect.variational_terms(x0, None)
    # what remains is the KL of beta tilde to beta in each step: (log r + 1/r - 1)/2 nats a pixel, r = beta/beta tilde
    _, beta, tilde = chain(perfect.path, 100)
    r = beta[1:] / tilde[1:]
    expected = 32 * (np.log(r) + 1 / r - 1)
    np.testing.assert_allclose(terms.diffusion[0].numpy(), expected, rtol=1e-2, atol=1e-3)
    inside = 0.5 * (1 + math.erf((1 / 16) / math.sqrt(beta[0]) / math.sqrt(2)))  # of the black level, beta_0 wide
    assert float(terms.decoder[0]) == pytest.approx(-64 * math.log(inside), rel=1e-3) and terms.prior.max() < 1e-3
    blind = DDPM(Perfect(0.0), num_timesteps=100, prediction="x0", variance="large", num_levels=17)
    assert blind.log_prob(x0).max() < perfect.log_prob(x0).min() - 1000


@pytest.mark.parametrize(("prediction", "variance", "path"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_velocity_is_the_derivative_of_the_path(prediction, variance, path):
    ddpm = model(net={"learn_sigma": variance == "learned"}, path=path, prediction=prediction, variance=variance)
    x, labels = batch()
    alpha, sigma, d_alpha, d_sigma = (float(c) for c in path.coefficients(0.4))
    with torch.no_grad():
        out = ddpm.net(x, torch.full((6,), 0.4), labels)[:, :1]
        guess = guess_of(ddpm, x, out, alpha**2)
        expected = d_alpha * guess + d_sigma * (x - alpha * guess) / sigma
        torch.testing.assert_close(ddpm.velocity(x, 0.4, labels), expected, rtol=1e-3, atol=1e-4)
    whole = ddpm.ode_log_prob(x, labels, seed=3, steps=2)
    part = ddpm.ode_log_prob(x[1:3], labels[1:3], seed=3, steps=2, sample_ids=torch.tensor([1, 2]))
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(whole[1:3], part, rtol=1e-3, atol=1e-1)


# ---- training ------------------------------------------------------------------------------------------------------


LOSSES = [
    ("eps", "simple", None), ("x0", "simple", None), ("v", "simple", None),
    ("eps", "min_snr", lambda snr: np.minimum(snr, 2.0) / snr), ("eps", "p2", lambda snr: (1 + snr) ** -2.0),
    ("v", "min_snr", lambda snr: np.minimum(snr, 2.0) / snr), ("x0", "p2", lambda snr: (1 + snr) ** -2.0),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "loss", "weight"), LOSSES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_loss_is_its_papers_weight_of_one_error(prediction, loss, weight):
    """The weights are written on the squared error of eps, or for "simple" on the prediction itself."""
    ddpm = model(path=LINEAR, prediction=prediction, loss=loss, gamma=2.0, class_drop=0.5)
    x0, labels = batch()
    draw = {"seed": 9, "sample_ids": torch.tensor([5, 900, 3, 77, 1000, 2]), "step": 41}
    terms = ddpm.terms(x0, labels, **draw)
    n = (ops.uniform((6, 1), stream="time", **draw)[:, 0] * 12).long()
    bar = np.cumprod(1 - LINEAR.betas)[n.numpy()]
    snr = bar / (1 - bar)
    u = ops.uniform((6, 1), stream="class_drop", **draw)[:, 0]
    eps = ops.normal(x0.shape, stream="diffuse", **draw)
    alpha, sigma = (torch.from_numpy(np.sqrt(c)).float().view(-1, 1, 1, 1) for c in (bar, 1 - bar))
    x_t = alpha * x0 + sigma * eps
    out = ddpm.net(x_t, (n + 1) / 12.0, torch.where(u < 0.5, 3, labels))
    if prediction == "eps":
        eps_error = out - eps
    elif prediction == "x0":
        eps_error = -(out - x0) * alpha / sigma
    else:
        eps_error = (out - (alpha * eps - sigma * x0)) * alpha
    own = {"eps": np.ones(6), "x0": 1 / snr, "v": 1 + 1 / snr}[prediction]  # from eps to the prediction's own error
    scale = own if loss == "simple" else weight(snr)
    expected = (eps_error.square().flatten(1).mean(1) * torch.from_numpy(scale).float()).mean()
    torch.testing.assert_close(terms["loss"], expected, rtol=2e-4, atol=1e-5)
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ddpm.net.parameters())


def test_the_bound_estimated_in_training_is_the_bound():
    """Averaged over all steps with the same noise, the "vlb" term is diffusion and decoder in bits per dimension."""
    ddpm = model(net={"learn_sigma": True}, loss="vlb", class_drop=0.0)
    x0, labels = batch(1)
    n = {}
    for step in range(400):
        n.setdefault(int(ddpm.draw_steps(1, seed=3, step=step)), step)
    assert set(n) == set(range(12))
    for index, step in sorted(n.items()):
        got = ddpm.terms(x0, labels, seed=3, step=step)["loss"]
        eps = ops.normal(x0.shape, seed=3, step=step, stream="diffuse")
        x_t = float(ddpm.steps.alpha[index]) * x0 + float(ddpm.steps.sigma[index]) * eps
        out, v = ddpm.net(x_t, torch.tensor([(index + 1) / 12]), labels).chunk(2, 1)
        expected = ddpm._step_terms(x0, x_t, out, v, torch.tensor([index])) * 12 / (64 * math.log(2))
        torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-5)


def test_in_the_hybrid_loss_the_bound_teaches_the_variance_alone():
    ddpm = model(net={"learn_sigma": True}, vlb_weight=0.5)
    x0, labels = batch()
    terms = ddpm.terms(x0, labels, seed=1)
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.5 * terms["vlb"])
    weight = ddpm.net.conv_out.weight
    mean, variance = torch.autograd.grad(terms["vlb"], weight, retain_graph=True)[0]
    assert mean.abs().max() == 0 and variance.abs().max() > 0
    mean, variance = torch.autograd.grad(terms["simple"], weight)[0]
    assert mean.abs().max() > 0 and variance.abs().max() == 0


def test_the_draws_of_an_image_do_not_depend_on_its_batch():
    ddpm = model()
    ids = torch.tensor([5, 900, 3])
    steps = ddpm.draw_steps(3, seed=1, sample_ids=ids, step=4)
    assert torch.equal(steps[1:2], ddpm.draw_steps(1, seed=1, sample_ids=ids[1:2], step=4))
    many = ddpm.draw_steps(24000, seed=0)
    assert torch.bincount(many, minlength=12).float().sub(2000).abs().max() < 5 * math.sqrt(2000)
    torch.manual_seed(0)
    first = ddpm.loss(*batch(), seed=3, step=2)
    torch.manual_seed(1)
    assert torch.equal(first, ddpm.loss(*batch(), seed=3, step=2))
    x0, labels = batch()
    whole = ddpm.log_prob(x0, labels, seed=3)
    part = ddpm.log_prob(x0[2:4], labels[2:4], seed=3, sample_ids=torch.tensor([2, 3]))
    torch.testing.assert_close(whole[2:4], part, rtol=1e-4, atol=1e-2)


# ---- sampling ------------------------------------------------------------------------------------------------------


def ancestral(ddpm, num, labels, times, guidance, seed, variance):
    """Ho 2020, Alg. 2 on any times, with guidance and Nichol's learned variance, x0 clipped."""
    x = ops.normal((num, 1, 8, 8), seed=seed, stream="init").double()
    for row, (now, end) in enumerate(zip(times[:-1], times[1:], strict=True)):
        bar, bar_s = (float(ddpm.path.alpha(t)) ** 2 for t in (now, end))
        with torch.no_grad():
            t = torch.full((num,), float(now))
            out = ddpm.net(x.float(), t, labels).double()
            free = ddpm.net(x.float(), t, torch.full_like(labels, 3)).double()
        v = out[:, 1:] if variance == "learned" else None
        out = free[:, :1] + guidance * (out[:, :1] - free[:, :1])
        guess = guess_of(ddpm, x, out, bar).clamp(-1, 1)
        beta = 1 - bar / bar_s
        x = math.sqrt(bar_s) * beta / (1 - bar) * guess + math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar) * x
        if end > 0:
            tilde = beta * (1 - bar_s) / (1 - bar)
            share = (v + 1) / 2 if variance == "learned" else float(variance == "large")
            log_var = torch.as_tensor(share * math.log(beta) + (1 - share) * math.log(tilde))
            std = torch.exp(0.5 * log_var)
            x = x + std * ops.normal(x.shape, seed=seed, step=row, stream="step").double()
    return x.float()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ancestral_sampling_is_the_textbook_loop_with_the_models_variance(variance, guidance):
    ddpm = model(net={"learn_sigma": variance == "learned"}, path=LINEAR, prediction="eps", variance=variance)
    labels = torch.tensor([0, 1, 2, 1])
    for steps in (12, 5):
        out = ddpm.sample(4, labels, steps=steps, solver="ddpm", guidance=guidance, seed=11)
        times = np.round(np.linspace(1, 0, steps + 1) * 12) / 12
        expected = ancestral(ddpm, 4, labels, times, guidance, 11, variance)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_ddim_is_the_textbook_loop():
    ddpm = model(net={"learn_sigma": True})
    labels = torch.tensor([0, 1, 2])
    out = ddpm.sample(3, labels, steps=4, solver="ddim", guidance=1.0, seed=2)
    x = ops.normal((3, 1, 8, 8), seed=2, stream="init").double()
    for now, end in zip([12, 9, 6, 3], [9, 6, 3, 0], strict=True):
        bar, bar_s = (float(ddpm.path.alpha(t / 12)) ** 2 for t in (now, end))
        with torch.no_grad():
            m = ddpm.net(x.float(), torch.full((3,), now / 12), labels).double()[:, :1]
        guess = guess_of(ddpm, x, m, bar).clamp(-1, 1)
        x = math.sqrt(bar_s) * guess + math.sqrt(1 - bar_s) * (x - math.sqrt(bar) * guess) / math.sqrt(1 - bar)
    torch.testing.assert_close(out, x.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", ["uniform", "karras", "logit_normal"])
@pytest.mark.parametrize("solver", list(solvers.SOLVERS))
def test_every_solver_and_grid_gives_samples_that_do_not_depend_on_their_batch(solver, grid):
    for ddpm in (model(), model(path=LINEAR, prediction="eps", net={"learn_sigma": True})):
        options = {"steps": 4, "solver": solver, "grid": grid, "guidance": 1.5, "seed": 4}
        whole = ddpm.sample(4, [0, 1, 2, 0], **options)
        part = ddpm.sample(2, [1, 2], first_id=1, **options)
        assert torch.isfinite(whole).all() and whole.shape == (4, 1, 8, 8)
        torch.testing.assert_close(whole[1:3], part, rtol=1e-3, atol=1e-3)
        assert not whole.requires_grad and not whole.is_inference()


def test_a_solver_can_use_every_training_time():
    for prediction, path in (("v", paths.Cosine()), ("eps", LINEAR), ("x0", paths.ZeroTerminalSNR(LINEAR))):
        ddpm = model(prediction=prediction, path=path)
        for solver in ("ddpm", "heun", "dpm_2", "lms", "dpmpp_2m_sde"):
            assert torch.isfinite(ddpm.sample(2, steps=12, solver=solver)).all()


def test_sampling_options_are_checked():
    ddpm = model()
    assert ddpm.sample(0, steps=3).shape == (0, 1, 8, 8)
    assert torch.equal(ddpm.sample(2, steps=3, clip=1.0, guidance=1.1), ddpm.sample(2, steps=3))
    assert not torch.equal(ddpm.sample(2, steps=3, clip=0), ddpm.sample(2, steps=3))
    for options, message in (
        ({"solver": "rk45"}, "solver must be one of euler, heun"),
        ({"grid": "cubic"}, "grid must be one of uniform, karras"),
        ({"steps": 13}, "steps must be at most num_timesteps = 12 on a uniform grid, got 13"),
        ({"clip": -1.0}, "clip must be a finite radius, or 0"),
        ({"clip": 1.0, "solver": "lms"}, "clip must be 0, as lms cannot clip"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
    ):
        with pytest.raises(ValueError, match=f"models/DDPM.sample: {message}"):
            ddpm.sample(2, **({"steps": 3} | options))
    with pytest.raises(ValueError, match="guidance must be 1 for a network without classes, got 2"):
        model(net={"num_classes": 0}).sample(2, steps=3, guidance=2.0)


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "levels", "shape"),
    [
        ({"in_channels": 3, "image_size": 16, "attention": (8,), "learn_sigma": True}, 256, (3, 16)),
        ({"num_classes": 0, "image_size": 12, "attention": ()}, 256, (1, 12)),
    ],
    ids=["colour", "no classes"],
)
def test_other_images_train_sample_and_have_a_bound(net, levels, shape):
    ddpm = model(net=net, num_levels=levels)
    x0, labels = batch(3, *shape, levels=levels)
    labels = None if ddpm.num_classes == 0 else labels
    ddpm.loss(x0, labels, seed=0).backward()
    assert ddpm.sample(2, steps=3).shape == (2, shape[0], shape[1], shape[1])
    assert torch.isfinite(ddpm.bits_per_dim(x0, labels)).all()
    assert torch.isfinite(ddpm.bits_per_dim(x0)).all()


def test_the_network_may_be_a_dit():
    for learn_sigma in (False, True):
        ddpm = model(kind="dit", net={"learn_sigma": learn_sigma})
        assert ddpm.config()["net"]["name"] == "dit" and ddpm.variance == ("learned" if learn_sigma else "large")
        assert torch.isfinite(ddpm.loss(*batch(), seed=0))
        assert torch.isfinite(ddpm.sample(2, steps=3, solver="ddpm", guidance=2.0)).all()
        assert torch.isfinite(ddpm.bits_per_dim(*batch())).all()


@pytest.mark.parametrize(
    "path", [LINEAR, paths.Cosine(0.02), paths.ZeroTerminalSNR(paths.ScaledLinear(num_timesteps=12))]
)
def test_save_and_load_keep_everything(tmp_path, path):
    ddpm = model(path=path, net={"learn_sigma": True, "fourier": (2,)}, loss="min_snr", gamma=3, vlb_weight=0.01,
                 class_drop=0.25)  # fmt: skip
    ddpm.save(tmp_path / "ddpm.safetensors", extra={"note": 1})
    again = DDPM.load(tmp_path / "ddpm.safetensors")
    assert again.config() == ddpm.config() and again.path == ddpm.path
    assert torch.equal(ddpm.eval().sample(2, steps=3), again.sample(2, steps=3))
    assert models.family("ddpm") is DDPM


def test_bad_models_are_refused():
    for options, message in (
        ({"prediction": "score"}, "prediction must be one of eps, x0, v, got 'score'"),
        ({"loss": "l1"}, "loss must be one of simple, min_snr"),
        ({"variance": "learned"}, "variance must be 'learned' if and only if"),
        ({"net": {"learn_sigma": True}, "variance": "small"}, "variance must be 'learned' if and only if"),
        ({"gamma": 0.0}, "gamma must be > 0"), ({"vlb_weight": -1.0}, "gamma must be > 0 and vlb_weight >= 0"),
        ({"num_timesteps": 0}, "num_timesteps must be an int >= 1"),
        ({"path": paths.RectifiedFlow()}, "path must be variance preserving.*got RectifiedFlow"),
        ({"path": paths.DDPMLinear()}, "path must have num_timesteps = 12 betas, got 1000"),
        ({"prediction": "eps"}, r"prediction must be v or x0 on a path with alpha\(1\) = 0"),
        ({"class_drop": 1.0}, "class_drop must be in"), ({"num_levels": 1}, "num_levels must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"models/DDPM: {message}"):
            model(**options)
    good = model().config()
    for entry, value, message in (
        ("net", {"name": "vgg"}, "'net' must be a dict with the name 'dit' or 'unet'"),
        ("net", 3, "a dict with the name 'dit'"),
        ("path", {"name": "Path"}, "unknown path 'Path'"), ("path", {"name": "Cosine", "r": 1}, "'path'.*'r'"),
        ("loss", "l1", "'loss' must be one of 'simple'"), ("gamma", "big", "'gamma' must be a number"),
        ("num_timesteps", 2.5, "'num_timesteps' must be an int"), ("gama", 1, "entries must be among .* got 'gama'"),
        ("family", "flow", "'family' must be 'ddpm'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"models/DDPM.from_config: .*{message}"):
            DDPM.from_config(good | {entry: value})
    with pytest.raises(ValueError, match=r"variational_terms: x0 must be .*\(B, 1, 8, 8\)"):
        model().log_prob(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"variational_terms: labels must be in 0 \.\. 2, got 3"):
        model().log_prob(batch()[0], 3)


def test_the_shipped_model_meets_every_bar_and_samples_as_recorded():
    """The record's means over five sampling seeds meet the bars; one seed is within 4 standard deviations of them."""
    ddpm = DDPM.pretrained("digits")
    record = json.loads((PRETRAINED / "ddpm_digits.json").read_text(encoding="utf-8"))["test"]
    assert record["failures"] == [] and record["bars"] == {name: list(bar) for name, bar in DDPM.bars.items()}
    bars = dict(DDPM.bars)
    bars.pop("bits_per_dim")
    labels = data.digits("train")[1]
    report = evaluate_samples(ddpm.sample(1437, labels, seed=0), labels)
    for name in bars:
        gap = abs(report[name] - record["samples"]["mean"][name])
        assert gap < 4 * record["samples"]["std"][name] + 1e-3, (name, report[name])
    x0, labels = data.digits("test")
    found = ddpm.bits_per_dim(x0[::24], labels[::24])  # fifteen images
    assert abs(found.mean() - record["measured"]["bits_per_dim"]["held_out"]) < 4 * found.std() / len(found) ** 0.5
