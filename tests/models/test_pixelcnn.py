"""PixelCNN: the likelihood is exact, sampling is the pixel-by-pixel loop, and samples come as often as they should."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genengine import data, models, ops
from genengine.models import PixelCNN, checkpoint
from genengine.models.pixelcnn import ORDERS
from genengine.ops._categorical import inverse_cdf, log_prob
from genengine.train import preset

NET = {"name": "pixelcnn", "image_size": 6, "in_channels": 1, "num_classes": 3, "dim": 6, "depth": 3, "first_size": 3,
       "head": "categorical", "head_dim": 24}  # fmt: skip
COLOUR = {"in_channels": 3, "image_size": 5}
MIXTURE = {"in_channels": 3, "image_size": 16, "head": "logistic_mixture", "components": 3}


def model(seed=0, num_levels=5, scale=0.4, class_drop=0.1, **net):
    """A small model with every weight filled, so that a pixel matters to all that come after it."""
    config = {"family": "pixelcnn", "net": NET | net, "num_levels": num_levels, "class_drop": class_drop}
    made = PixelCNN.from_config(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return made


def images(made, b=4):
    levels = torch.randint(made.num_levels, (b, *made.image_shape), generator=torch.Generator().manual_seed(1))
    return made.pixels(levels)


def all_images(made):
    count = math.prod(made.image_shape)
    levels = torch.tensor(list(itertools.product(range(made.num_levels), repeat=count)))
    return made.pixels(levels.view(-1, *made.image_shape))


TINY = [
    pytest.param({"image_size": 2}, 2, id="binary"),
    pytest.param({"image_size": 2, "in_channels": 2}, 2, id="two channels"),
    pytest.param({"image_size": 2, "head": "logistic_mixture", "components": 3}, 4, id="mixture"),
    pytest.param({"image_size": 1, "in_channels": 3, "head": "logistic_mixture"}, 6, id="coloured mixture"),
    pytest.param({"image_size": 2, "embedding": 3}, 3, id="table"),
    pytest.param({"image_size": 2, "mode": "plain"}, 3, id="plain"),
]


@pytest.mark.parametrize(("net", "levels"), TINY)
def test_probabilities_of_all_images_add_up_to_one(net, levels):
    made = model(num_levels=levels, **net)
    everything = all_images(made)
    for label in range(3):
        total = made.log_prob(everything, label).double().exp().sum()
        assert abs(float(total) - 1) < 1e-5
    for marginal in ("mixture", "null_class"):
        log_prob = made.log_prob(everything, marginal=marginal)
        assert abs(float(log_prob.double().exp().sum()) - 1) < 1e-5
        assert log_prob.std() > 0.3  # far from uniform: the sum says something


def test_samples_come_as_often_as_their_probability_says():
    made = model(num_levels=2, image_size=2)
    everything, num = all_images(made), 40000
    expected = made.log_prob(everything, 1).double().exp()
    samples = made.sample(num, 1, seed=3)
    code = (samples.flatten(1) > 0).long() @ torch.tensor([8, 4, 2, 1])
    counts = torch.bincount(code, minlength=16).double()
    chi2 = float(((counts - num * expected).square() / (num * expected)).sum())
    assert chi2 < 44.3, chi2  # 15 degrees of freedom: once in 10,000
    # labels None: every class as often, which is what the mixture says
    mixture = made.log_prob(everything).double().exp()
    code = (made.sample(30000, seed=4).flatten(1) > 0).long() @ torch.tensor([8, 4, 2, 1])
    counts = torch.bincount(code, minlength=16).double()
    assert float(((counts - 30000 * mixture).square() / (30000 * mixture)).sum()) < 44.3


def test_log_prob_is_the_sum_over_pixels():
    made = model(**COLOUR)
    x, y = images(made), torch.tensor([0, 2, 1, 1])
    log_p = torch.log_softmax(made.net(x, y).double(), dim=1)  # (B, L, C, H, W)
    expected = torch.zeros(4, dtype=torch.float64)
    for b, c, i, j in itertools.product(range(4), range(3), range(5), range(5)):
        level = round((float(x[b, c, i, j]) + 1) * 2)
        expected[b] += log_p[b, level, c, i, j]
    torch.testing.assert_close(made.log_prob(x, y).double(), expected, rtol=1e-5, atol=1e-5)
    each = torch.stack([made.log_prob(x, label) for label in range(3)]).double()
    torch.testing.assert_close(made.log_prob(x).double(), torch.logsumexp(each, 0) - math.log(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.bits_per_dim(x, y).double(), -expected / (75 * math.log(2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.log_prob(x + 0.1, y), made.log_prob(x, y), rtol=0, atol=0)  # nearest levels
    assert made.log_prob(x, y).requires_grad is False


def test_the_loss_is_the_likelihood_of_images_with_some_labels_hidden():
    made = model(class_drop=0.5)
    x, y = images(made, 6), torch.arange(6) % 3
    ids = torch.tensor([5, 900, 3, 77, 1000, 2])
    draw = {"seed": 9, "sample_ids": ids, "step": 4}
    terms = made.terms(x, y, **draw)
    hidden = ops.uniform((6, 1), stream="class_drop", **draw)[:, 0] < 0.5
    assert 0 < int(hidden.sum()) < 6
    nats = [made.log_prob(x[i : i + 1], None if hidden[i] else y[i : i + 1], marginal="null_class") for i in range(6)]
    torch.testing.assert_close(terms["loss"], -torch.cat(nats).mean() / 36, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["bits_per_dim"], terms["loss"].detach() / math.log(2))
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.net.parameters())


def test_dropout_is_of_the_counter_noise():
    made = model(dropout=0.4)
    x, y = images(made), torch.arange(4) % 3
    torch.manual_seed(0)
    first = made.loss(x, y, seed=3, step=2)
    torch.manual_seed(1)
    assert torch.equal(first, made.loss(x, y, seed=3, step=2))
    assert not torch.equal(first, made.loss(x, y, seed=3, step=3))
    assert torch.equal(made.log_prob(x, y), made.log_prob(x, y))  # no dropout outside training


def test_inverse_cdf_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 17, 2, generator=generator)
    u = torch.rand(50, 2, generator=generator).clamp(1e-6, 1 - 1e-6)
    level = inverse_cdf(logits, u, 0.7)
    for b, k in itertools.product(range(50), range(2)):
        weights = np.exp((logits[b, :, k].double().numpy() - float(logits[b, :, k].max())) / 0.7)
        sums = np.cumsum(weights)
        target = float(u[b, k]) * sums[-1]
        edge = np.abs(sums / sums[-1] - float(u[b, k])).min() < 1e-6
        assert edge or int(level[b, k]) == int((sums[:-1] <= target).sum())
    ends = torch.tensor([[0.0, 5.0, -200.0]])
    assert inverse_cdf(ends, torch.tensor([1 - 2.0**-24])).tolist() == [1]
    assert inverse_cdf(ends, torch.tensor([2.0**-24])).tolist() == [0]
    assert inverse_cdf(torch.full((1, 4), -1e30), torch.tensor([0.6])).tolist() == [2]
    expected = torch.distributions.Categorical(logits=logits.double().movedim(1, -1) / 0.7).log_prob(level)
    torch.testing.assert_close(log_prob(logits, level, 0.7).double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def naive(made, labels, temperature, seed, ids, given=None, known=None):
    """Pixel by pixel, a whole forward pass for each, straight from the documentation."""
    c, size, _ = made.image_shape
    x = torch.zeros(len(ids), *made.image_shape)
    if known is not None:
        x = torch.where(known, given, x)
    for i, j in itertools.product(range(size), range(size)):
        if made.net.config.head == "categorical":
            u = ops.uniform((len(ids), size * size * c), seed=seed, sample_ids=ids, stream="uniform")
            for channel in range(c):
                logits = made.net(x, labels)[:, :, channel, i, j]
                level = inverse_cdf(logits, u[:, (i * size + j) * c + channel], temperature)
                new = 2 * level / (made.num_levels - 1) - 1
                if known is not None:
                    new = torch.where(known[:, channel, i, j], given[:, channel, i, j], new)
                x[:, channel, i, j] = new
        else:
            drawn = ops.logistic_mixture_sample(
                made.net(x, labels), channels=c, bins=made.num_levels, temperature=temperature, seed=seed,
                sample_ids=ids,
            )  # fmt: skip
            x[:, :, i, j] = drawn[:, :, i, j]
    return x


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "net", [{}, COLOUR, MIXTURE, {"image_size": 11, "depth": 2}, {"embedding": 4}],
    ids=["grey", "colour", "mixture", "rows cropped", "table"],
)  # fmt: skip
def test_sampling_is_the_pixel_by_pixel_loop_bit_for_bit(net, temperature):
    made = model(**net)
    labels = torch.tensor([0, 1, 2, 1])
    ids = torch.arange(7, 11)
    expected = naive(made, labels, temperature, 11, ids)
    for order in ORDERS:
        got = made.sample(4, labels, seed=11, first_id=7, temperature=temperature, order=order)
        assert torch.equal(got, expected), order
    assert got.std() > 0.1 and torch.equal(made.pixels(made.levels(got)), got)
    assert not got.requires_grad and not got.is_inference()


def test_a_sample_does_not_depend_on_its_batch():
    for net in ({}, MIXTURE | {"image_size": 7}):
        made = model(**net)
        whole = made.sample(6, [0, 1, 2, 0, 1, 2], seed=4)
        part = made.sample(2, [2, 0], seed=4, first_id=2)
        # a pixel may fall into the next level if rounding moves an edge over its uniform: not here
        torch.testing.assert_close(whole[2:4], part)
        assert torch.equal(whole, made.sample(6, seed=4)) and not torch.equal(whole, made.sample(6, seed=5))


def test_what_was_drawn_before_ctrl_c_is_returned(monkeypatch):
    made = model()
    whole = made.sample(70, seed=3)
    rows = []

    class Bar:
        def update(self, count):
            rows.append(count)
            if len(rows) == 9:  # of the second batch the third row
                raise KeyboardInterrupt

    monkeypatch.setattr("genengine.models.pixelcnn.progress_bar", lambda *_: contextlib.nullcontext(Bar()))
    with pytest.warns(UserWarning, match="interrupted after 64 images and 3 of 6 rows of 6 more"):
        part = made.sample(70, seed=3, order="raster", progress=True)
    assert torch.equal(part[:64], whole[:64]) and torch.equal(part[64:, :, :3], whole[64:, :, :3])
    assert not part[64:, :, 3:].any()
    rows[:] = [None] * 8  # of the first batch the first row, and nothing of the second: what is known stays in all
    known = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    known[..., 4, 2] = True
    with pytest.warns(UserWarning, match="interrupted after 0 images and 1 of 6 rows of 64 more"):
        part = made.sample(70, seed=3, order="raster", progress=True, given=torch.ones(1, 1, 6, 6), known=known)
    assert (part[:, 0, 4, 2] == 1).all() and part[:, :, 1:].count_nonzero() == 70


def test_few_passes_are_needed():
    made = PixelCNN.from_config({"net": {"name": "pixelcnn", "config": "tiny"}, "num_levels": 17})
    calls = []
    forward = made.net.forward
    made.net.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    made.sample(8, seed=0, order="fixed_point")
    assert len(calls) <= 2  # untrained, pixels are independent: one pass, and one that finds no change


def test_completion_keeps_what_is_given():
    made = model()
    given = images(made, 3)
    known = torch.zeros(3, 1, 6, 6, dtype=torch.bool)
    known[:, :, :3] = True
    known[1, :, 4, 2] = True
    out = made.sample(3, [0, 1, 2], seed=2, given=given, known=known)
    assert torch.equal(out[known], given[known]) and not torch.equal(out, given)
    expected = naive(made, torch.tensor([0, 1, 2]), 1.0, 2, torch.arange(3), given, known)
    assert torch.equal(out, expected)
    free = made.sample(3, [0, 1, 2], seed=2)
    assert not torch.equal(out[:, :, 3:], free[:, :, 3:])  # what is given matters to what follows
    one = made.sample(3, [0, 1, 2], seed=2, given=given[:1], known=known[:1])
    assert torch.equal(one[:, :, :3], given[:1, :, :3].expand(3, -1, -1, -1))
    assert torch.equal(made.sample(3, seed=2, given=given, known=known | True), given)


def test_completion_is_conditional_on_what_comes_before():
    made = model(num_levels=2, image_size=2, num_classes=0)
    everything = all_images(made)
    first = everything.flatten(1)[:, 0] > 0
    expected = made.log_prob(everything).double().exp()
    expected = torch.where(first, expected, 0.0) / expected[first].sum()
    given, known = torch.ones(1, 1, 2, 2), torch.tensor([[True, False], [False, False]]).view(1, 1, 2, 2)
    samples = made.sample(20000, seed=1, given=given, known=known)
    code = (samples.flatten(1) > 0).long() @ torch.tensor([8, 4, 2, 1])
    counts, wanted = torch.bincount(code, minlength=16).double()[8:], 20000 * expected[8:]
    assert float(((counts - wanted).square() / wanted).sum()) < 29.9  # 7 degrees of freedom: once in 10,000


def test_coloured_mixture_learns():
    made = PixelCNN.from_config({"net": NET | MIXTURE | {"num_classes": 0, "dim": 12}, "num_levels": 256})
    assert made.image_shape == (3, 16, 16)
    column = torch.linspace(-0.8, 0.8, 16)
    across = column.expand(16, 16)
    x = torch.stack([across, across.T, -across]).expand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(made.net.parameters(), lr=3e-3)
    before = float(made.bits_per_dim(x).mean())
    for step in range(25):
        loss = made.loss(x, seed=0, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(made.bits_per_dim(x).mean()) < before - 1
    out = made.sample(2, seed=0)
    assert out.shape == (2, 3, 16, 16) and out.abs().max() <= 1 and torch.equal(made.pixels(made.levels(out)), out)


def test_bad_arguments_are_named():
    made = model()
    x = images(made)
    for temperature in (0.0, -1, math.nan, True, "hot"):
        with pytest.raises(ValueError, match="temperature must be in"):
            made.sample(1, temperature=temperature)
    with pytest.raises(ValueError, match="given and known must come together"):
        made.sample(4, given=x)
    with pytest.raises(ValueError, match="known must be a bool tensor"):
        made.sample(4, given=x, known=torch.ones(4, 1, 6, 6))
    with pytest.raises(ValueError, match=r"must broadcast to \(num, C, H, W\) = \(3, 1, 6, 6\), got \(4"):
        made.sample(3, given=x, known=x > 0)
    with pytest.raises(ValueError, match="x0 must be floating point"):
        made.log_prob(x[..., :4])
    with pytest.raises(ValueError, match="marginal must be one of"):
        made.log_prob(x, marginal="uniform")
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 2, got 3"):
        made.log_prob(x, 3)
    with pytest.raises(ValueError, match=r"class_drop must be in \[0, 1\)"):
        model(class_drop=1.0)
    with pytest.raises(ValueError, match="order must be one of raster, wavefront, naive, fixed_point or None"):
        made.sample(1, order="spiral")
    with torch.no_grad():
        made.net.out.conv.weight.mul_(1e38)
    for order in ("fixed_point", "raster"):
        with pytest.raises(FloatingPointError, match="output is not finite"):
            made.sample(1, order=order, check_finite=True)
    torch.nn.init.constant_(made.net.out.conv.bias, math.nan)
    with pytest.raises(FloatingPointError, match="output is not finite"):
        made.sample(1, order="fixed_point", check_finite=True)
    with pytest.raises(ValueError, match="logits_bias has values that are not finite"):
        made.sample(1, order="raster")
    config = made.config()
    for change, message in (
        ({"family": "vae"}, "entry 'family' must be 'pixelcnn'"), ({"net": {"name": "dit"}}, "entry 'net' must be"),
        ({"num_levels": 7}, "entry 'num_levels' must be the network's = 5"), ({"clas_drop": 0.1}, "got 'clas_drop'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PixelCNN.from_config(config | change)


def test_no_samples_are_an_empty_tensor():
    made = model()
    assert made.sample(0).shape == (0, 1, 6, 6) and made.sample(0, []).shape == (0, 1, 6, 6)
    assert made.log_prob(images(made, 0), []).shape == (0,)
    assert model(num_classes=0).sample(2).shape == (2, 1, 6, 6)


def test_save_and_load_keep_everything(tmp_path):
    for net in ({}, COLOUR | {"embedding": 2}, MIXTURE | {"num_classes": 0}):
        made = model(**net, class_drop=0.25)
        made.save(tmp_path / "it.safetensors", extra={"note": 1})
        again = models.load(tmp_path / "it.safetensors")
        assert isinstance(again, PixelCNN) and again.config() == made.config()
        x = images(made)
        assert torch.equal(again.log_prob(x), made.log_prob(x))


def test_a_prior_over_codes():
    config = {"net": {"name": "pixelcnn", "config": "codes", "dim": 16, "depth": 2}}
    fitted = PixelCNN.fit_config(config, (1, 4, 4), 0, 64)
    prior = PixelCNN.from_config(fitted)
    assert prior.num_levels == 64 and prior.net.config.embedding == 64
    codes = torch.randint(64, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.levels(prior.pixels(codes)), codes)
    torch.testing.assert_close(prior.bits_per_dim(prior.pixels(codes)), torch.full((5,), 6.0))
    drawn = prior.levels(prior.sample(40))
    assert drawn.min() >= 0 and drawn.max() < 64 and len(drawn.unique()) > 50


def test_the_shipped_model_meets_its_bars():
    made = PixelCNN.pretrained("digits")
    x, y = data.digits("test")
    conditional = float(made.bits_per_dim(x, y).mean())
    unconditional = float(made.bits_per_dim(x).mean())
    assert conditional <= 1.69 and unconditional <= 1.79, (conditional, unconditional)
    assert unconditional <= conditional + math.log2(10) / 64 + 1e-6
    samples = made.sample(60, seed=0)
    itself = float(made.bits_per_dim(samples, torch.arange(60) % 10).mean())
    assert abs(itself - conditional) < 0.25  # samples are as likely as data


def test_the_shipped_model_is_small_and_says_how_it_was_made():
    folder = Path(models.__file__).resolve().parents[1] / "pretrained"
    path = folder / "pixelcnn_digits.safetensors"
    assert path.stat().st_size < 2_000_000
    record = json.loads((folder / "pixelcnn_digits.json").read_text(encoding="utf-8"))
    _, config = checkpoint.read(path)
    wanted = json.loads(json.dumps(dataclasses.asdict(preset("pixelcnn"))))
    assert record["train"] == config["extra"]["train"] == wanted
    assert record["command"].startswith("genengine train pixelcnn")
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_likelihood_on_a_gpu_equals_the_cpu():
    on_cpu, on_gpu = model(), model().to("cuda")
    x, y = images(on_cpu), torch.arange(4) % 3
    torch.testing.assert_close(on_cpu.log_prob(x, y), on_gpu.log_prob(x, y).cpu(), rtol=1e-4, atol=1e-4)
    samples = on_gpu.sample(16, seed=0)
    assert samples.is_cuda and (samples.cpu() == on_cpu.sample(16, seed=0)).float().mean() > 0.9
