"""What one call of an op costs at least: bytes moved, floating-point operations, exponentials.

A cost is a formula of the call's arguments and results, written beside the op's schema and stated in its docstring.
Benchmarks divide it by a measured time, and compare with ceilings that were measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """The least work of one call.

    bytes: every input that is needed read once, every result written once. flops: floating-point operations, a
    multiply-add counts two, a comparison none; also the transcendental ones, at one each. exps: of those, the
    exponentials and what costs like them (logarithm, tanh, erf, sine). Integer arithmetic (the noise) is not counted.
    """

    bytes: int
    flops: int = 0
    exps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.exps + other.exps)


def traffic(*arguments: object) -> int:
    """Bytes of all tensors among the arguments (in lists and tuples, too), each element of each once.

    An expanded tensor counts the elements that exist: one row that is broadcast is one row.
    """
    return sum(_stored(tensor) * tensor.element_size() for tensor in _tensors(arguments))


def _stored(tensor):
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count


def _tensors(arguments) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
