"""The metrics reproduce their anchors on real data and baselines, and refuse every way of cheating."""

import json
import time

import numpy as np
import pytest
import torch

from genengine import data
from genengine.evaluate import (
    QUALITY_BARS,
    Report,
    evaluate_samples,
    evaluate_seeds,
    frechet_distance,
    nearer_train_share,
)


@pytest.fixture(scope="module")
def train():
    images, labels = data.digits("train")
    return images.numpy(), labels.numpy()


def by_class(train, draw):
    """Draw as many images of each class as train has."""
    images, labels = train
    parts = [draw(images[labels == k].reshape(-1, 64).astype(np.float64)) for k in range(10)]
    return np.concatenate(parts).reshape(-1, 1, 8, 8), np.repeat(np.arange(10), np.bincount(labels))


def histograms(train, seed=0):
    rng = np.random.default_rng(seed)
    return by_class(train, lambda x: np.stack([rng.permutation(column) for column in x.T], axis=1))


def gaussians(train, seed=0):
    rng = np.random.default_rng(seed)
    return by_class(train, lambda x: rng.multivariate_normal(x.mean(0), np.cov(x.T), len(x)))


def test_half_against_half_is_the_floor():
    images, labels = (a.numpy() for a in data.digits("all"))
    scores = []
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(1797)
        a, b = order[:898], order[898:1796]
        scores.append(evaluate_samples(images[a], labels[a], reference=(images[b], labels[b])))
    mean = {key: np.mean([s[key] for s in scores]) for key in scores[0]}
    assert abs(mean["frechet_distance"] - 0.044) < 0.007
    assert abs(mean["precision"] - 0.97) < 0.015 and abs(mean["recall"] - 0.96) < 0.02
    assert abs(mean["density"] - 0.97) < 0.04 and abs(mean["coverage"] - 0.97) < 0.015
    assert mean["knn_accuracy"] > 0.97 and mean["class_entropy"] > 0.998


def test_test_split_against_train():
    report = evaluate_samples(*data.digits("test"))
    expected = {"frechet_distance": 0.054, "precision": 0.94, "recall": 0.97, "density": 0.94,
                "coverage": 0.65, "knn_accuracy": 0.986, "nn_distance_ratio": 1.0}  # fmt: skip
    for name, value in expected.items():
        assert abs(report[name] - value) <= 0.006, name
    assert report["nearer_train_share"] == 0.0  # a held-out image is its own nearest held-out image


def test_class_gaussians_are_the_baseline_to_beat(train):
    reports = [evaluate_samples(*gaussians(train, seed)) for seed in range(3)]
    mean = {key: np.mean([r[key] for r in reports]) for key in reports[0]}
    expected = {"frechet_distance": (0.079, 0.012), "precision": (0.89, 0.02),
                "recall": (0.79, 0.06), "density": (0.81, 0.04), "coverage": (0.88, 0.02),
                "nearer_train_share": (0.57, 0.015)}  # fmt: skip
    for name, (value, width) in expected.items():
        assert abs(mean[name] - value) < width, (name, mean[name])
    assert not any(r.passes() for r in reports)


def test_class_histograms_fail_on_precision_and_coverage(train):
    report = evaluate_samples(*histograms(train))
    assert report["knn_accuracy"] > 0.94  # accuracy alone is fooled
    assert abs(report["precision"] - 0.07) < 0.03 and abs(report["coverage"] - 0.07) < 0.03
    assert abs(report["frechet_distance"] - 0.183) < 0.03 and not report.passes()


@pytest.mark.parametrize("std", [0.05, 0.12, 0.15, 0.2])
def test_a_noisy_copy_of_the_training_set_fails(train, std):
    images, labels = train
    noise = np.random.default_rng(1).standard_normal(images.shape)
    report = evaluate_samples(images + 2 * std * noise, labels)  # std is per level / 16, half of [-1, 1]
    assert report["nearer_train_share"] > 0.625 and not report.passes()


def test_noise_of_standard_deviation_012_passes_every_bar_but_one(train):
    images, labels = train
    noise = np.random.default_rng(1).standard_normal(images.shape)
    report = evaluate_samples(images + 0.24 * noise, labels)
    assert abs(report["nn_distance_ratio"] - 0.74) < 0.02
    assert [line.split()[0] for line in report.failures()] == ["nearer_train_share"]


def test_a_bootstrap_copy_fails(train):
    images, labels = train
    pick = np.random.default_rng(0).integers(0, 1437, 1437)
    report = evaluate_samples(images[pick], labels[pick])
    assert report["frechet_distance"] < 0.02 and report["nn_distance_ratio"] == 0.0
    assert report["nearer_train_share"] > 0.61 and not report.passes()


def test_collapsed_sets_fail(train):
    images, labels = train
    few = np.resize(np.flatnonzero(labels < 3), 1437)
    report = evaluate_samples(images[few], labels[few])
    assert abs(report["class_entropy"] - 0.48) < 0.01 and abs(report["coverage"] - 0.31) < 0.02
    assert report["frechet_distance"] > 1.1 and not report.passes()
    prototypes, classes = by_class(train, lambda x: np.repeat(x[:1], len(x), axis=0))
    report = evaluate_samples(prototypes, classes)
    assert report["precision"] == 1.0 and report["recall"] < 0.05 and report["coverage"] < 0.1
    assert not report.passes()


def test_pure_noise_fails_everything(train):
    report = evaluate_samples(np.random.default_rng(0).standard_normal((1437, 1, 8, 8)), train[1])
    assert {line.split()[0] for line in report.failures()} >= {"frechet_distance", "knn_accuracy", "coverage"}


def test_quantisation_is_stated_and_optional(train):
    images, labels = train
    soft = np.clip(images + 0.03, -1, 1)  # a quarter of a level: vanishes when rounded
    assert evaluate_samples(soft, labels)["frechet_distance"] < 1e-9
    assert evaluate_samples(soft, labels, quantise=False)["frechet_distance"] > 1e-4


def test_share_equals_the_mean_over_random_subsets():
    rng = np.random.default_rng(0)
    to_reference, to_held_out = rng.random((40, 30)), rng.random((40, 10))
    subsets = [rng.choice(30, 10, replace=False) for _ in range(4000)]
    drawn = np.mean([to_reference[:, s].min(1) < to_held_out.min(1) for s in subsets])
    assert abs(nearer_train_share(to_reference, to_held_out) - drawn) < 0.003
    assert nearer_train_share(to_reference, np.full((40, 10), 2.0)) == 1.0
    assert nearer_train_share(np.ones((5, 6)), np.ones((5, 6))) == 0.5  # ties count one half
    with pytest.raises(ValueError, match="held-out set must be no larger than the reference"):
        nearer_train_share(to_held_out, to_reference)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((500, 3))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T)).T)  # exactly zero mean, unit covariance
    assert abs(frechet_distance(z, 3.0 * z + [1.0, 2.0, 0.0]) - (5.0 + 3 * (3.0 - 1.0) ** 2)) < 1e-9


def test_the_report_is_fast_serialisable_and_readable(train):
    start = time.process_time()
    report = evaluate_samples(*map(torch.from_numpy, train))
    assert time.process_time() - start < 3.0
    assert json.loads(json.dumps(report)) == report
    assert set(QUALITY_BARS) < set(report) and "bar <= 0.06" in str(report)
    assert Report().failures()  # an empty report passes nothing
    unlabelled = evaluate_samples(train[0])
    assert "knn_accuracy" not in unlabelled and not any("knn" in line for line in unlabelled.failures())


def test_bad_input_is_named(train):
    images, labels = train
    with pytest.raises(ValueError, match="samples must be floating point.*from_uint8"):
        evaluate_samples(np.zeros((10, 8, 8, 1), np.uint8))
    bad = images.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="samples must be finite, got 1 non-finite"):
        evaluate_samples(bad)
    with pytest.raises(ValueError, match=r"labels must be integer of shape \(1437,\)"):
        evaluate_samples(images, labels[:3])
    with pytest.raises(ValueError, match="at least 6 images of 64 values"):
        evaluate_samples(np.zeros((10, 1, 4, 4)))


def test_seeds_are_averaged(train):
    images, labels = train

    def draw(labels, seed):
        return images + 0.24 * np.random.default_rng(seed).standard_normal(images.shape)

    result = evaluate_seeds(draw, labels, seeds=[1, 2, 3])
    single = [evaluate_samples(draw(labels, seed), labels) for seed in (1, 2, 3)]
    for name in ("coverage", "nearer_train_share"):
        values = [report[name] for report in single]
        assert result["mean"][name] == pytest.approx(np.mean(values))
        assert result["std"][name] == pytest.approx(np.std(values, ddof=1))
    assert result["mean"]["num_samples"] == 1437 and result["passes"] is False
    assert result["passes_each"] == [False] * 3 and json.dumps(result)
    with pytest.raises(ValueError, match="seeds must be at least two"):
        evaluate_seeds(draw, labels, seeds=[1])
