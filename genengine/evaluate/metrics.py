"""Distances between sample sets, in plain NumPy and float64: each a formula with known answers."""

from __future__ import annotations

import numpy as np

# Which way is better; a share of 0.5 and a ratio of 1 are innocent, not best.
ARROWS = {
    "frechet_distance": "lower", "class_frechet_distance": "lower", "sliced_wasserstein": "lower",
    "knn_accuracy": "higher", "precision": "higher", "recall": "higher", "density": "near 1", "coverage": "higher",
    "class_entropy": "higher", "nn_distance_ratio": "near 1", "nearer_train_share": "near .5",
}  # fmt: skip


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


def sliced_wasserstein(a, b, directions):
    """Mean over directions of the Wasserstein-1 distance of the projected sets.

    W1 = integral over u in (0, 1) of |quantile_a(u) - quantile_b(u)|, exact for sets of equal size, by the midpoint
    rule on as many points as the larger set has otherwise.

    Args:
        a: (N, D) float64.  b: (M, D) float64.  directions: (D, K), unit columns.
    Returns:
        float.
    Reference: Rabin et al. 2011; Bonneel et al. 2015.
    """
    a, b = np.sort(a @ directions, axis=0), np.sort(b @ directions, axis=0)
    if len(a) != len(b):
        u = (np.arange(max(len(a), len(b))) + 0.5) / max(len(a), len(b))
        a, b = (np.quantile(x, u, axis=0, method="inverted_cdf") for x in (a, b))
    return float(np.abs(a - b).mean())


def live_features(a, b, least=1e-3):
    """Both feature sets without the features whose standard deviation in b is below `least`: a dead one, divided by
    next to nothing or merely off by a little, would drown all others."""
    alive = b.std(0) >= least
    return a[:, alive], b[:, alive]
