"""All metrics of a sample set: quality, diversity and memorisation, in float64.

Pixels are taken as level / (num_levels - 1): images in [-1, 1] are first clipped and rounded to the levels of
the data (`quantise=True`), because real digits have 17 levels and an unrounded grey haze would be compared with
exact zeros. Coverage and the Frechet distance depend on the number of samples, so compare sets of equal size;
the usual size is that of the reference (1,437 for the digits).
"""

from __future__ import annotations

import numpy as np

from genengine import ops
from genengine.data import digits, to_levels
from genengine.evaluate import metrics
from genengine.evaluate.features import class_features
from genengine.evaluate.table import met

# metric: (sense, bar), for 1,437 class-balanced digits against the training split.
QUALITY_BARS = {
    "frechet_distance": ("<=", 0.06),
    "knn_accuracy": (">=", 0.97),
    "coverage": (">=", 0.85),
    "nn_distance_ratio": (">=", 0.7),
    "nearer_train_share": ("<=", 0.61),
}


class Report(dict):
    """Metrics by name, with the quality bars. A dict, so `json.dumps(report)` works."""

    def failures(self, bars=None):
        """The bars that are missed, as readable strings; a metric that was not computed counts as missed,
        except `knn_accuracy` of an unlabelled set."""
        missed = []
        for name, (sense, bar) in (QUALITY_BARS if bars is None else bars).items():
            value = self.get(name)
            if value is None and name == "knn_accuracy" and "num_samples" in self:
                continue
            if value is None or not met(value, (sense, bar)):
                missed.append(f"{name} {'missing' if value is None else format(value, '.4f')}, bar {sense} {bar}")
        return missed

    def passes(self, bars=None):
        """True if every bar (default: `QUALITY_BARS`) is met."""
        return not self.failures(bars)

    def __str__(self):
        lines = []
        for name, value in self.items():
            bar = "  (bar {} {})".format(*QUALITY_BARS[name]) if name in QUALITY_BARS else ""
            lines.append(f"{name:20s} {value if isinstance(value, int) else format(value, '.4f')}{bar}")
        return "\n".join(lines)


def _pixels(images, name, quantise, num_levels):
    array = images.detach().cpu().double().numpy() if hasattr(images, "detach") else np.asarray(images)
    if array.ndim < 2 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"evaluate/evaluate_samples: {name} must be floating point (N, C, H, W) in [-1, 1], got "
            f"{array.dtype} {array.shape}; convert with data.from_uint8 or data.from_levels"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"evaluate/evaluate_samples: {name} must be finite, got {int((~np.isfinite(array)).sum())} "
            "non-finite pixels; the sampler or the training has diverged"
        )
    array = array.astype(np.float64).reshape(len(array), -1)
    return to_levels(array, num_levels) / (num_levels - 1.0) if quantise else (array + 1.0) / 2.0


def _labels(labels, count, name):
    array = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"evaluate/evaluate_samples: {name} must be integer of shape ({count},), got {array.dtype} "
            f"{array.shape}; give one class per image"
        )
    return array.astype(np.int64)


def evaluate_samples(samples, labels=None, *, reference=None, held_out=None, quantise=True, num_levels=17):
    """All metrics of one sample set, in about half a second for 1,437 digits.

    Args:
        samples: (N, C, H, W) floating point, array or tensor, nominally in [-1, 1]; N >= 6.
        labels: (N,) int, the classes the samples were asked for; None leaves out `knn_accuracy`.
        reference: (images, labels), the training data; default `digits("train")`.
        held_out: (images, labels), unseen data for the memorisation metrics; default `digits("test")`. Make
            choices with "train_fit" and "validation", and read "test" once, at the end.
        quantise: clip and round to the levels first (the default, and what every bar refers to).
        num_levels: values of a pixel.
    Returns:
        Report: num_samples; frechet_distance (PCA-20 fitted on the reference, unwhitened, pixels in [0, 1]);
        class_frechet_distance (in 32 features of a small classifier, see `class_features`); sliced_wasserstein (256
        directions); knn_accuracy (kNN-3 on the reference); precision, recall, density, coverage (k = 5);
        class_entropy; nn_distance_ratio (median nearest-neighbour distance of samples to the reference over that of
        the held-out set); nearer_train_share. Metrics of classes are left out where the reference has one class.
    Raises:
        ValueError: integer or non-finite images, shapes that do not match.
    """
    reference = digits("train") if reference is None else reference
    held_out = digits("test") if held_out is None else held_out
    fake, real, unseen = (
        _pixels(images, name, quantise, num_levels)
        for images, name in ((samples, "samples"), (reference[0], "reference"), (held_out[0], "held_out"))
    )
    if len({fake.shape[1], real.shape[1], unseen.shape[1]}) != 1 or len(fake) < 6:
        raise ValueError(
            f"evaluate/evaluate_samples: samples must be at least 6 images of {real.shape[1]} values like "
            f"the reference, got {fake.shape}; check the shape or the reference"
        )
    classes = _labels(reference[1], len(real), "reference labels")
    mean, axes = metrics.principal_axes(real, min(20, real.shape[1]))
    to_real, to_unseen = metrics.squared_distances(fake, real), metrics.squared_distances(fake, unseen)

    report = Report(num_samples=len(fake))
    report["frechet_distance"] = metrics.frechet_distance((fake - mean) @ axes, (real - mean) @ axes)
    if classes.max() > 0:
        report["class_frechet_distance"] = _class_frechet_distance(fake, real, classes)
    report["sliced_wasserstein"] = metrics.sliced_wasserstein(fake, real, _directions(real.shape[1]))
    predicted = metrics.knn_classify(to_real, classes)
    if labels is not None:
        report["knn_accuracy"] = float((predicted == _labels(labels, len(fake), "labels")).mean())
    within = metrics.squared_distances(real, real), metrics.squared_distances(fake, fake)
    report.update(metrics.manifold_metrics(to_real, *within))
    if classes.max() > 0:
        report["class_entropy"] = metrics.class_entropy(predicted, int(classes.max()) + 1)
    near_fake = np.median(np.sqrt(to_real.min(1)))
    near_unseen = np.median(np.sqrt(metrics.squared_distances(unseen, real).min(1)))
    report["nn_distance_ratio"] = float(near_fake / near_unseen) if near_unseen > 0 else float("nan")
    report["nearer_train_share"] = metrics.nearer_train_share(to_real, to_unseen)
    return report


def _class_frechet_distance(fake, real, classes):
    features = (class_features(pixels, real, classes) for pixels in (fake, real))
    return metrics.frechet_distance(*metrics.live_features(*features))


def _directions(dims, count=256):
    """Unit vectors (dims, count), the same for every set."""
    z = ops.normal((1, dims * count), seed=0, stream="model").double().numpy().reshape(dims, count)
    return z / np.linalg.norm(z, axis=0)


def evaluate_seeds(draw, labels, *, seeds=range(5), bars=None, **options):
    """Metrics over several sampling seeds.

    Args:
        draw: draw(labels, seed) -> samples (N, C, H, W) in [-1, 1].
        labels: (N,) int, the classes asked for, or None.  seeds: ints, at least two.
        bars: metric -> (sense, bar); default `QUALITY_BARS`.  options: reference, held_out and others of
            `evaluate_samples`.
    Returns:
        dict with mean (Report), std (dict, denominator len(seeds) - 1), seeds, passes (the mean meets every
        bar) and passes_each (each seed's report does).
    Raises:
        ValueError: fewer than two seeds.
    """
    seeds = [int(seed) for seed in seeds]
    if len(seeds) < 2:
        raise ValueError(f"evaluate/evaluate_seeds: seeds must be at least two, got {seeds}")
    reports = [evaluate_samples(draw(labels, seed), labels, **options) for seed in seeds]
    mean, std = Report(), {}
    for name in reports[0]:
        values = np.array([report[name] for report in reports], dtype=np.float64)
        mean[name] = int(values[0]) if name == "num_samples" else float(values.mean())
        if name != "num_samples":
            std[name] = float(values.std(ddof=1))
    return {
        "mean": mean,
        "std": std,
        "seeds": seeds,
        "passes": mean.passes(bars),
        "passes_each": [report.passes(bars) for report in reports],
    }
