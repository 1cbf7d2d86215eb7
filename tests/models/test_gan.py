"""GAN: losses and penalties are the papers', draws are functions of their arguments, and collapse is called by name."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from genengine import data, models, ops
from genengine.evaluate import Report, evaluate_samples
from genengine.models import GAN, checkpoint, diff_augment
from genengine.models.gan import LOSSES, discriminator_loss, generator_loss
from genengine.train import preset

NET = {"name": "dcgan", "image_size": 8, "in_channels": 1, "num_classes": 3, "latent_dim": 6, "class_dim": 4,
       "generator_dim": 6, "discriminator_dim": 6, "max_dim": 8}  # fmt: skip


def model(seed=0, net=None, **options):
    return GAN.from_config({"family": "gan", "net": NET | (net or {}), "num_levels": 17, **options}, seed=seed)


def batch(b=6, channels=1, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(b, channels, size, size, generator=generator) * 2 - 1, torch.arange(b) % 3


DRAW = {"seed": 9, "sample_ids": torch.tensor([5, 900, 3, 77, 1000, 2]), "step": 41}


def fakes(gan, labels, **draw):
    z = ops.normal((len(labels), gan.generator.config.latent_dim), stream="init", **draw)
    return gan.generator(z, labels)


def test_losses_are_the_formulas():
    real, fake = (
        torch.tensor([2.0, -0.5, 0.3], dtype=torch.float64),
        torch.tensor([-1.0, 0.4, 2.0], dtype=torch.float64),
    )
    p, q = 1 / (1 + torch.exp(-real)), 1 / (1 + torch.exp(-fake))
    cross = -(torch.log(p) + torch.log(1 - q)).mean()
    expected = {
        "minimax": (cross, torch.log(1 - q).mean()),
        "non_saturating": (cross, -torch.log(q).mean()),
        "hinge": ((0.0 + 1.5 + 0.7) / 3 + (0.0 + 1.4 + 3.0) / 3, -fake.mean()),
        "wgan_gp": (fake.mean() - real.mean(), -fake.mean()),
    }
    assert set(expected) == set(LOSSES)
    for kind, (for_discriminator, for_generator) in expected.items():
        assert abs(float(discriminator_loss(kind, real, fake)) - float(for_discriminator)) < 1e-12
        assert abs(float(generator_loss(kind, fake)) - float(for_generator)) < 1e-12


@pytest.mark.parametrize("kind", LOSSES)
def test_the_turns_are_the_formulas_with_their_draws(kind):
    gan = model(loss=kind, r1_gamma=0.7, r1_every=3, gp_weight=4.0)
    x0, y = batch()
    fake = fakes(gan, y, **DRAW).detach()
    terms = gan.discriminator_terms(x0, y, **DRAW)
    x = x0.clone().requires_grad_()
    real = gan.discriminator(x, y)
    expected = discriminator_loss(kind, real, gan.discriminator(fake, y))
    if kind == "wgan_gp":
        t = ops.uniform((6, 1, 1, 1), stream="time", **DRAW)
        between = (t * x0 + (1 - t) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(gan.discriminator(between, y).sum(), between)
        penalty = 4.0 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
    else:
        (slope,) = torch.autograd.grad(real.sum(), x, retain_graph=True)
        penalty = 0.7 / 2 * 3 * (slope.flatten(1) ** 2).sum(1).mean()
        plain = gan.discriminator_terms(x0, y, **DRAW, penalise=False)
        assert plain["penalty"] == 0 and plain["loss"] < terms["loss"] and set(plain) == set(terms)
    torch.testing.assert_close(terms["penalty"], penalty, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["loss"], (expected + penalty).detach(), rtol=1e-5, atol=1e-6)
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gan.discriminator.parameters())
    assert all(p.grad is None for p in gan.generator.parameters())
    loss = gan.loss(x0, y, **DRAW)
    torch.testing.assert_close(loss, generator_loss(kind, gan.discriminator(fake, y)), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gan.generator.parameters())


def test_the_penalty_moves_the_weights_as_finite_differences_say():
    gan = model(r1_gamma=2.0, r1_every=1)
    gan.discriminator.double()
    gan.generator.double()
    x0, y = batch(2)
    x0, weight = x0.double(), gan.discriminator.blocks[0].conv.weight

    def r1():
        x = x0.clone().requires_grad_()
        (slope,) = torch.autograd.grad(gan.discriminator(x, y[:2]).sum(), x, create_graph=True)
        return slope.square().sum()

    (gradient,) = torch.autograd.grad(r1(), weight)
    for index in ((0, 0, 1, 1), (3, 0, 0, 2)):
        values = []
        for side in (1e-6, -1e-6):
            with torch.no_grad():
                weight[index] += side
            values.append(float(r1()))
            with torch.no_grad():
                weight[index] -= side
        assert abs((values[0] - values[1]) / 2e-6 - float(gradient[index])) < 1e-5 * (1 + abs(float(gradient[index])))


def test_turns_are_k_of_the_discriminator_then_one_of_the_generator():
    gan = model(discriminator_steps=3, r1_every=4)
    networks = [turn.network for turn in gan.turns(0)]
    assert networks == ["discriminator"] * 3 + ["generator"] and gan.averaged == ("generator",)
    x0, y = batch()
    turns = [turn for step in range(4) for turn in gan.turns(step)[:3]]
    penalised = [bool(turn.terms(x0, y, seed=0, step=0)["penalty"] > 0) for turn in turns]
    assert penalised == [i % 4 == 0 for i in range(12)]  # every r1_every-th turn of the discriminator, not iteration


def test_losses_are_functions_of_their_arguments():
    gan = model(augment=["translation", "cutout", "brightness"])
    x0, y = batch()
    for terms in (gan.terms, gan.discriminator_terms):
        torch.manual_seed(0)
        first = terms(x0, y, **DRAW)["loss"]
        torch.manual_seed(1)
        assert torch.equal(first, terms(x0, y, **DRAW)["loss"])
        assert not torch.equal(first, terms(x0, y, **(DRAW | {"step": 42}))["loss"])


# ---- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_the_formula_image_by_image(channels):
    x, _ = batch(6, channels, 16)
    out = {name: diff_augment.augment(x, [name], **DRAW) for name in diff_augment.POLICIES}
    u = ops.uniform((6, 7), stream="uniform", **DRAW)
    for b in range(6):
        bright, saturate, contrast, down, right, top, left = u[b].tolist()
        torch.testing.assert_close(out["brightness"][b], x[b] + bright - 0.5)
        mean = x[b].mean(0, keepdim=True)
        torch.testing.assert_close(out["saturation"][b], mean + (x[b] - mean) * 2 * saturate)
        torch.testing.assert_close(out["contrast"][b], x[b].mean() + (x[b] - x[b].mean()) * (contrast + 0.5))
        moved = torch.zeros_like(x[b])
        dy, dx = round((2 * down - 1) * 2), round((2 * right - 1) * 2)
        for i in range(16):
            for j in range(16):
                if 0 <= i + dy < 16 and 0 <= j + dx < 16:
                    moved[:, i, j] = x[b, :, i + dy, j + dx]
        assert torch.equal(out["translation"][b], moved)
        cut = x[b].clone()
        i, j = math.floor(top * 17) - 4, math.floor(left * 17) - 4
        cut[:, max(0, i) : max(0, i + 8), max(0, j) : max(0, j + 8)] = 0
        assert torch.equal(out["cutout"][b], cut)


def test_augmentation_draws_are_apart_and_differentiable_twice():
    x, _ = batch()
    everything = list(diff_augment.POLICIES)
    a, b = (diff_augment.augment(x, everything, part=part, **DRAW) for part in (0, 1))
    assert not torch.equal(a, b)
    alone = {"seed": 9, "step": 41, "sample_ids": DRAW["sample_ids"][2:3]}
    torch.testing.assert_close(diff_augment.augment(x[2:3], everything, part=1, **alone), b[2:3])
    assert diff_augment.augment(x, [], seed=0) is x
    wide = x.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: diff_augment.augment(v, everything, **DRAW).square(), wide[:6])
    with pytest.raises(ValueError, match="policies must be among brightness.*got 'rotation'"):
        diff_augment.augment(x, ["rotation"], seed=0)


# ---- samples -------------------------------------------------------------------------------------------------------


def test_samples_are_of_their_seed_index_and_class():
    gan = model()
    whole = gan.sample(300, seed=4)  # more than one chunk
    part = gan.sample(2, [260 % 3, 261 % 3], seed=4, first_id=260)
    torch.testing.assert_close(whole[260:262], part, rtol=1e-5, atol=1e-6)
    z = ops.normal((3, 6), seed=4, sample_ids=torch.arange(7, 10), stream="init")
    expected = gan.generator(0.5 * z, torch.tensor([1, 1, 1])).detach()
    torch.testing.assert_close(gan.sample(3, 1, seed=4, first_id=7, truncation=0.5), expected, rtol=1e-5, atol=1e-6)
    alike = gan.sample(4, 2, truncation=0.0)
    torch.testing.assert_close(alike, alike[:1].expand(4, -1, -1, -1))
    assert not whole.requires_grad and not whole.is_inference() and whole.abs().max() <= 1
    assert gan.sample(0).shape == (0, 1, 8, 8)
    assert model(net={"num_classes": 0, "in_channels": 3, "image_size": 32}).sample(2).shape == (2, 3, 32, 32)


def test_interpolation_runs_from_one_sample_to_another():
    gan = model()
    for kind in ("slerp", "lerp"):
        rows = gan.interpolate(2, [0, 2], steps=5, kind=kind, seed=3, first_id=10)
        ends = gan.sample(4, [0, 0, 2, 2], seed=3, first_id=10)
        assert rows.shape == (2, 5, 1, 8, 8)
        torch.testing.assert_close(rows[:, 0], ends[::2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows[:, -1], ends[1::2], rtol=1e-4, atol=1e-5)
        assert (rows[:, 1:] - rows[:, :-1]).abs().amax((1, 2, 3, 4)).min() > 0
    with pytest.raises(ValueError, match="kind must be one of lerp, slerp, got 'spline'"):
        gan.interpolate(1, kind="spline")
    with pytest.raises(ValueError, match="steps must be an int >= 2, got 1"):
        gan.interpolate(1, steps=1)


# ---- diagnosis -----------------------------------------------------------------------------------------------------


def test_collapse_is_called_by_name_and_health_is_not():
    x0, y = (tensor[:128] for tensor in data.digits("train"))
    gan = GAN.pretrained("digits")
    numbers, warnings = gan.diagnose(x0, y, seed=0, step=0)
    assert not warnings and set(numbers) == {"distance_ratio", "class_entropy", "overfit", "logit_gap"}
    assert 0.8 < numbers["distance_ratio"] < 1.2 and numbers["class_entropy"] > 0.9
    healthy = gan.generator.forward
    try:
        gan.generator.forward = lambda z, y: x0[:1].expand(len(z), -1, -1, -1)
        numbers, warnings = gan.diagnose(x0, y, seed=0, step=0)
    finally:
        gan.generator.forward = healthy
    assert numbers["distance_ratio"] < 0.01 and numbers["class_entropy"] == 0
    assert "collapsing" in warnings[0] and "0.00" in warnings[0] and "0.5" in warnings[0] and "r1_gamma" in warnings[0]
    assert "few classes" in warnings[1] and "0.7" in warnings[1]
    torch.nn.init.constant_(gan.discriminator.out.bias, 1000.0)
    numbers, warnings = gan.diagnose(x0, y, seed=0, step=0)
    assert numbers["overfit"] == 1 and len(warnings) == 1 and "augment" in warnings[0] and "1.00" in warnings[0]
    torch.nn.init.constant_(gan.generator.out_bias, math.nan)
    numbers, warnings = gan.diagnose(x0, y, seed=0, step=0)
    assert numbers == {} and "fakes and logits are not finite" in warnings[0]


def test_one_image_says_nothing_of_distances():
    x0, y = batch(1)
    numbers, warnings = model().diagnose(x0, y, seed=0, step=0)
    assert "distance_ratio" not in numbers and not any("collapsing" in text for text in warnings)


def test_diagnosis_of_other_models():
    x0, y = batch(12)
    numbers, _ = model(loss="wgan_gp").diagnose(x0, y, seed=0, step=5)
    assert "overfit" not in numbers
    numbers, _ = model(net={"num_classes": 0}).diagnose(x0, None, seed=0, step=5)
    assert "class_entropy" not in numbers and all(math.isfinite(value) for value in numbers.values())


# ---- learning, files, bad arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_learns_a_simple_colour(kind):
    gan = model(net={"num_classes": 0, "in_channels": 3}, loss=kind, r1_gamma=0.1, r1_every=2)
    target = torch.tensor([0.8, -0.5, 0.1]).view(1, 3, 1, 1)
    x0 = target + 0.1 * ops.normal((16, 3, 8, 8), seed=0)
    optimizers = {n: torch.optim.Adam(net.parameters(), 3e-3, betas=(0.5, 0.99)) for n, net in gan.networks.items()}
    before = float((gan.sample(16) - target).mean((0, 2, 3)).abs().max())
    for step in range(80):
        for place, turn in enumerate(gan.turns(step)):
            loss = turn.terms(x0, None, seed=0, step=2 * step + place)["loss"]
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            optimizers[turn.network].step()
    after = float((gan.sample(16) - target).mean((0, 2, 3)).abs().max())
    assert after < 0.5 * before, (before, after)


def test_bad_arguments_are_named():
    gan = model()
    refused = {"loss": ("lsgan", "loss must be one of minimax"), "discriminator_steps": (0, "must be an int >= 1"),
               "r1_gamma": (-1.0, "r1_gamma must be a finite number >= 0"), "augment": ("cutout", "a list of names"),
               "num_levels": (1, "num_levels must be an int")}  # fmt: skip
    for name, (value, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            GAN.from_config(gan.config() | {name: value})
    for value in (-0.1, 1.5, math.nan, True):
        with pytest.raises(ValueError, match=r"truncation must be in \[0, 1\]"):
            gan.sample(1, truncation=value)
    for change, message in (
        ({"family": "vae"}, "entry 'family' must be 'gan'"), ({"net": {"name": "dit"}}, "entry 'net' must be a dict"),
        ({"gama": 1}, "got 'gama'"), ({"net": NET | {"dim": 3}}, "config fields must be among.*got dim"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            GAN.from_config(gan.config() | change)
    with pytest.raises(TypeError, match="a label for every image"):
        gan.loss(batch()[0], None, seed=0)
    with pytest.raises(RuntimeError, match="no likelihood"):
        gan.log_prob(batch()[0])
    torch.nn.init.constant_(gan.generator.out_bias, math.nan)
    with pytest.raises(FloatingPointError, match="2 of 2 images are not finite"):
        gan.sample(2, check_finite=True)


def test_save_and_load_keep_everything(tmp_path):
    gan = model(loss="hinge", discriminator_steps=2, augment=["cutout"], net={"stddev_group": 3})
    gan.save(tmp_path / "gan.safetensors")
    again = models.load(tmp_path / "gan.safetensors")
    assert isinstance(again, GAN) and again.config() == gan.config()
    x0, y = batch()
    assert torch.equal(again.loss(x0, y, **DRAW), gan.loss(x0, y, **DRAW))


def test_the_shipped_model_meets_its_bars():
    gan = GAN.pretrained("digits")
    labels = data.digits("train")[1]
    reports = [evaluate_samples(gan.sample(1437, labels, seed=seed), labels) for seed in range(3)]
    report = Report({name: sum(each[name] for each in reports) / 3 for name in reports[0]})  # as the record's means
    assert report.passes(GAN.bars), report.failures(GAN.bars)
    assert report["knn_accuracy"] > 0.97 and report["nn_distance_ratio"] > 0.7


def test_the_shipped_model_is_small_and_says_how_it_was_made():
    folder = Path(models.__file__).resolve().parents[1] / "pretrained"
    path = folder / "gan_digits.safetensors"
    assert path.stat().st_size < 2_000_000
    record = json.loads((folder / "gan_digits.json").read_text(encoding="utf-8"))
    _, config = checkpoint.read(path)
    assert record["train"] == config["extra"]["train"] == json.loads(json.dumps(dataclasses.asdict(preset("gan"))))
    assert record["command"].startswith("genengine train gan")
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_and_samples_on_a_gpu_equal_the_cpu():
    options = {"augment": ["translation", "cutout"]}
    on_cpu, on_gpu = model(**options), model(**options).to("cuda")
    x0, y = batch()
    for name in ("terms", "discriminator_terms"):
        cpu, gpu = getattr(on_cpu, name)(x0, y, **DRAW), getattr(on_gpu, name)(x0.cuda(), y, **DRAW)
        torch.testing.assert_close(cpu["loss"], gpu["loss"].cpu(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(on_cpu.sample(6, seed=1), on_gpu.sample(6, seed=1).cpu(), rtol=1e-3, atol=1e-3)
