"""Weights in the form that an op reads, kept by the network that they are of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Packed:
    """What a network packed, by key, made anew only after a tensor that it is made of has changed.

    A tensor has changed if its memory or its version is another. What is written through `.data` counts as no change,
    to torch neither. The tensors' memory is held meanwhile, so that it cannot become another tensor's. Copies and
    pickles of a network begin with none.
    """

    def __init__(self):
        self._found = {}

    def get(self, key: Hashable, tensors: Iterable[Tensor], pack: Callable[[], T]) -> T:
        """What pack() gave for `key` when the tensors were as they are now."""
        tensors = [tensor.detach() for tensor in tensors]
        if any(tensor.is_inference() for tensor in tensors):  # nobody counts what is written to these
            return pack()
        state = [(tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors]
        if key not in self._found or self._found[key][0] != state:
            self._found[key] = state, tensors, pack()
        return self._found[key][2]

    def __reduce__(self):
        return Packed, ()
