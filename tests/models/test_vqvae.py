"""VQ-VAE: nearest codes, the straight-through gradient, the codebook's averages and restarts, the prior."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from genengine import data, models, ops
from genengine.evaluate import evaluate_samples
from genengine.models import VQVAE, vqvae
from genengine.nets import vq
from genengine.nets.vq import Codebook, VQConfig
from genengine.train import STATE_FILE, Run, preset, train

SMALL = {"name": "vq", "image_size": 8, "in_channels": 1, "widths": (8, 8), "blocks": 1, "codes": 12, "code_dim": 4,
         "num_classes": 3}  # fmt: skip
PRIOR = {"name": "pixelcnn", "config": "codes", "dim": 8, "depth": 2, "head_dim": 8, "embedding": 4, "first_size": 3}
PRETRAINED = Path(models.__file__).resolve().parents[1] / "pretrained"


def model(net=None, prior=True, seed=0, **options):
    config = {"family": "vqvae", "net": SMALL | (net or {}), "num_levels": 17, **options}
    vae = VQVAE.from_config(config | ({"prior": PRIOR} if prior else {}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in vae.networks.values():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return vae


def batch(b=6, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 17, (b, channels, 8, 8), generator=generator) / 8 - 1, torch.arange(b) % 3


def means(measured):
    return {name: value.mean().item() for name, value in measured.items()}


# ---- the codebook ----


@pytest.mark.parametrize("budget", [1 << 24, 7 * 40])
def test_the_nearest_code_is_that_of_all_distances(budget, monkeypatch):
    monkeypatch.setattr(vq, "SEARCH_ELEMENTS", budget)
    z, codes = torch.randn(101, 5), torch.randn(40, 5)
    assert torch.equal(vq.nearest_code(z, codes), torch.cdist(z.double(), codes.double()).argmin(1))
    assert vq.nearest_code(z[:0], codes).shape == (0,)
    assert vq.nearest_code(torch.zeros(1, 2), torch.ones(3, 2)).item() == 0  # of equals the first


def test_the_nearest_code_is_found_in_full_precision_under_autocast():
    z, codes = torch.randn(500, 8) + 20, torch.randn(64, 8) + 20
    with torch.autocast("cpu", torch.bfloat16):
        found = vq.nearest_code(z, codes)
    assert torch.equal(found, vq.nearest_code(z, codes))


def test_quantising_passes_the_gradient_straight_through():
    net = model().net
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    straight, e, index = net.quantise(z)
    assert torch.equal(e, net.look_up(index)) and index.shape == (2, 4, 4)
    torch.testing.assert_close(straight, e)
    weight = torch.randn_like(z)
    (straight * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_the_gradients_go_where_the_paper_says():
    """Encoder: reconstruction through the codes, and commitment; the codebook, "loss" only: |sg[z] - e|^2."""
    vae = model(net={"update": "loss", "restart_below": 0.0}, commitment=0.3)
    x0, _ = batch()
    net, weight = vae.net, vae.net.codebook.weight
    vae.terms(x0, seed=0)["loss"].backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    z = net.encode(x0).detach()
    index = net.quantise(z)[2].flatten()
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    expected = torch.zeros_like(weight)
    for row, k in zip(rows, index.tolist(), strict=True):
        expected[k] += 2 * (weight.detach()[k] - row) / rows.numel()
    torch.testing.assert_close(grads["codebook.weight"], expected, rtol=1e-4, atol=1e-7)
    assert (expected == 0).all(1).any()  # a code that nothing falls to stays
    net.zero_grad()
    z = net.encode(x0)
    e = net.look_up(net.quantise(z)[2]).detach()
    leaf = e.clone().requires_grad_()
    (net.decode(leaf) - x0).square().mean().backward()
    (z * (leaf.grad + 0.3 * 2 * (z - e).detach() / z.numel())).sum().backward()
    for name, parameter in net.encoder.named_parameters():
        torch.testing.assert_close(grads[f"encoder.{name}"], parameter.grad, rtol=1e-3, atol=1e-6)


def codebook(**options):
    book = Codebook(VQConfig(codes=5, code_dim=3, **options))
    with torch.no_grad():
        book.weight.copy_(torch.randn(5, 3))
    return book


def test_the_averages_are_the_textbook_loop():
    book = codebook(decay=0.9, restart_below=0.0)
    use, sums = [0.0] * 5, [torch.zeros(3, dtype=torch.float64) for _ in range(5)]
    for step in range(4):
        z = torch.randn(60, 3)
        index = vq.nearest_code(z, book.weight)
        book.update(z, index, seed=0, step=step)
        for k in range(5):
            mine = z[index == k].double()
            use[k] = 0.9 * use[k] + 0.1 * len(mine)
            sums[k] = 0.9 * sums[k] + 0.1 * mine.sum(0)
        total = sum(use)
        expected = [sums[k] / ((use[k] + 1e-5) / (total + 5e-5) * total) for k in range(5)]
        torch.testing.assert_close(book.weight.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert min(use) > 0


def test_a_dead_code_restarts_on_a_row_of_the_batch():
    book = codebook(decay=0.5, restart_below=1.0)
    book.use.fill_(10.0)
    book.sums.copy_(book.weight * 10)
    book.use[3], book.use[1] = 0.5, 1.9
    z = torch.randn(40, 3)
    index = torch.zeros(40, dtype=torch.int64)  # all fall to code 0: uses are halved, 3 and 1 fall below 1
    before = book.weight.clone()
    book.update(z, index, seed=7, step=11)
    u = ops.uniform((1, 5), seed=7, step=11, stream="model")[0].double()
    for k in (1, 3):
        row = z[int(u[k] * 40)]
        assert torch.equal(book.weight[k], row) and book.use[k] == 1.0 and torch.equal(book.sums[k], row)
    for k in (2, 4):
        torch.testing.assert_close(book.weight[k], before[k], rtol=1e-4, atol=1e-5)
    again = codebook(decay=0.5, restart_below=0.0)
    again.use.zero_()
    kept = again.weight.clone()
    again.restart_below, again.learned = 0.0, True
    again.update(z, index, seed=7, step=11)
    assert torch.equal(again.weight, kept)  # never, when it is off


def test_only_training_moves_the_codebook():
    vae = model()
    x0, labels = batch(20)
    before = {name: buffer.clone() for name, buffer in vae.net.named_buffers()}
    vae.eval().terms(x0, seed=0)
    vae.reconstruct(x0), vae.measure(x0, labels), vae.train().prior_terms(x0, labels, seed=0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in vae.net.named_buffers())
    vae.terms(x0, seed=0)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in vae.net.named_buffers())


def test_the_same_arguments_give_the_same_loss_and_codebook():
    first, second = model(), model()
    x0, labels = batch(20)
    losses = []
    for vae in (first, second):
        losses.append(vae.loss(x0, labels, seed=3, step=2))
        torch.manual_seed(5)
    assert torch.equal(*losses)
    for a, b in zip(first.net.buffers(), second.net.buffers(), strict=True):
        assert torch.equal(a, b)


def test_perplexity_counts_codes_in_even_use():
    assert vqvae.perplexity(torch.tensor([0, 1, 2, 3] * 5), 9).item() == pytest.approx(4.0)
    assert vqvae.perplexity(torch.zeros(7, dtype=torch.int64), 9).item() == pytest.approx(1.0)


def test_a_collapsed_codebook_is_reported():
    vae = model(net={"codes": 64})
    x0, labels = batch()
    with torch.no_grad():
        vae.net.codebook.weight.fill_(1e3)
        vae.net.codebook.weight[0] = 0.0
    assert vae.diagnose(x0, labels, seed=0, step=0)[1] == ["codebook: only 1.0 of 64 codes are used"]


# ---- images and samples ----


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_colour_and_other_sizes(update):
    net = {"in_channels": 3, "image_size": 16, "widths": (8, 8, 8), "update": update, "num_classes": 0}
    vae = model(net=net)
    x0 = torch.rand(3, 3, 16, 16) * 2 - 1
    vae.loss(x0, seed=0).backward()
    vae.prior_terms(x0, seed=0)["loss"].backward()
    codes = vae.encode(x0)
    assert codes.shape == (3, 4, 4) and vae.decode(codes).shape == x0.shape
    assert torch.equal(vae.reconstruct(x0), vae.decode(codes)) and vae.reconstruct(x0).abs().max() <= 1
    assert vae.interpolate(x0, x0.flip(0), 4).shape == (3, 4, 3, 16, 16)
    torch.testing.assert_close(vae.interpolate(x0, x0.flip(0), 4)[:, 0], vae.reconstruct(x0), rtol=1e-4, atol=1e-4)
    assert vae.sample(2).shape == (2, 3, 16, 16) and vae.sample(0).shape == (0, 3, 16, 16)


def test_sampling_draws_code_after_code():
    vae = model(seed=2)
    labels = torch.tensor([0, 2, 1])
    ids = torch.arange(4, 7)
    u = ops.uniform((3, 16), seed=5, sample_ids=ids, stream="uniform")
    codes = torch.zeros(3, 4, 4, dtype=torch.int64)
    for place in range(16):
        row, column = divmod(place, 4)
        with torch.no_grad():
            logits = vae.networks["prior"](vae.prior.pixels(codes)[:, None], labels)[:, :, 0, row, column]
        p = torch.softmax(logits.double() / 0.7, 1).cumsum(1)
        codes[:, row, column] = (p <= u[:, place, None]).sum(1)
    assert len(codes.unique()) > 3
    found = vae.sample(3, labels, seed=5, first_id=4, temperature=0.7)
    torch.testing.assert_close(found, vae.decode(codes), rtol=1e-4, atol=1e-4)
    alone = vae.sample(1, [1], seed=5, first_id=6, temperature=0.7)
    torch.testing.assert_close(found[2:], alone, rtol=1e-4, atol=1e-4)


def test_a_prior_without_classes_learns_from_labelled_images():
    run = Run(preset("vqvae", "smoke", model={"prior": {"num_classes": 0}}, batch_size=8))
    assert torch.isfinite(run.train_step()["prior/loss"])
    x0, labels, _ = run.dataset.batch(torch.arange(4))
    measured = run.model.measure(x0, labels)
    assert run.model.num_classes == 0 and measured["bits_per_code"].shape == (4,)


def test_the_prior_learns_the_codes_and_nothing_else_moves():
    vae = model()
    x0, labels = batch(20)
    terms = vae.prior_terms(x0, labels, seed=0)
    codes = vae.encode(x0)
    with torch.no_grad():
        logits = vae.networks["prior"](vae.prior.pixels(codes)[:, None], labels)[:, :, 0]
    expected = torch.nn.functional.cross_entropy(logits, codes)
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-4, atol=1e-5)
    terms["loss"].backward()
    assert all(p.grad is None for p in vae.net.parameters())
    assert all(p.grad is not None for p in vae.networks["prior"].parameters())
    assert [turn.network for turn in vae.turns(0)] == ["net", "prior"]
    assert [turn.network for turn in model(prior=False).turns(0)] == ["net"]
    measured = means(vae.measure(x0, labels))
    assert measured["bits_per_code"] == pytest.approx(expected.item() / 0.6931472, rel=1e-4)
    assert measured["reconstruction_mse"] == pytest.approx((vae.reconstruct(x0) - x0).square().mean().item())


def test_bad_arguments_are_refused():
    with pytest.raises(RuntimeError, match="the model has no prior"):
        model(prior=False).sample(2)
    with pytest.raises(RuntimeError, match="this family has no likelihood"):
        model().log_prob(batch()[0])
    vae = model()
    for index in (torch.zeros(2, 3, 3, dtype=torch.int64), torch.zeros(2, 4, 4)):
        with pytest.raises(ValueError, match=r"index must be \(B, 4, 4\) int64"):
            vae.decode(index)
    with pytest.raises(ValueError, match=r"index must be in 0 \.\. 11, got 12"):
        vae.decode(torch.full((1, 4, 4), 12))
    with pytest.raises(ValueError, match=r"x0 must be floating point \(B, C, H, W\)"):
        vae.encode(torch.zeros(1, 1, 9, 9))
    for config, message in (
        ({"net": SMALL, "family": "vae"}, "entry 'family' must be 'vqvae'"),
        ({"net": {"name": "vae"}}, "entry 'net' must be a dict with the name 'vq'"),
        ({"net": SMALL, "prior": {"name": "dit"}}, "entry 'prior' must be a dict with the name 'pixelcnn'"),
        ({"net": SMALL, "gamma": 1}, "entries must be among family, net, prior, commitment, num_levels, got 'gamma'"),
        ({"net": SMALL | {"update": "adam"}}, "update must be one of ema, loss"),
        ({"net": SMALL | {"image_size": 9}}, "image_size must be a multiple of"),
        ({"net": SMALL | {"codes": 1}}, "codes must be an int >= 2"),
        ({"net": SMALL | {"decay": 1.0}}, r"decay must be a number in \[0, 1\)"),
        ({"net": SMALL, "commitment": -1}, "commitment must be a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            VQVAE.from_config({"family": "vqvae", **config})
    other = model(net={"codes": 13}).networks["prior"]
    with pytest.raises(ValueError, match=r"prior must have .* = 4, 1, 12, which the codes have, got \(4, 1, 13\)"):
        VQVAE(vae.net, other)


def test_save_and_load_keep_everything(tmp_path):
    for prior in (True, False):
        vae = model(prior=prior, commitment=0.5)
        vae.terms(batch(20)[0], seed=0)  # moves the codebook
        vae.save(tmp_path / "vq.safetensors", extra={"note": 1})
        again = models.load(tmp_path / "vq.safetensors")
        assert isinstance(again, VQVAE) and again.config() == vae.config()
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())


def test_training_learns_and_resumes_to_the_same_bits(tmp_path):
    config = preset("vqvae", "smoke", steps=24, batch_size=32, ema_decay=0.5)
    trained = VQVAE.load(train(config, tmp_path / "whole", progress=False))
    measured = means(trained.measure(*data.digits("test")))
    assert measured["reconstruction_mse"] < 0.5 and measured["perplexity"] > 3  # the mean image: 0.30; grey: 0.7
    part = Run(config)
    for _ in range(9):
        part.train_step()
    (tmp_path / "parts").mkdir()
    part.save(tmp_path / "parts" / STATE_FILE)
    resumed = VQVAE.load(train(config, tmp_path / "parts", resume=True, progress=False))
    mine, theirs = trained.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_the_shipped_model_meets_every_bar():
    vae = VQVAE.pretrained("digits")
    x0, labels = data.digits("test")
    measured = means(vae.measure(x0, labels))
    assert measured["reconstruction_mse"] < 0.02 and measured["perplexity"] > 0.5 * vae.net.config.codes
    labels = data.digits("train")[1]
    report = evaluate_samples(vae.sample(1437, labels, seed=0), labels)
    report.update(measured)
    assert not report.failures(VQVAE.bars), report.failures(VQVAE.bars)


def test_the_shipped_file_is_the_one_recorded():
    record = json.loads((PRETRAINED / "vqvae_digits.json").read_text(encoding="utf-8"))
    assert record["test"]["failures"] == record["validation"]["failures"] == []
    assert record["sha256"] == hashlib.sha256((PRETRAINED / "vqvae_digits.safetensors").read_bytes()).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives():
    on_cpu, on_gpu = model(), model().to("cuda")
    x0, labels = batch(40)
    losses = on_cpu.loss(x0, seed=1), on_gpu.loss(x0.cuda(), seed=1).cpu()
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    codes = on_cpu.encode(x0)
    torch.testing.assert_close(on_cpu.decode(codes), on_gpu.decode(codes).cpu(), rtol=1e-3, atol=1e-3)
    first, second = (model().to("cuda") for _ in range(2))
    for vae in (first, second):
        vae.terms(x0.cuda(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.net.buffers(), second.net.buffers(), strict=True))
