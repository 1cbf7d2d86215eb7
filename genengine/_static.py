"""Tensors that stay where they are while their values change: what a captured graph reads.

A tree is a value, or lists, tuples and dicts of trees; its leaves are tensors and anything else. A run owns copies of
the tensors; the next run's tensors are copied into these, and what is no tensor must be what it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_PLAIN = (Tensor, int, float, str, type(None))


def storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def own(tree: Any, shared: Collection[int] = ()) -> Any:
    """The tree with copies of its tensors, but for those whose storage is in `shared`; views of one memory stay it."""
    leaves, spec = tree_flatten(tree)
    uses = Counter(storage(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(leaf):
        if not isinstance(leaf, Tensor) or storage(leaf) in shared:
            return leaf
        if uses[storage(leaf)] == 1 or leaf.numel() == 0:
            return leaf.detach().clone()
        if storage(leaf) not in copies:
            copies[storage(leaf)] = leaf.untyped_storage().clone()
        place = leaf.storage_offset(), leaf.shape, leaf.stride()
        return torch.empty(0, dtype=leaf.dtype, device=leaf.device).set_(copies[storage(leaf)], *place)

    with torch.inference_mode(False):  # so that later runs may write to them, in inference mode or out of it
        return tree_unflatten([copied(leaf) for leaf in leaves], spec)


def refill(held: Any, tree: Any, shared: Collection[int] = ()) -> bool:
    """Copy the tree's tensors into those of `held`, which `own` made; False, and nothing copied, where they do not fit.

    They fit where shapes, dtypes and devices are equal, where the same ones are views of one memory, and where what is
    no tensor is equal.
    """
    (old, held_spec), (new, spec) = _flatten(held), _flatten(tree)
    if held_spec != spec or not all(_fits(a, b, shared) for a, b in zip(old, new, strict=True)):
        return False
    if _views(old) != _views(new):
        return False
    for a, b in zip(old, new, strict=True):
        if isinstance(a, Tensor) and a is not b and a.data_ptr() != b.data_ptr():
            a.copy_(b)
    return True


def form(tree: Any) -> Hashable:
    """Equal for trees of which one probably fits into the other: for looking them up."""
    leaves, spec = _flatten(tree)
    return spec if isinstance(spec, tuple) else repr(spec), tuple(_form(leaf) for leaf in leaves), _views(leaves)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that the tensors lie in, each counted once."""
    return sum({storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _flatten(tree):
    """(leaves, structure): `tree_flatten`, and in a fifth of its time of what conditions usually are."""
    if type(tree) is dict and all(isinstance(value, _PLAIN) for value in tree.values()):
        return tree.values(), tuple(tree)
    return tree_flatten(tree)


def _views(leaves):
    """Of every tensor that lies in the memory of an earlier one: which, and where in relation to it."""
    first, views = {}, []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.numel():
            leader, tensor = first.setdefault(storage(leaf), (index, leaf))
            if leader != index:
                offset = leaf.storage_offset() - tensor.storage_offset()
                views.append((index, leader, offset, leaf.stride(), tensor.stride()))
    return tuple(views)


def _fits(old, new, shared):
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return type(old) is type(new) and _equal(old, new)
    if storage(old) in shared or storage(new) in shared:  # a view of the run's own tensors stays that view
        return old.data_ptr() == new.data_ptr() and old.shape == new.shape and old.stride() == new.stride()
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
