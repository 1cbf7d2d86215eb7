"""The metrics reproduce their anchors on real data and baselines, and refuse every way of cheating."""

import json
import time

import numpy as np
import pytest
import torch

from genengine import data, models
from genengine.evaluate import (
    QUALITY_BARS,
    Report,
    baselines,
    class_features,
    evaluate_model,
    evaluate_samples,
    evaluate_seeds,
    frechet_distance,
    knn_classify,
    live_features,
    nearer_train_share,
    outlier_text,
    outliers,
    sliced_wasserstein,
    text,
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


def test_sliced_wasserstein_of_known_distances():
    x = np.random.default_rng(0).standard_normal((500, 3))
    directions = np.eye(3)
    assert sliced_wasserstein(x, x[::-1], directions) == 0.0
    assert sliced_wasserstein(x + [1.0, 0.0, -2.0], x, directions) == pytest.approx(1.0)  # (1 + 0 + 2) / 3
    assert sliced_wasserstein(np.repeat(x, 2, axis=0), x, directions) == pytest.approx(0.0)  # unequal sizes


def test_a_dead_feature_does_not_drown_the_others(train):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 4)), rng.standard_normal((300, 4))
    b[:, 2] = 1e-9 * b[:, 2]
    kept_a, kept_b = live_features(a, b)
    assert kept_a.shape == kept_b.shape == (300, 3) and np.array_equal(kept_a[:, 2], a[:, 3])
    images, labels = train
    report = evaluate_samples(images, labels)
    assert report["class_frechet_distance"] == pytest.approx(0.0, abs=1e-6)


def test_class_features_read_the_class_where_pixels_cannot(train):
    """Images of the wrong classes: the same pixels overall, but nine of ten classes gone."""
    images, labels = train
    one = np.resize(images[labels == 3], images.shape)
    assert evaluate_samples(one, labels)["class_frechet_distance"] > 5.0
    pixels = (data.to_levels(images) / 16).reshape(len(images), -1).astype(np.float64)
    features = class_features(pixels, pixels, labels)
    assert features.shape == (1437, 32) and np.array_equal(features, class_features(pixels, pixels, labels))
    near = knn_classify(((features[:200, None] - features[None]) ** 2).sum(2), labels, k=3)
    assert (near == labels[:200]).mean() > 0.99


def test_the_baselines_fool_some_metrics_and_not_others(train):
    held_out = data.digits("test")
    found = baselines(train[1], reference=train, held_out=held_out)
    histograms, gaussians = found["class histograms"], found["class Gaussians"]
    assert histograms["knn_accuracy"] > 0.93 and histograms["precision"] < 0.15 and histograms["coverage"] < 0.15
    assert 0.05 < gaussians["frechet_distance"] < 0.1 and gaussians["nearer_train_share"] < 0.6
    assert found["copies"]["nn_distance_ratio"] == 0.0 and found["copies"]["nearer_train_share"] > 0.61
    noisy = found["noisy copies"]
    assert noisy["frechet_distance"] < 0.06 and noisy["coverage"] > 0.8 and noisy["nearer_train_share"] > 0.61
    again = baselines(train[1], reference=train, held_out=held_out)
    assert json.dumps(again) == json.dumps(found)


class Bits:
    """A model that finds an image as likely as its first pixel says."""

    family, likelihood, num_classes, device = "bits", "exact", 0, torch.device("cpu")

    def measure(self, x0, labels, *, seed):
        assert labels is None
        return {"bits_per_dim": x0[:, 0, 0, 0]}


def test_outliers_are_those_outside_of_what_is_usual():
    def images(levels):
        planes = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
        return data.Dataset(
            "x", planes, torch.zeros(len(levels), dtype=torch.int64), 256, files=tuple(map(str, levels))
        )

    usual, odd = images(list(range(100, 150))), images([120, 250, 140, 3, 180])
    report = outliers(Bits(), odd, usual)
    assert [entry["file"] for entry in report["outliers"]] == ["250", "3", "180"]
    assert [entry["why"] for entry in report["outliers"]] == ["unlikely", "too likely", "unlikely"]
    assert report["num_images"] == 5 and len(report["bits"]) == 5 and report["low"] < report["high"]
    shown = outlier_text(report, most=2)
    assert "3 outliers, the farthest first:" in shown and "... and 1 more" in shown and "too likely  3" in shown
    assert "0 outliers" in outlier_text(outliers(Bits(), images([120, 130]), usual))
    with pytest.raises(ValueError, match="0 < share < 0.5"):
        outliers(Bits(), odd, usual, share=0.5)
    model = Bits()
    model.likelihood = None
    with pytest.raises(ValueError, match="bits has no likelihood"):
        outliers(model, odd, usual)
    vague = models.VAE.from_config(
        {"family": "vae", "net": {"name": "vae", "config": "tiny"}, "likelihood": "bernoulli", "num_levels": 17}
    )
    digits = data.load("digits", "validation").subset(torch.arange(6))
    with pytest.raises(ValueError, match="this vae model has no likelihood of the pixels' levels"):
        outliers(vague, digits, digits)


def test_an_evaluation_on_other_or_too_few_images_is_refused_before_it_samples():
    digits, model = data.load("digits", "train"), models.GAN.pretrained()
    for wrong, got in ((data.load("shapes-8", "test"), r"200 of \(3, 8, 8\)"), (digits.subset([1, 2]), "2 of")):
        with pytest.raises(ValueError, match=rf"held_out must be at least 6 images.*\(1, 8, 8\).*got {got}"):
            evaluate_model(model, digits, wrong)


def test_the_whole_evaluation_names_what_is_missed():
    train_set, held_out = data.load("digits", "train"), data.load("digits", "test")

    class Copier(Bits):
        num_levels, num_classes, image_shape = 17, 10, (1, 8, 8)
        bars = {
            "frechet_distance": ("<=", 0.03),
            "coverage": (">=", 1.5),
            "bits_per_dim": ("<=", -0.9),
            "mse": ("<=", 1),
        }

        def sample(self, num, labels, *, seed, check_finite, progress):
            assert num == 1437 and torch.equal(labels, train_set.labels)
            return train_set.images

        def measure(self, x0, labels, *, seed):
            return {"bits_per_dim": x0.mean((1, 2, 3))}

    result = evaluate_model(Copier(), train_set, held_out, seeds=range(2), with_baselines=False)
    assert [failure.split(",")[0].split()[0] for failure in result["failures"]] == ["coverage", "bits_per_dim", "mse"]
    assert result["measured"]["bits_per_dim"]["held_out"] == pytest.approx(float(held_out.images.mean()), abs=1e-5)
    shown = text(result)
    assert "MISSED: coverage" in shown and "frechet_distance" in shown and json.dumps(result)
