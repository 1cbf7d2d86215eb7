"""Flow matching: the loss is the paper's, draws are functions of their arguments, sampling is exact Euler."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genengine import data, models, ops, paths
from genengine.evaluate import evaluate_samples
from genengine.models import FlowMatching, checkpoint, ode_likelihood
from genengine.nets.dit import DiT
from genengine.nets.unet import UNet
from genengine.train import preset

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 16, "depth": 2, "num_heads": 2,
         "num_classes": 3, "learn_sigma": False, "time_features": 8}  # fmt: skip


def model(seed=0, net=None, **options):
    """A small model with every layer filled, so that the output depends on time, class and pixels."""
    flow = FlowMatching(DiT.from_config(SMALL | (net or {}), seed=seed), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return flow


def batch(b=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(b, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(b) % 3


@pytest.mark.parametrize("path", [paths.RectifiedFlow(), paths.VPLinear()], ids=["flow", "vp"])
def test_loss_is_the_formula_and_differentiable(path):
    flow = model(path=path, class_drop=0.5)
    x0, labels = batch()
    ids = torch.tensor([5, 900, 3, 77, 1000, 2])
    loss = flow.loss(x0, labels, seed=9, sample_ids=ids, step=41)
    draw = {"seed": 9, "sample_ids": ids, "step": 41}
    z = ops.normal((6, 1), stream="time", **draw)[:, 0].double()
    t = (1 / (1 + torch.exp(-z))).float()
    u = ops.uniform((6, 1), stream="class_drop", **draw)[:, 0]
    eps = ops.normal(x0.shape, stream="diffuse", **draw)
    alpha, sigma, d_alpha, d_sigma = (
        torch.from_numpy(np.asarray(c)).float().view(-1, 1, 1, 1) for c in path.coefficients(t.double().numpy())
    )
    output = flow.net(alpha * x0 + sigma * eps, t, torch.where(u < 0.5, 3, labels))
    expected = ((output - (d_alpha * x0 + d_sigma * eps)) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.net.parameters())


def test_the_draws_of_an_image_do_not_depend_on_its_batch():
    flow = model()
    ids = torch.tensor([5, 900, 3])
    times = flow.draw_times(3, seed=1, sample_ids=ids, step=4)
    assert torch.equal(times[1:2], flow.draw_times(1, seed=1, sample_ids=ids[1:2], step=4))
    assert not torch.equal(times, flow.draw_times(3, seed=1, sample_ids=ids, step=5))
    torch.manual_seed(0)
    first = flow.loss(*batch(), seed=3, step=2)
    torch.manual_seed(1)
    assert torch.equal(first, flow.loss(*batch(), seed=3, step=2))


def test_times_are_logit_normal_and_labels_are_dropped_at_the_rate():
    flow = model(time_mean=0.5, time_std=0.7, class_drop=0.2)
    t = flow.draw_times(20000, seed=0).double()
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 0.7) < 0.02
    labels = flow.drop_labels(torch.ones(20000, dtype=torch.int64), seed=0)
    assert set(labels.tolist()) == {1, 3} and abs((labels == 3).double().mean() - 0.2) < 0.01
    assert torch.equal(model(class_drop=0.0).drop_labels(torch.ones(50, dtype=torch.int64), seed=0),
                       torch.ones(50, dtype=torch.int64))  # fmt: skip


def test_times_are_drawn_as_they_are_named():
    """By their distribution functions at the quartiles: of 20,000 draws a share is right within 5 standard errors."""
    for options, inverse in (
        ({"times": "uniform"}, lambda t: t),
        ({"times": "shifted", "time_shift": 3.0}, lambda t: t / (3.0 - 2.0 * t)),  # u of t = 3u/(1 + 2u)
    ):
        t = model(**options).draw_times(20000, seed=0).double()
        assert t.min() > 0 and t.max() < 1
        for quartile in (0.25, 0.5, 0.75):
            assert abs((inverse(t) < quartile).double().mean() - quartile) < 5 * (0.25 / 20000) ** 0.5
    with pytest.raises(ValueError, match="times must be one of logit_normal, uniform, shifted, got 'cosine'"):
        model(times="cosine")
    with pytest.raises(ValueError, match="time_shift=0"):
        model(times="shifted", time_shift=0)


def test_the_network_may_be_a_unet(tmp_path):
    small = {"channels": 8, "num_groups": 4, "head_dim": 8, "num_classes": 3}
    flow = FlowMatching(UNet.from_config("tiny", **small), times="shifted", num_levels=17)
    flow.loss(*batch(), seed=0).backward()
    assert flow.net.conv_out.weight.grad.abs().max() > 0
    flow.save(tmp_path / "flow.safetensors")
    again = FlowMatching.load(tmp_path / "flow.safetensors")
    assert again.config() == flow.config() and again.config()["net"]["name"] == "unet"
    assert torch.equal(again.sample(2, [0, 1], steps=2), flow.eval().sample(2, [0, 1], steps=2))


class Gaussian(torch.nn.Module):
    """The best velocity for pixels N(0.2, 0.3^2) on the straight path: E[eps - x0 | x_t], linear in x."""

    config, null_class = UNet.from_config("tiny", image_size=2, multipliers=[1], attention=[], num_classes=0).config, 0

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y=None):
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * 0.09 + t**2
        return (t - (1 - t) * 0.09) / variance * (x - (1 - t) * 0.2) - 0.2


@pytest.mark.parametrize(("method", "tolerance"), [("rk4", 1e-5), ("heun", 1e-2)])
def test_the_density_of_a_gaussian_is_the_closed_form(method, tolerance):
    flow = FlowMatching(Gaussian(), num_levels=17)
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 0.2
    velocity = lambda x, t: flow.velocity(x, t)  # noqa: E731
    expected = torch.distributions.Normal(0.2, 0.3).log_prob(x).flatten(1).sum(1)
    for steps, bound in ((20, 100 * tolerance), (80, tolerance)):  # finer steps come closer, too
        got = ode_likelihood.log_density(velocity, x, np.linspace(0, 1, steps + 1), method=method)
        assert (got - expected).abs().max() < bound
    probes = ode_likelihood.rademacher(x.shape, 2, seed=0, sample_ids=None, device=x.device, dtype=x.dtype)
    estimate = ode_likelihood.log_density(velocity, x, np.linspace(0, 1, 81), method=method, probes=probes)
    torch.testing.assert_close(estimate, got)  # the Jacobian is diagonal: every +-1 probe gives its exact trace


class Levels(Gaussian):
    """The best velocity for pixels that are levels i with probability mass_i: (x - E[x0 | x])/t."""

    def __init__(self, mass):
        super().__init__()
        self.mass, self.levels = mass, torch.linspace(-1, 1, len(mass), dtype=torch.float64)

    def forward(self, x, t, y=None):
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        score = self.mass.log() - (x[..., None] - (1 - t)[..., None] * self.levels) ** 2 / (2 * t[..., None] ** 2)
        return (x - (score.softmax(-1) * self.levels).sum(-1)) / t


def test_the_likelihood_of_discrete_pixels_is_a_bound_of_the_exact_mass():
    """Of a smooth density uniform noise loses little, of a model that knows the levels the path's noise does."""
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64)
    normal = torch.distributions.Normal(0.2, 0.3)
    mass = normal.cdf(levels + 1 / 16) - normal.cdf(levels - 1 / 16)
    mass = mass / mass.sum()
    pick = torch.multinomial(mass, 4 * 300, replacement=True, generator=torch.Generator().manual_seed(0))
    x0, exact = levels[pick].view(300, 1, 2, 2), mass.log()[pick].view(300, 4).sum(1).mean()
    smooth, discrete = FlowMatching(Gaussian(), num_levels=17), FlowMatching(Levels(mass), num_levels=17)
    bound = lambda flow, kind: flow.log_prob(x0, dequantisation=kind, divergence="exact", steps=40).double().mean()  # noqa: E731
    assert exact - 0.05 < bound(smooth, "uniform") < exact + 0.01
    assert exact - 0.1 < bound(discrete, "path") < exact + 0.05  # the mean over 300 draws of the noise
    width_over_noise = 0.125 / (0.125 / 6 * math.sqrt(2 * math.pi * math.e))  # what narrow noise costs a smooth density
    assert bound(smooth, "path") - exact == pytest.approx(-4 * math.log(width_over_noise), abs=0.15)


def test_likelihood_draws_and_refusals():
    flow = model(num_levels=17)
    x0, labels = batch()
    whole = flow.log_prob(x0, labels, seed=3, steps=3)
    part = flow.log_prob(x0[2:4], labels[2:4], seed=3, steps=3, sample_ids=torch.tensor([2, 3]))
    torch.testing.assert_close(whole[2:4], part, rtol=1e-4, atol=1e-3)
    exact = flow.log_prob(x0[:2], labels[:2], seed=3, steps=3, divergence="exact")
    many = flow.log_prob(x0[:2], labels[:2], seed=3, steps=3, probes=64)
    assert (exact - many).abs().max() < 0.1 * exact.abs().max()  # Hutchinson's estimate closes in on the trace
    assert all(p.requires_grad for p in flow.net.parameters()) and flow.net.training
    assert torch.isfinite(flow.bits_per_dim(x0)).all()  # None: no class
    for options, message in (
        ({"divergence": "skilling"}, "divergence must be one of exact, hutchinson"),
        ({"dequantisation": "none"}, "dequantisation must be one of path, uniform"),
        ({"method": "euler"}, "method must be one of heun, rk4"),
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"steps": 2.5}, "steps must be an int >= 1, got 2.5"),
        ({"probes": 0}, "probes must be an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.log_prob(x0, labels, **options)
    with pytest.raises(ValueError, match="dequantisation must be 'path' on VPLinear"):
        model(path=paths.VPLinear()).log_prob(x0, labels, dequantisation="uniform")


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampling_equals_the_textbook_loop(solver, guidance):
    flow = model()
    labels = torch.tensor([0, 1, 2, 1])
    out = flow.sample(4, labels, steps=5, guidance=guidance, seed=11, solver=solver, first_id=7)

    @torch.no_grad()
    def velocity(x, t):
        time = torch.full((4,), t)
        conditional = flow.net(x, time, labels)
        free = flow.net(x, time, torch.full_like(labels, 3))
        return free + guidance * (conditional - free)

    x = ops.normal((4, 1, 8, 8), seed=11, sample_ids=torch.arange(7, 11), stream="init")
    grid = np.linspace(1, 0, 6)
    for now, end in zip(grid[:-1], grid[1:], strict=True):
        slope = velocity(x, now)
        if solver == "heun":
            slope = (slope + velocity(x + (end - now) * slope, end)) / 2
        x = x + (end - now) * slope
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
    flow = model()
    whole = flow.sample(6, [0, 1, 2, 0, 1, 2], steps=3, guidance=1.5, seed=4)
    part = flow.sample(2, [2, 0], steps=3, guidance=1.5, seed=4, first_id=2)
    torch.testing.assert_close(whole[2:4], part, rtol=1e-5, atol=1e-5)
    assert not whole.requires_grad and not whole.is_inference()


def test_labels_are_taken_in_every_form():
    flow = model()
    options = {"steps": 2, "seed": 0}
    assert torch.equal(flow.sample(3, 1, **options), flow.sample(3, [1, 1, 1], **options))
    assert torch.equal(flow.sample(4, **options), flow.sample(4, torch.tensor([0, 1, 2, 0]), **options))
    unconditional = model(net={"num_classes": 0})
    assert unconditional.sample(2, **options).shape == (2, 1, 8, 8)
    assert flow.net.training  # the mode is restored
    assert torch.equal(flow.sample(3, np.array([0, 1, 2], dtype=np.int32), **options), flow.sample(3, **options))
    for labels in ([0, 1], [[0, 1, 2]], []):
        with pytest.raises(ValueError, match=r"labels must be one int or 3 ints in 0 \.\. 2, got shape"):
            flow.sample(3, labels, **options)
    for labels, got in ((3, 3), ([-1, 0, 0], -1), ([0, 12, 1], 12)):
        with pytest.raises(ValueError, match=rf"labels must be in 0 \.\. 2, got {got}$"):
            flow.sample(3, labels, **options)
    for labels in (1.7, [0.0, 1.0, 2.0], torch.tensor([True, False, True]), True):
        with pytest.raises(TypeError, match="labels must be ints, got torch"):
            flow.sample(3, labels, **options)
    with pytest.raises(ValueError, match="labels must be None"):
        unconditional.sample(2, [0, 1], **options)
    with pytest.raises(ValueError, match="solver must be one of"):
        flow.sample(2, solver="rk45")


@pytest.mark.parametrize("labels", [None, 1, []])
def test_no_samples_are_an_empty_tensor(labels):
    flow = model()
    for options in ({}, {"guidance": 2.0}, {"guidance": torch.ones(0)}, {"solver": "euler", "check_finite": True}):
        assert flow.sample(0, labels, steps=2, **options).shape == (0, 1, 8, 8)
    assert FlowMatching.pretrained().sample(0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guidance_may_differ_between_samples(solver):
    flow = model()
    options = {"steps": 3, "seed": 5, "solver": solver}
    weights = torch.tensor([1.0, 0.0, 3.5])
    together = flow.sample(3, [0, 1, 2], guidance=weights, **options)
    for i, weight in enumerate(weights.tolist()):
        alone = flow.sample(1, [i], guidance=weight, first_id=i, **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(together, flow.sample(3, [0, 1, 2], guidance=weights.numpy(), **options))
    assert torch.equal(flow.sample(3, guidance=torch.tensor(2.0), **options), flow.sample(3, guidance=2.0, **options))
    for bad in (torch.ones(2), torch.ones(3, 1), float("nan"), [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match=r"guidance must be a finite number or \(num,\) = \(3,\)"):
            flow.sample(3, guidance=bad, **options)
    with pytest.raises(ValueError, match="guidance must be 1 for a network without classes, got 2"):
        model(net={"num_classes": 0}).sample(3, guidance=2.0, **options)


def test_indices_stay_in_the_range_of_the_noise():
    flow = model()
    options = {"steps": 1, "solver": "euler"}
    last = flow.sample(2, [0, 1], first_id=2**32 - 2, **options)
    alone = flow.sample(1, [1], first_id=2**32 - 1, **options)
    torch.testing.assert_close(last[1:], alone, rtol=1e-5, atol=1e-5)
    for first_id in (-1, 2**32 - 1, 2**40):
        with pytest.raises(ValueError, match=rf"first_id must be in .* = \[0, 4294967294\], got {first_id}"):
            flow.sample(2, [0, 1], first_id=first_id, **options)
    with pytest.raises(ValueError, match=r"num must be in \[0, 2\*\*32\], got -1"):
        flow.sample(-1, **options)
    with pytest.raises(TypeError, match="first_id must be an int, got float"):
        flow.sample(2, first_id=0.5, **options)


def test_a_network_that_is_not_finite_is_caught_on_request():
    flow = model()
    with torch.no_grad():
        flow.net.final_layer.linear.bias.fill_(float("nan"))
    assert flow.sample(2, steps=2).isnan().all()
    with pytest.raises(FloatingPointError, match="row 0 of 4"):
        flow.sample(2, steps=2, check_finite=True)
    assert flow.net.training  # the mode is restored


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match="learn_sigma=False"):
        model(net={"learn_sigma": True})
    with pytest.raises(ValueError, match=r"class_drop must be in \[0, 1\)"):
        model(class_drop=1.0)
    with pytest.raises(ValueError, match="time_std must be > 0"):
        model(time_std=0.0)


def test_save_and_load_keep_everything(tmp_path):
    flow = model(path=paths.VPLinear(beta_max=15.0), time_mean=0.3, time_std=0.8, class_drop=0.25)
    flow.save(tmp_path / "flow.safetensors", extra={"note": 1})
    again = FlowMatching.load(tmp_path / "flow.safetensors")
    assert again.config() == flow.config() and again.path == flow.path
    state = again.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in flow.net.state_dict().items())
    assert not again.net.training


def test_the_shipped_model_meets_every_bar():
    flow = FlowMatching.pretrained("digits")
    labels = data.digits("train")[1]
    report = evaluate_samples(flow.sample(1437, labels, steps=8, seed=0), labels)
    assert report.passes(), report.failures()
    assert report["precision"] > 0.9 and report["recall"] > 0.85


def test_the_shipped_model_is_small_and_says_how_it_was_made():
    folder = Path(models.__file__).resolve().parents[1] / "pretrained"
    path = folder / "flow_digits.safetensors"
    assert path.stat().st_size < 2_000_000
    record = json.loads((folder / "flow_digits.json").read_text(encoding="utf-8"))
    _, config = checkpoint.read(path)
    assert record["train"] == config["extra"]["train"] == json.loads(json.dumps(dataclasses.asdict(preset("flow"))))
    assert record["command"].startswith("genengine train flow") and record["test"]["failures"] == []
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="name must be one of digits, got 'faces'"):
        FlowMatching.pretrained("faces")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loss_and_captured_samples_on_a_gpu_equal_the_cpu():
    on_cpu, on_gpu = model(), model()
    on_gpu.net.to("cuda")
    x0, labels = batch()
    draw = {"seed": 9, "sample_ids": torch.arange(6) * 11, "step": 3}
    losses = on_cpu.loss(x0, labels, **draw), on_gpu.loss(x0.cuda(), labels.cuda(), **draw)
    torch.testing.assert_close(losses[0], losses[1].cpu(), rtol=1e-4, atol=1e-5)
    for solver in ("euler", "heun"):
        options = {"steps": 6, "guidance": 1.5, "seed": 2, "solver": solver}
        expected, got = on_cpu.sample(6, **options), on_gpu.sample(6, **options)
        assert got.is_cuda
        torch.testing.assert_close(expected, got.cpu(), rtol=1e-3, atol=1e-3)
