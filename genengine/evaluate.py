"""Sample metrics for small images: quality, diversity and memorisation, in plain NumPy and float64.

Every metric is computed in pixel space on `level / 16`: images in [-1, 1] are first clipped and rounded to
the 17 levels of the data (`quantise=True`), because real digits have 17 levels and an unrounded grey haze
would be compared with exact zeros. Coverage and the Frechet distance depend on the number of samples, so
compare sets of equal size; the usual size is that of the reference (1,437 for the digits).

No single number is proof. Class histograms reach a good accuracy, a copy of the training set reaches a good
everything else, so `Report.passes` asks for all bars at once.
"""

from __future__ import annotations

import numpy as np

from genengine.data import digits, to_levels

# metric: (sense, bar), for 1,437 class-balanced digits against the training split.
QUALITY_BARS = {
    "frechet_distance": ("<=", 0.06),
    "knn_accuracy": (">=", 0.97),
    "coverage": (">=", 0.85),
    "nn_distance_ratio": (">=", 0.7),
    "nearer_train_share": ("<=", 0.61),
}


def squared_distances(a, b):
    """Squared Euclidean distances D_ij = |a_i - b_j|^2.

    Args:
        a: (N, D) float64.  b: (M, D) float64.
    Returns:
        (N, M) float64, never negative. On the 17-level grid (multiples of 1/16) the result is exact.
    """
    cross = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2.0 * (a @ b.T)
    return np.maximum(cross, 0.0)


def principal_axes(reference, dims=20):
    """Mean and leading principal axes of `reference`, unwhitened.

    Args:
        reference: (N, D) float64.  dims: number of axes, at most D.
    Returns:
        mean (D,), axes (D, dims).
    """
    mean = reference.mean(0)
    _, _, rows = np.linalg.svd(reference - mean, full_matrices=False)
    return mean, rows[:dims].T


def _symmetric_sqrt(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to two feature sets.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), covariances with denominator N - 1.

    Args:
        a: (N, F) float64 features.  b: (M, F) float64 features.
    Returns:
        float, zero up to rounding for equal moments.
    Reference: Dowson & Landau 1982; Heusel et al. 2017 (there with Inception features).
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = _symmetric_sqrt(cov_a)
    cross = np.trace(_symmetric_sqrt(root @ cov_b @ root))
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def knn_classify(distances, labels, k=3):
    """Majority vote of the k nearest references; a tie goes to the class of the nearest tied neighbour.

    Args:
        distances: (N, M), samples to references.  labels: (M,) int, classes of the references.
    Returns:
        (N,) int64 predicted classes.
    """
    near = np.argsort(distances, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(distances), int(labels.max()) + 1))
    for rank in range(k):
        # The weight breaks ties by rank and is too small to overturn a majority.
        np.add.at(votes, (np.arange(len(votes)), labels[near[:, rank]]), 1.0 + 1e-3 * (k - rank))
    return votes.argmax(1)


def class_entropy(predicted, num_classes):
    """Entropy of the class histogram divided by log(num_classes): 1 is balanced, 0 is one class only."""
    share = np.bincount(predicted, minlength=num_classes) / len(predicted)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum() / np.log(num_classes))


def manifold_metrics(cross, within_reference, within_samples, k=5):
    """Precision, recall, density and coverage with k-nearest-neighbour balls.

    Args:
        cross: (N, M) squared distances, samples to references.
        within_reference: (M, M).  within_samples: (N, N).  k: neighbour that sets a ball's radius.
    Returns:
        dict with precision (samples in a reference ball), recall (references in a sample ball), density (mean
        number of reference balls around a sample / k) and coverage (references with a sample in their ball).
    Reference: Kynkaanniemi et al. 2019 (precision, recall); Naeem et al. 2020 (density, coverage).
    """
    radius_reference = np.partition(within_reference, k, axis=1)[:, k]  # index 0 is the point itself
    radius_samples = np.partition(within_samples, k, axis=1)[:, k]
    inside = cross <= radius_reference[None, :]
    return {
        "precision": float(inside.any(1).mean()),
        "recall": float((cross <= radius_samples[:, None]).any(0).mean()),
        "density": float(inside.sum(1).mean() / k),
        "coverage": float(inside.any(0).mean()),
    }


def nearer_train_share(to_reference, to_held_out):
    """Expected share of samples nearer to a random subset of train than to an equally large held-out set.

    With n references, m held-out images and k_i references nearer to sample i than its nearest held-out
    image, share = mean_i 1 - C(n - k_i, m) / C(n, m): the mean over *all* subsets, so nothing is drawn. An
    equal distance counts one half. 0.5 is innocent; copies of the training set reach about 0.64.

    Args:
        to_reference: (N, n) distances.  to_held_out: (N, m) distances, m <= n.
    Returns:
        float in [0, 1].
    """
    n, m = to_reference.shape[1], to_held_out.shape[1]
    if m > n:
        raise ValueError(
            f"evaluate/nearer_train_share: held-out set must be no larger than the reference ({n}), got {m}; "
            "swap the two or shorten the held-out set"
        )
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    nearest = to_held_out.min(1, keepdims=True)
    share = 0.0
    for nearer in ((to_reference < nearest).sum(1), (to_reference <= nearest).sum(1)):
        rest = n - nearer
        log_none = log_factorial[rest] - log_factorial[np.maximum(rest - m, 0)]
        log_none = log_none - log_factorial[n] + log_factorial[n - m]
        share += 0.5 * np.mean(1.0 - np.where(rest >= m, np.exp(log_none), 0.0))
    return float(share)


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
            good = value is not None and (value <= bar if sense == "<=" else value >= bar)
            if not good:
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


def _pixels(images, name, quantise):
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
    return to_levels(array) / 16.0 if quantise else (array + 1.0) / 2.0


def _labels(labels, count, name):
    array = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"evaluate/evaluate_samples: {name} must be integer of shape ({count},), got {array.dtype} "
            f"{array.shape}; give one class per image"
        )
    return array.astype(np.int64)


def evaluate_samples(samples, labels=None, *, reference=None, held_out=None, quantise=True):
    """All metrics of one sample set, in about half a second for 1,437 digits.

    Args:
        samples: (N, C, H, W) floating point, array or tensor, nominally in [-1, 1]; N >= 6.
        labels: (N,) int, the classes the samples were asked for; None leaves out `knn_accuracy`.
        reference: (images, labels), the training data; default `digits("train")`.
        held_out: (images, labels), unseen data for the memorisation metrics; default `digits("test")`. Make
            choices with "train_fit" and "validation", and read "test" once, at the end.
        quantise: clip and round to 17 levels first (the default, and what every bar refers to).
    Returns:
        Report: num_samples; frechet_distance (PCA-20 fitted on the reference, unwhitened, pixels / 16);
        knn_accuracy (kNN-3 on the reference); precision, recall, density, coverage (k = 5); class_entropy;
        nn_distance_ratio (median nearest-neighbour distance of samples to the reference over that of the
        held-out set); nearer_train_share.
    Raises:
        ValueError: integer or non-finite images, shapes that do not match.
    """
    reference = digits("train") if reference is None else reference
    held_out = digits("test") if held_out is None else held_out
    fake = _pixels(samples, "samples", quantise)
    real = _pixels(reference[0], "reference", quantise)
    unseen = _pixels(held_out[0], "held_out", quantise)
    if len({fake.shape[1], real.shape[1], unseen.shape[1]}) != 1 or len(fake) < 6:
        raise ValueError(
            f"evaluate/evaluate_samples: samples must be at least 6 images of {real.shape[1]} values like "
            f"the reference, got {fake.shape}; check the shape or the reference"
        )
    classes = _labels(reference[1], len(real), "reference labels")

    mean, axes = principal_axes(real, min(20, real.shape[1]))
    to_real, to_unseen = squared_distances(fake, real), squared_distances(fake, unseen)
    predicted = knn_classify(to_real, classes)
    report = Report(num_samples=len(fake))
    report["frechet_distance"] = frechet_distance((fake - mean) @ axes, (real - mean) @ axes)
    if labels is not None:
        report["knn_accuracy"] = float((predicted == _labels(labels, len(fake), "labels")).mean())
    report.update(manifold_metrics(to_real, squared_distances(real, real), squared_distances(fake, fake)))
    report["class_entropy"] = class_entropy(predicted, int(classes.max()) + 1)
    near_fake = np.median(np.sqrt(to_real.min(1)))
    near_unseen = np.median(np.sqrt(squared_distances(unseen, real).min(1)))
    report["nn_distance_ratio"] = float(near_fake / near_unseen) if near_unseen > 0 else float("nan")
    report["nearer_train_share"] = nearer_train_share(to_real, to_unseen)
    return report


def evaluate_seeds(draw, labels, *, seeds=range(5), reference=None, held_out=None):
    """Metrics over several sampling seeds.

    Args:
        draw: draw(labels, seed) -> samples (N, C, H, W) in [-1, 1].
        labels: (N,) int, the classes asked for.  seeds: ints, at least two.
        reference, held_out: as in `evaluate_samples`.
    Returns:
        dict with mean (Report), std (dict, denominator len(seeds) - 1), seeds, passes (the mean meets every
        bar) and passes_each (each seed's report does).
    Raises:
        ValueError: fewer than two seeds.
    """
    seeds = [int(seed) for seed in seeds]
    if len(seeds) < 2:
        raise ValueError(f"evaluate/evaluate_seeds: seeds must be at least two, got {seeds}")
    reports = [evaluate_samples(draw(labels, seed), labels, reference=reference, held_out=held_out) for seed in seeds]
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
        "passes": mean.passes(),
        "passes_each": [report.passes() for report in reports],
    }
