"""What every family owes the training loop, the command line and its users; a new one is tested by being registered."""

import dataclasses
import hashlib
import json

import pytest
import torch

from genengine import data, models
from genengine.models import FAMILIES, checkpoint
from genengine.models.base import PRETRAINED
from genengine.train import Run, preset, train

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(family, **overrides):
    return preset(family, "smoke", **({"steps": 6, "batch_size": 8, "warmup": 2, "seed": 5} | overrides))


def trained(family, steps=3, dataset=None, **overrides):
    """A run after a few steps, so that nothing is still at the zeros it began with."""
    run = Run(config_of(family, **overrides), dataset=dataset)
    for _ in range(steps):
        run.train_step()
    return run


# What a preset for small grey digits must change for colour at 16 x 16.
COLOUR = {
    "ddpm": {"model": {"net": {"attention": [8]}}},
    "pixelcnn": {"model": {"net": {"head": "logistic_mixture"}}},
}


def colour(size=16, classes=True):
    images = data.load(f"shapes-{size}", "all")
    return images if classes else dataclasses.replace(images, class_names=(), labels=torch.zeros_like(images.labels))


def bits(tensors):
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


def labels_for(model, labels):
    return labels if model.num_classes else None


def close_enough(a, b):
    """Equal up to rounding; where levels are drawn, a pixel at the edge of two may fall on either."""
    return ((a - b).abs() > 1e-4).float().mean() < 0.02


def test_the_loss_is_a_function_of_its_arguments(family):
    run = trained(family)
    x0, labels, ids = run.dataset.batch(torch.tensor([3, 50, 700, 9]))
    for turn in run.model.turns(0):
        losses = []
        run.model.networks[turn.network].requires_grad_(True)
        for chance, step in ((0, 4), (1, 4), (0, 5)):
            torch.manual_seed(chance)
            run.model.train()
            kept = {k: v.clone() for k, v in run.model.state_dict().items()}
            terms = turn.terms(x0, labels, seed=7, sample_ids=ids, step=step)
            run.model.load_state_dict(kept, "memory")  # codebooks move as they learn
            assert all(value.shape == () and torch.isfinite(value) for value in terms.values())
            losses.append(terms["loss"].item())
        assert losses[0] == losses[1]  # whatever the global generator
        assert terms["loss"].requires_grad


def test_a_resumed_run_has_the_same_bits(family, tmp_path):
    whole, part = trained(family, 6), trained(family, 3)
    part.save(tmp_path / "state.safetensors")
    again = Run(config_of(family))
    again.restore(tmp_path / "state.safetensors")
    torch.rand(5)  # the global generator must not matter
    for _ in range(3):
        again.train_step()
    assert bits(whole.state()[0]) == bits(again.state()[0])


def test_training_moves_every_network_and_keeps_the_average(family, tmp_path):
    run = trained(family, 4)
    fresh = Run(config_of(family)).model.state_dict()
    state = run.model.state_dict()
    for name in run.model.networks:
        prefix = "" if len(run.model.networks) == 1 else f"{name}."
        moved = [not torch.equal(fresh[key], state[key]) for key in state if key.startswith(prefix)]
        assert sum(moved) > 0.5 * len(moved), name
    path = train(config_of(family), tmp_path, progress=False)
    model = models.load(path)
    assert type(model) is FAMILIES[family] and not any(n.training for n in model.networks.values())
    assert model.config() == FAMILIES[family].from_pretrained(tmp_path).config()
    assert json.loads((tmp_path / "config.json").read_text())["family"] == family


def test_a_model_survives_its_file(family, tmp_path):
    model = trained(family).averaged_model()
    model.save_pretrained(tmp_path)
    again = FAMILIES[family].from_pretrained(tmp_path)
    assert bits(model.state_dict()) == bits(again.state_dict())
    assert torch.equal(model.sample(3, seed=1), again.sample(3, seed=1))
    tensors, config = checkpoint.read(tmp_path / "model.safetensors")
    other = next(name for name in FAMILIES if name != family)
    with pytest.raises(ValueError, match=f"must hold a {other} model"):
        FAMILIES[other].load(tmp_path / "model.safetensors")
    checkpoint.write(tmp_path / "odd.safetensors", tensors, config | {"net": {"name": "nothing"}})
    with pytest.raises(ValueError, match=rf"odd\.safetensors must hold a {family} model.*entry 'net'.*'nothing'"):
        FAMILIES[family].load(tmp_path / "odd.safetensors")


def test_a_sample_depends_on_seed_index_and_label_alone(family):
    model = trained(family).averaged_model()
    labels = labels_for(model, [0, 1, 2, 3, 4, 5])
    whole = model.sample(6, labels, seed=4)
    assert whole.shape == (6, *model.image_shape) and whole.dtype == torch.float32 and torch.isfinite(whole).all()
    assert not whole.requires_grad and not whole.is_inference()
    torch.manual_seed(9)
    assert torch.equal(whole, model.sample(6, labels, seed=4))
    assert close_enough(whole[2:4], model.sample(2, labels_for(model, [2, 3]), seed=4, first_id=2))
    assert not close_enough(whole, model.sample(6, labels, seed=5))
    assert model.sample(0).shape == (0, *model.image_shape)


def test_bad_labels_and_indices_are_refused_by_name(family):
    model = trained(family, 0).model
    if model.num_classes:
        with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 9, got 10"):
            model.sample(2, 10)
        with pytest.raises(ValueError, match="labels must be one int or 2 ints"):
            model.sample(2, [1, 2, 3])
        with pytest.raises(TypeError, match="labels must be ints"):
            model.sample(2, [0.5, 1.0])
    else:
        with pytest.raises(ValueError, match="labels must be None for a network without classes"):
            model.sample(2, [0, 1])
    with pytest.raises(ValueError, match="num must be in"):
        model.sample(-1)
    with pytest.raises(ValueError, match="first_id must be in"):
        model.sample(2, first_id=2**32 - 1)


def test_bad_images_are_refused_by_name(family):
    run = trained(family, 0)
    x0, labels, _ = run.dataset.batch(torch.arange(3))
    labels = labels_for(run.model, labels)
    if not run.model.measure(x0, labels):
        pytest.skip(f"{family} measures nothing of given images")
    x0[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="x0 must be finite, got 1 of 3 images that are not"):
        run.model.measure(x0, labels)
    for wrong in (x0[:, :, :4], (x0 > 0).long()):
        with pytest.raises(ValueError, match=r"x0 must be floating point.*\(B, 1, 8, 8\) in \[-1, 1\], got"):
            run.model.measure(wrong, labels)


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "no_classes"])
def test_colour_of_another_size_with_and_without_classes(family, classes):
    run = trained(family, 2, dataset=colour(classes=classes), **COLOUR.get(family, {}))
    model = run.averaged_model()
    assert model.image_shape == (3, 16, 16) and model.num_levels == 256
    assert model.num_classes in ((5, 0) if classes else (0,))
    samples = model.sample(2, labels_for(model, [4, 0]))
    assert samples.shape == (2, 3, 16, 16) and torch.isfinite(samples).all()
    if not classes:
        with pytest.raises(ValueError, match="labels must be None"):
            model.sample(2, [0, 1])


def test_images_that_are_not_square_are_refused(family):
    pairs = [(torch.zeros(1, 8, 12, dtype=torch.uint8), 0)] * 10
    with pytest.raises(ValueError, match="must be square, got 8 x 12"):
        Run(config_of(family), dataset=data.from_iterable(pairs))


def test_likelihoods_are_nats_of_the_image(family):
    model = trained(family).averaged_model()
    images = data.load("digits", "test")
    x0, labels, _ = images.batch(torch.arange(4))
    if model.likelihood is None:
        with pytest.raises(RuntimeError, match="no likelihood"):
            model.log_prob(x0)
    else:
        assert model.likelihood in ("exact", "bound")
        found = model.log_prob(x0, labels, seed=3)
        assert found.shape == (4,) and torch.isfinite(found).all() and (found < 0).all()
        assert torch.equal(found, model.log_prob(x0, labels, seed=3))
        assert torch.allclose(model.bits_per_dim(x0, labels, seed=3), -found / (64 * 0.6931471805599453))
        assert list(model.measure(x0, labels))[0] == "bits_per_dim"
        with pytest.raises(ValueError, match=r"must be .*\(B, C, H, W\)"):
            model.log_prob(x0[:, :, :4])
    for value in model.measure(x0, labels).values():
        assert value.shape == (4,) and torch.isfinite(value).all()


def test_autocast_trains(family):
    run = trained(family, 2, precision="bf16")
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())
    assert all(value.dtype != torch.bfloat16 for value in run.model.state_dict().values())


def test_the_registry_entry_is_complete(family):
    model = FAMILIES[family]
    assert model.family == family and {"digits", "smoke"} <= set(model.presets)
    names = [option.name for option in model.options]
    assert len(set(names)) == len(names) and all(option.help for option in model.options)
    built = trained(family, 0).model
    built.sample(1, **model.defaults())
    for option in model.options:
        assert not option.choices or option.default in option.choices


def test_panels_are_rows_of_images(family):
    model = trained(family).averaged_model()
    x0, labels, _ = data.load("digits", "test").batch(torch.arange(2))
    for title, panel in model.panels(x0, labels_for(model, labels)).items():
        assert title and panel.ndim == 5 and tuple(panel.shape[2:]) == model.image_shape, title
        assert torch.isfinite(panel).all()


def test_the_shipped_model_is_small_and_meets_its_bars(family):
    model, path = FAMILIES[family], PRETRAINED / f"{family}_digits.safetensors"
    record = json.loads((PRETRAINED / f"{family}_digits.json").read_text(encoding="utf-8"))
    assert path.stat().st_size <= 2_000_000
    _, config = checkpoint.read(path)
    assert record["train"] == config["extra"]["train"] == json.loads(json.dumps(dataclasses.asdict(preset(family))))
    assert record["command"] == f"genengine train {family} --preset digits --threads 1 --device cpu --out OUT"
    assert record["environment"]["train_seconds"] <= 15 * 60
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for split in ("validation", "test"):
        assert record[split]["failures"] == [] and record[split]["bars"] == {k: list(v) for k, v in model.bars.items()}
    assert len(record["curve"]) >= 15 and record["curve"][-1][1] < record["curve"][0][1] or family == "gan"


def test_the_preset_for_images_fits_colour_at_32_pixels(family):
    run = Run(preset(family, "images", batch_size=2), dataset=colour(32))
    assert all(torch.isfinite(value) for value in run.train_step().values())
    assert run.model.image_shape == (3, 32, 32)
