"""Tensors that stay where they are while their values change: what a captured graph reads.

A tree is a value, or lists, tuples and dicts of trees; its leaves are tensors and anything else. A run owns copies of
the tensors; the next run's tensors are copied into these, and what is no tensor must be what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

_PLAIN = (Tensor, int, float, str, type(None))


def storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def own(tree: Any, shared: Collection[int] = ()) -> Any:
    """The tree with copies of its tensors, but for those whose storage is in `shared`."""

    def copied(leaf):
        if not isinstance(leaf, Tensor) or storage(leaf) in shared:
            return leaf
        return leaf.detach().clone()

    with torch.inference_mode(False):  # so that later runs may write to them, in inference mode or out of it
        return tree_map(copied, tree)


def refill(held: Any, tree: Any, shared: Collection[int] = ()) -> bool:
    """Copy the tree's tensors into those of `held`, which `own` made; False, and nothing copied, where they do not fit.

    They fit where shapes, dtypes and devices are equal, and so is what is no tensor.
    """
    (old, held_spec), (new, spec) = _flatten(held), _flatten(tree)
    if held_spec != spec or not all(_fits(a, b, shared) for a, b in zip(old, new, strict=True)):
        return False
    for a, b in zip(old, new, strict=True):
        if isinstance(a, Tensor) and a is not b and a.data_ptr() != b.data_ptr():
            a.copy_(b)
    return True


def form(tree: Any) -> Hashable:
    """Equal for trees of which one probably fits into the other: for looking them up."""
    leaves, spec = _flatten(tree)
    return spec if isinstance(spec, tuple) else repr(spec), tuple(_form(leaf) for leaf in leaves)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that the tensors lie in, each counted once."""
    return sum({storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _flatten(tree):
    """(leaves, structure): `tree_flatten`, and in a fifth of its time of what conditions usually are."""
    if type(tree) is dict and all(isinstance(value, _PLAIN) for value in tree.values()):
        return tree.values(), tuple(tree)
    return tree_flatten(tree)


def _fits(old, new, shared):
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return type(old) is type(new) and _equal(old, new)
    if storage(old) in shared and (old.data_ptr() != new.data_ptr() or old.stride() != new.stride()):
        return False  # a view of the run's own tensors, now of something else
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device


def _equal(a, b):
    if a is b:
        return True
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # arrays within, say
        return False


def _form(leaf):
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    try:
        hash(leaf)
    except TypeError:
        return type(leaf)
    return type(leaf), leaf
