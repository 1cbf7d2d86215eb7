"""The embedded digits, their splits, pixel conversions and the epoch order."""

from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genengine import data


def test_sizes_ranges_and_types():
    for split, size in {
        "train": 1437,
        "test": 360,
        "train_fit": 1149,
        "validation": 288,
        "all": 1797,
    }.items():
        images, labels = data.digits(split)
        assert images.shape == (size, 1, 8, 8) and images.dtype == torch.float32
        assert labels.shape == (size,) and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
        assert set(labels.tolist()) == set(range(10))


def test_splits_are_disjoint_and_stratified():
    train, test = data.split_indices("train"), data.split_indices("test")
    fit, validation = data.split_indices("train_fit"), data.split_indices("validation")
    assert sorted([*train, *test]) == list(range(1797))
    assert sorted([*fit, *validation]) == sorted(train)
    share = np.bincount(data.digits("train")[1]) / 1437
    for split in ("test", "train_fit", "validation"):
        counts = np.bincount(data.digits(split)[1])
        assert np.abs(counts - share * counts.sum()).max() <= 1


def test_data_and_splits_equal_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    from sklearn.model_selection import train_test_split

    source = datasets.load_digits()
    images, labels = data.digits("all")
    assert np.array_equal(data.to_levels(images)[:, 0].numpy(), source.images)
    assert np.array_equal(labels.numpy(), source.target)
    y = source.target
    train, test = train_test_split(np.arange(1797), test_size=360, stratify=y, random_state=0)
    assert np.array_equal(data.split_indices("train"), train) and np.array_equal(data.split_indices("test"), test)


def test_digits_are_fresh_copies():
    data.digits("train")[0].zero_()
    assert data.digits("train")[0].min() == -1


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split must be one of train, test.*got 'valid'"):
        data.digits("valid")


def test_the_licence_travels_with_the_data():
    text = resources.files("genengine").joinpath("assets/LICENSE-digits.txt").read_text(encoding="utf-8")
    assert "Alpaydin" in text and "Kaynak" in text and "CC BY 4.0" in text and "Changes made" in text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 16), min_size=1, max_size=20))
def test_levels_survive_every_conversion(levels):
    levels = torch.tensor(levels).view(1, 1, 1, -1)
    images = data.from_levels(levels)
    assert torch.equal(data.to_levels(images), levels.float())
    assert np.array_equal(data.to_levels(images.numpy()), levels.numpy())
    assert torch.equal(data.from_uint8(data.to_uint8(images)), images)


def test_conversions_clip_round_and_refuse():
    x = torch.tensor([-3.0, -1.0, -0.94, 0.0, 0.07, 1.0, 9.0]).view(1, 1, 1, 7)
    assert data.to_levels(x).flatten().tolist() == [0, 0, 0, 8, 9, 16, 16]
    assert data.to_uint8(x).shape == (1, 1, 7, 1)
    assert data.to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 143, 255, 255]
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\)"):
        data.to_uint8(torch.zeros(8, 8))
    with pytest.raises(ValueError, match="images must be uint8"):
        data.from_uint8(np.zeros((1, 8, 8, 1), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused(value):
    x = torch.zeros(2, 1, 2, 2)
    x[1, 0, 0, 1] = value
    for images in (x, x.numpy()):
        for convert in (data.to_levels, data.to_uint8):
            with pytest.raises(FloatingPointError, match=f"{convert.__name__}: images must be finite, got 1 non-"):
                convert(images)
    assert data.to_uint8(torch.zeros(0, 1, 8, 8)).shape == (0, 8, 8, 1)


def test_epoch_order_is_a_function_and_a_permutation():
    first = data.epoch_order(101, 3, seed=5)
    assert sorted(first.tolist()) == list(range(101))
    torch.manual_seed(99)
    assert torch.equal(first, data.epoch_order(101, 3, seed=5))
    assert not torch.equal(first, data.epoch_order(101, 4, seed=5))
    assert not torch.equal(first, data.epoch_order(101, 3, seed=6))
    assert data.epoch_order(1, 0).tolist() == [0]


def test_batches_walk_through_the_epoch_order():
    epoch = torch.cat([data.batch_indices(50, 8, step, seed=1) for step in range(6, 12)])
    assert torch.equal(epoch, data.epoch_order(50, 1, seed=1)[:48])
    with pytest.raises(ValueError, match=r"batch_size must be 1\.\.50"):
        data.batch_indices(50, 51, 0)
    with pytest.raises(ValueError, match="num must be >= 1"):
        data.epoch_order(0, 0)
