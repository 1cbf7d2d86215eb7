"""Data from anywhere: folders, archives, iterables, drawn images; bad files are named, counted, refused or skipped."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from genengine import data


def write(folder, name, array):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(("ant", "bee")):
        for i in range(3):
            write(tmp_path, f"{name}/{i}.png", noise(6, 6, 3, seed=10 * label + i))
    return tmp_path


def test_a_folder_has_a_class_per_subfolder(folder):
    (folder / "bee" / "notes.txt").write_text("no image")
    images = data.from_folder(folder)
    assert len(images) == 6 and images.image_shape == (3, 6, 6) and images.num_levels == 256
    assert images.class_names == ("ant", "bee") and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.files[4] == "bee/1.png"
    assert np.array_equal(images.levels[4].permute(1, 2, 0).numpy(), noise(6, 6, 3, seed=11))
    assert data.load(folder, "all").fingerprint == images.fingerprint


def test_grey_stays_grey_unless_one_is_not(tmp_path):
    for i in range(2):
        write(tmp_path, f"{i}.png", noise(5, 5, seed=i))
    images = data.from_folder(tmp_path)
    assert images.image_shape == (1, 5, 5) and images.num_classes == 0 and images.class_names == ()
    assert images.batch(torch.tensor([0]))[1] is None  # no classes, no labels
    write(tmp_path, "2.png", noise(5, 5, 3))
    assert data.from_folder(tmp_path).image_shape == (3, 5, 5)


def test_bad_files_are_counted_and_named(folder):
    (folder / "ant" / "broken.png").write_bytes(b"\x89PNG nothing more")
    write(folder, "bee/large.png", noise(9, 7, 3))
    message = r"2 files of .* cannot be used: broken\.png \(unreadable.*\); large\.png \(7x9 pixels, most are 6x6\)"
    with pytest.raises(ValueError, match=message + ".*--on-bad skip"):
        data.from_folder(folder)
    told = []
    images = data.from_folder(folder, on_bad="skip", report=told.append)
    assert len(images) == 6 and len(told) == 1 and told[0].startswith("skipped 2 files of")
    with pytest.raises(ValueError, match="on_bad must be one of refuse, skip, got 'ignore'"):
        data.from_folder(folder, on_bad="ignore")
    with pytest.raises(ValueError, match=r"must hold images \(.*\), got none"):
        (folder / "empty").mkdir()
        data.from_folder(folder / "empty")
    with pytest.raises(FileNotFoundError, match="must be an existing folder"):
        data.from_folder(folder / "nowhere")


def test_what_would_be_read_wrongly_is_a_bad_file(folder):
    write(folder, "loose.png", noise(6, 6, 3))
    deep = (noise(6, 6).astype(np.uint16)) * 100
    Image.fromarray(deep).save(folder / "ant" / "deep.png")
    message = (
        r"2 files of .*loose\.png \(beside the class folders\); deep\.png \(unreadable: I;16 pixels of more than 8"
    )
    with pytest.raises(ValueError, match=message):
        data.from_folder(folder)
    assert len(data.from_folder(folder, on_bad="skip")) == 6


def test_grey_with_transparency_is_grey(tmp_path):
    Image.fromarray(noise(5, 5)).convert("LA").save(tmp_path / "a.png")
    images = data.from_folder(tmp_path)
    assert images.image_shape == (1, 5, 5) and np.array_equal(images.levels[0, 0].numpy(), noise(5, 5))


def test_archives_as_adm_writes_them(tmp_path):
    pixels, labels = noise(7, 4, 4, 3), np.arange(7) % 3
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
    images = data.load(tmp_path / "a.npz", "all")
    assert images.num_classes == 3 and np.array_equal(images.levels.permute(0, 2, 3, 1).numpy(), pixels)
    np.savez(tmp_path / "b.npz", arr_0=pixels[..., 0])
    assert data.from_npz(tmp_path / "b.npz").image_shape == (1, 4, 4)
    for arrays, message in (
        ({"x": pixels}, "must hold arr_0, uint8 .*, got none"),
        ({"arr_0": pixels.astype(float)}, "must hold arr_0, uint8 .*, got float64"),
        ({"arr_0": pixels, "arr_1": labels[:3]}, r"arr_1 .* must be \(7,\) integer labels"),
        ({"arr_0": pixels, "arr_1": labels - 1}, r"labels must be in 0 \.\. .*, got -1"),
        ({"arr_0": pixels, "arr_1": labels + 10**6}, r"labels must be classes 0 \.\. 65535, got 1000002"),
    ):
        np.savez(tmp_path / "c.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            data.from_npz(tmp_path / "c.npz")
    for content in (b"PK nothing", b""):
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(ValueError, match="must be a readable .npz archive"):
            data.from_npz(tmp_path / "d.npz")


def test_iterables_of_images_and_labels():
    grey = torch.rand(1, 4, 4)
    kinds = {
        "pil": Image.fromarray(noise(4, 4)),
        "array": noise(4, 4),
        "tensor": torch.from_numpy(noise(4, 4))[None],
        "floats": grey,
    }
    for image in kinds.values():
        images = data.from_iterable([(image, 1), (image, 0)])
        assert images.image_shape == (1, 4, 4) and images.labels.tolist() == [1, 0]
    assert torch.equal(images.levels[0], (grey * 255).round().to(torch.uint8))
    assert data.from_iterable((kinds["array"], None) for _ in range(2)).num_classes == 0
    planar = torch.from_numpy(noise(3, 4, 5))
    assert data.from_iterable([(planar, 0)]).image_shape == (3, 4, 5)
    assert data.from_iterable([(noise(4, 5, 3), 0)]).image_shape == (3, 4, 5)
    for bad, message in (
        ([], "at least one image"),
        ([(noise(4, 4), 0), (noise(5, 4), 0)], r"must be \(1, 4, 4\).*got \(1, 5, 4\) at 1"),
        ([(torch.full((1, 4, 4), 2.0), 0)], r"must be \(C, H, W\) in \[0, 1\]"),
        ([(np.zeros((4, 4)), 0)], "must be uint8"),
        ([(noise(4, 4), None), (noise(4, 4), 1)], "ints or None for all"),
    ):
        with pytest.raises(ValueError, match=message):
            data.from_iterable(bad)


def test_drawn_images_are_the_same_everywhere_and_of_their_class():
    shapes = data.load("shapes-16", "all")
    assert shapes.image_shape == (3, 16, 16) and len(shapes) == 1000 and shapes.num_classes == 5
    digest = hashlib.sha256(shapes.levels.numpy().tobytes()).hexdigest()
    assert digest == hashlib.sha256(data.load("shapes-16", "all").levels.numpy().tobytes()).hexdigest()
    textures = data.load("textures-16", "train")
    assert len(textures) == 800 and textures.class_names == ("stripes", "checks", "waves", "dots")
    flat = shapes.images.flatten(1)
    assert flat.std(0).min() > 0.2 and shapes.levels.unique().numel() > 200
    with pytest.raises(ValueError, match=r"size must be 8 \.\. 128, got 4"):
        data.load("shapes-4")
    for unknown in ("shapes", "cifar", "nothing.npy"):
        with pytest.raises(ValueError, match=r"data must be digits, .*got .*, which does not exist"):
            data.load(unknown)


def test_splits_of_any_data_are_stratified_disjoint_and_whole():
    images = data.load("shapes-8", "all")
    parts = {name: data.split(images, name) for name in data.SPLITS}
    ids = {name: set(part.sample_ids.tolist()) for name, part in parts.items()}
    assert ids["train"] | ids["test"] == ids["all"] and not ids["train"] & ids["test"]
    assert ids["train_fit"] | ids["validation"] == ids["train"] and not ids["train_fit"] & ids["validation"]
    assert parts["test"].labels.bincount().tolist() == [40] * 5
    assert parts["validation"].labels.bincount().tolist() == [32] * 5
    with pytest.raises(ValueError, match="split must be one of train, test"):
        data.split(images, "dev")


def test_the_digits_are_a_dataset_too():
    digits = data.load("digits", "test")
    images, labels = data.digits("test")
    assert torch.equal(digits.images, images) and torch.equal(digits.labels, labels)
    assert digits.sample_ids.tolist() == data.split_indices("test").tolist()
    x0, y, ids = digits.batch(torch.tensor([5, 2]))
    assert torch.equal(x0, images[[5, 2]]) and torch.equal(y, labels[[5, 2]]) and ids.tolist() == [
        data.split_indices("test")[5], data.split_indices("test")[2],
    ]  # fmt: skip
    png = data.from_iterable(zip(data.to_uint8(images)[:4], labels[:4], strict=True)).with_levels(17)
    assert torch.equal(png.levels, digits.levels[:4])  # a saved digit is read back exactly


def test_a_dataset_that_does_not_fit_itself_is_refused():
    levels, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    for change, message in (
        ({"levels": levels.float()}, r"levels must be uint8 \(N, C, H, W\)"),
        ({"labels": labels[:2]}, r"labels must be int64 \(3,\)"),
        ({"sample_ids": labels.int()}, r"sample_ids must be int64 \(3,\)"),
        ({"levels": levels + 17}, "levels must be below num_levels = 17, got 17"),
        ({"labels": labels + 2}, r"labels must be in 0 \.\. 1, got 2"),
    ):
        fields = {"name": "x", "levels": levels, "labels": labels, "num_levels": 17, "class_names": ("a", "b")}
        with pytest.raises(ValueError, match=message):
            data.Dataset(**(fields | change))
