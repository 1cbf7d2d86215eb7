"""Sample sets that fool single metrics, measured beside a model's so that nobody is fooled.

Class histograms draw every pixel of a class by itself: right classes, no strokes. Class Gaussians have the right first
two moments. Copies of the training set, plain or with noise, have a perfect everything but memory.
"""

from __future__ import annotations

import numpy as np

from genengine import ops
from genengine.evaluate.report import Report, evaluate_samples

NOISE = 0.24  # of pixels in [-1, 1]; .12 of level / 16


def baselines(labels, *, reference, held_out, num_levels=17, seed=0) -> dict[str, Report]:
    """The metrics of each baseline, sampled with these labels from the reference.

    Args:
        labels: (N,) int.  reference, held_out: (images, labels), as in `evaluate_samples`.  num_levels: of a pixel.
        seed: int in [0, 2^64).
    Returns:
        name -> Report: class histograms, class Gaussians, noisy copies, copies.
    """
    images, classes = (np.asarray(part, dtype=np.float64 if i == 0 else np.int64) for i, part in enumerate(reference))
    labels = np.asarray(labels)
    flat = images.reshape(len(images), -1)
    u, z = (draw((len(labels), flat.shape[1]), seed=seed).double().numpy() for draw in (ops.uniform, ops.normal))
    pick = _members(classes, labels, ops.uniform((len(labels), 1), seed=seed, step=1).double().numpy()[:, 0])
    sets = {
        "class histograms": _histograms(flat, classes, labels, u),
        "class Gaussians": _gaussians(flat, classes, labels, z),
        "noisy copies": flat[pick] + NOISE * z,
        "copies": flat[pick],
    }
    options = {"reference": reference, "held_out": held_out, "num_levels": num_levels}
    return {
        name: evaluate_samples(value.reshape(-1, *images.shape[1:]), labels, **options) for name, value in sets.items()
    }


def _members(classes, labels, u):
    """For each label an index of a reference image of that class."""
    members = {label: np.flatnonzero(classes == label) for label in np.unique(labels)}
    return np.array([members[label][int(place * len(members[label]))] for label, place in zip(labels, u, strict=True)])


def _histograms(flat, classes, labels, u):
    """Every pixel from its own histogram within the class: the value of some image of the class at that pixel."""
    out = np.empty((len(labels), flat.shape[1]))
    for label in np.unique(labels):
        rows, members = np.flatnonzero(labels == label), flat[classes == label]
        out[rows] = members[(u[rows] * len(members)).astype(int), np.arange(flat.shape[1])]
    return out


def _gaussians(flat, classes, labels, z):
    """mean + z sqrt(covariance) of the class."""
    out = np.empty((len(labels), flat.shape[1]))
    for label in np.unique(labels):
        rows, members = np.flatnonzero(labels == label), flat[classes == label]
        values, axes = np.linalg.eigh(np.cov(members, rowvar=False))
        out[rows] = members.mean(0) + (z[rows] * np.sqrt(np.maximum(values, 0.0))) @ axes.T
    return out
