"""The order in which training visits the images: a pure function of seed and step."""

from __future__ import annotations

from functools import lru_cache

import torch


def epoch_order(num, epoch, *, seed=0):
    """The order in which epoch `epoch` visits `num` images: a pure function of its arguments.

    order = stable argsort of u, u_i = uniform(seed, sample=0, step=epoch, stream="data_order", element=i).

    Args:
        num: number of images.  epoch: 0, 1, ...  seed: int in [0, 2^64).
    Returns:
        (num,) int64 tensor, a permutation.
    Raises:
        ValueError: num < 1 or epoch < 0.
    """
    if num < 1 or epoch < 0:
        raise ValueError(f"data/epoch_order: num must be >= 1 and epoch >= 0, got num={num}, epoch={epoch}")
    from genengine import ops  # here, so that reading the data loads no kernels

    u = ops.uniform((1, num), seed=seed, step=epoch, stream="data_order")
    return torch.argsort(u[0], stable=True)


def batch_indices(num, batch_size, step, *, seed=0):
    """Indices of training batch `step`, dropping the last, short batch of every epoch.

    A function of the step alone, so a resumed run continues at the right place with nothing stored.

    Args:
        num: number of images.  batch_size: 1..num.  step: 0, 1, ...  seed: int in [0, 2^64).
    Returns:
        (batch_size,) int64 tensor.
    Raises:
        ValueError: batch_size outside 1..num.
    """
    if not 1 <= batch_size <= num:
        raise ValueError(f"data/batch_indices: batch_size must be 1..{num} (the number of images), got {batch_size}")
    epoch, place = divmod(step, num // batch_size)
    return _order(num, epoch, seed)[place * batch_size : (place + 1) * batch_size].clone()


@lru_cache(maxsize=2)
def _order(num, epoch, seed):
    return epoch_order(num, epoch, seed=seed)  # once per epoch, not once per batch
