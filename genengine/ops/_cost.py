"""What one call of an op costs at least: bytes moved, floating-point operations, exponentials.

A cost is a formula of the call's arguments and results, written beside the op's schema and stated in its docstring.
Benchmarks divide it by a measured time, and compare with ceilings that were measured in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """The least work of one call.

    bytes: every input that is needed read once, every result written once; a tensor that is updated counts twice, one
    that is only written, though an argument, once. flops: floating-point operations, a multiply-add counts two, a
    comparison, a choice, a sign or a cast none; also the transcendental ones, at one each. exps: of those, the
    exponentials and what costs like them (logarithm, tanh, erf, sine, cosine). Integer arithmetic (the noise) is not
    counted.

    Counted are the operations of the op's formula at every element where they stand, also those on rows that are
    broadcast (1 + scale); sums take one addition per term, and what a formula says twice is done once. What is done
    once per row, sample or launch (a mean's division, a standard deviation) is left out. Of attention flops are those
    of its products alone, as is the custom.
    """

    bytes: int
    flops: int = 0
    exps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.exps + other.exps)


def bytes_alone(arguments: tuple, results: object) -> Cost:
    """The formula of an op that states none: every tensor of the call once."""
    return Cost(traffic(arguments, results))


def each(flops: float, exps: float = 0) -> Callable[[tuple, object], Cost]:
    """The formula of an op that moves every tensor once and does as much at every element of its first argument."""
    return lambda arguments, results: per_element(traffic(arguments, results), arguments[0].numel(), flops, exps)


def per_element(moved: int, count: int, flops: float, exps: float = 0) -> Cost:
    """`moved` bytes, and `count` elements with flops and exps operations each; parts of an operation round up."""
    return Cost(moved, math.ceil(count * flops), math.ceil(count * exps))


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
