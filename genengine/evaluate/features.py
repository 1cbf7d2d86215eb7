"""Features of a small classifier, for a Frechet distance that looks at what makes a class.

A perceptron (pixels, 64, 32, classes) trained in a second on the reference, from the counter noise: the same reference
gives the same features. Pixels alone weigh a stroke's thickness as much as its shape; these do not.
"""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from genengine.nets import layers

HIDDEN, FEATURES, STEPS, BATCH = 64, 32, 600, 256
_CACHE: dict[str, list] = {}  # reference -> weights; one per data set seen, and small


def class_features(pixels, reference, classes):
    """The 32 features after ReLU of `pixels`, of a classifier trained on the reference.

    Args:
        pixels: (N, D) float64 in [0, 1].  reference: (M, D).  classes: (M,) int64 labels of the reference.
    Returns:
        (N, 32) float64.
    """
    digest = hashlib.sha256(np.ascontiguousarray(reference).tobytes() + classes.tobytes()).hexdigest()
    if digest not in _CACHE:
        with _one_thread():
            _CACHE[digest] = _train(torch.from_numpy(reference).float(), torch.from_numpy(classes))
    with torch.no_grad():
        return _features(torch.from_numpy(pixels).float(), _CACHE[digest]).double().numpy()


@contextlib.contextmanager
def _one_thread():
    """Products this small lose more to a second thread's barriers than they gain, on a busy machine a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _features(x, weights):
    for weight, bias in weights[:2]:
        x = F.relu(F.linear(x, weight, bias))
    return x


def _train(x, y):
    sizes = (x.shape[1], HIDDEN, FEATURES, int(y.max()) + 1)
    weights = []
    for index, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        weight = torch.empty(fan_out, fan_in)
        layers.init_xavier_(weight, seed=0, index=index)
        weights.append((weight.requires_grad_(), torch.zeros(fan_out, requires_grad=True)))
    optimizer = torch.optim.AdamW([p for pair in weights for p in pair], lr=3e-3, weight_decay=0.05)
    with torch.enable_grad():
        for step in range(STEPS):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)  # in turn: nothing is drawn
            loss = F.cross_entropy(F.linear(_features(x[rows], weights), *weights[2]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [(weight.detach(), bias.detach()) for weight, bias in weights]
