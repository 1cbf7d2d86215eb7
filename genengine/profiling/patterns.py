"""A small language of dataflow patterns.

A pattern is a tree: `Op` nodes, `Leaf` tensors with a condition on their shape, `Number` constants. `match` yields what
each name stands for and the nodes that were used; a name that occurs twice must stand for the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from genengine.profiling.graph import Node, Value


@dataclass(frozen=True)
class Match:
    """names: name -> `Value`, `Node` or number. nodes: those that the pattern claims."""

    names: dict = field(default_factory=dict)
    nodes: frozenset = frozenset()

    def bind(self, name: str | None, thing: object) -> Match | None:
        """With the name bound; None if it stands for something else already."""
        if name is None:
            return self
        if name in self.names:
            return self if _same(self.names[name], thing) else None
        return Match({**self.names, name: thing}, self.nodes)

    def claim(self, *nodes: Node) -> Match:
        return Match(self.names, self.nodes | set(nodes))


def _same(one, other):
    if isinstance(one, Value) and isinstance(other, Value):
        return one.key == other.key
    return one is other or (isinstance(one, (int, float)) and one == other)


class Pattern:
    """match(thing, reader, found): all ways in which `thing`, an argument of the node `reader`, fits."""

    def match(self, thing: object, reader: Node | None, found: Match) -> Iterator[Match]:
        raise NotImplementedError


@dataclass(frozen=True)
class Leaf(Pattern):
    """A tensor for which every test(value, reader) holds. through: what copies and casts of it are made of, instead."""

    name: str | None
    tests: tuple[Callable[[Value, Node], bool], ...] = ()
    through: bool = False

    def match(self, thing, reader, found):
        if not isinstance(thing, Value) or thing.operand is None:
            return
        if not all(test(thing, reader) for test in self.tests):
            return
        while self.through and thing.node is not None and thing.node.op == "copy" and thing.whole:
            found, thing = found.claim(thing.node), thing.node.args[0]
        bound = found.bind(self.name, thing)
        if bound is not None:
            yield bound


@dataclass(frozen=True)
class Number(Pattern):
    """A Python number for which test(number) holds."""

    name: str | None = None
    test: Callable[[float], bool] = lambda value: True

    def match(self, thing, reader, found):
        if isinstance(thing, (int, float)) and not isinstance(thing, bool) and self.test(thing):
            bound = found.bind(self.name, thing)
            if bound is not None:
                yield bound


@dataclass(frozen=True)
class Op(Pattern):
    """A node with one of these operations whose first arguments fit; additions and products commute.

    name: binds the node. where: a last condition on it. Copies and casts between the node and its reader are looked
    through, and belong to the match.
    """

    ops: tuple[str, ...]
    args: tuple[Pattern, ...]
    name: str | None = None
    where: Callable[[Node], bool] | None = None

    def match(self, thing, reader, found):
        while isinstance(thing, Value) and thing.node is not None and thing.whole:
            node = thing.node
            if node.op in self.ops:
                yield from self.match_node(node, found)
            if node.op != "copy" or "copy" in self.ops:
                return
            found, thing = found.claim(node), node.args[0]

    def match_node(self, node: Node, found: Match) -> Iterator[Match]:
        """All ways in which the node itself fits."""
        if node.op not in self.ops or (self.where is not None and not self.where(node)):
            return
        bound = found.bind(self.name, node)
        if bound is None:
            return
        orders = [node.args]
        if node.op in ("add", "mul") and len(self.args) == 2:
            orders.append((node.args[1], node.args[0]))
        for order in orders:
            if len(order) >= len(self.args):
                yield from _all(self.args, order, node, bound.claim(node))


def _all(patterns, things, reader, found):
    if not patterns:
        yield found
        return
    for first in patterns[0].match(things[0], reader, found):
        yield from _all(patterns[1:], things[1:], reader, first)


@dataclass(frozen=True)
class Either(Pattern):
    """The first alternatives first."""

    options: tuple[Pattern, ...]

    def match(self, thing, reader, found):
        for option in self.options:
            yield from option.match(thing, reader, found)

    def match_node(self, node, found):
        for option in self.options:
            yield from option.match_node(node, found)


@dataclass(frozen=True)
class Items(Pattern):
    """A list of tensors, such as the first argument of `cat`."""

    items: tuple[Pattern, ...]

    def match(self, thing, reader, found):
        if isinstance(thing, tuple) and len(thing) == len(self.items):
            yield from _all(self.items, thing, reader, found)


@dataclass(frozen=True)
class Part(Pattern):
    """A slice of a tensor; whole: what the tensor is, where that is claimed too."""

    name: str | None = None
    whole: Pattern | None = None

    def match(self, thing, reader, found):
        if not isinstance(thing, Value) or thing.operand is None:
            return
        bound = found.bind(self.name, thing)
        if bound is None:
            return
        if self.whole is None:
            if not thing.whole or _strided_slice(thing.operand):
                yield bound
        elif thing.node is not None and not thing.whole:
            yield from self.whole.match(Value(thing.operand, thing.node, thing.node.shape), None, bound)


def _strided_slice(operand):
    """Whether there is memory between its rows, as of one half of a tensor from outside."""
    shape, stride = operand.shape, operand.stride
    return len(shape) > 1 and stride[-1] == 1 and stride[-2] > shape[-1]


def op(names: str, *args: Pattern, name: str | None = None, where=None) -> Op:
    """An `Op` with one of the names, "relu|silu"."""
    return Op(tuple(names.split("|")), args, name, where)


def either(*options: Pattern) -> Either:
    """The first alternatives first."""
    return Either(options)


# ---- conditions on a tensor, given the node that reads it ------------------------------------------------------------


def _aligned(value, reader):
    return (1,) * (len(reader.shape) - len(value.shape)) + value.shape


def full(value, reader):
    """As large as the result: not broadcast."""
    return value.shape == reader.shape and len(value.shape) > 0


def per_row(value, reader):
    """(B, 1, ..., D) beside (B, N, ..., D): a number for every sample and feature, the same for all tokens."""
    shape = _aligned(value, reader)
    inner = len(shape) >= 3 and all(size == 1 for size in shape[1:-1])
    return inner and shape[0] == reader.shape[0] and shape[-1] == reader.shape[-1] and not value.operand.parameter


def per_channel_row(value, reader):
    """(B, C, 1, ...) beside (B, C, H, ...)."""
    shape = _aligned(value, reader)
    outer = len(shape) >= 3 and all(size == 1 for size in shape[2:])
    return outer and shape[:2] == reader.shape[:2] and not value.operand.parameter


def per_sample(value, reader):
    """(B, 1, ..., 1) beside (B, ...): one number for every sample."""
    shape = _aligned(value, reader)
    return len(shape) >= 2 and shape[0] == reader.shape[0] > 1 and math.prod(shape[1:]) == 1


def per_channel(value, reader):
    """A bias: one number for every channel, at dimension 1 or the last, the same for all samples."""
    shape = _aligned(value, reader)
    places = [axis for axis, size in enumerate(shape) if size > 1]
    return len(reader.shape) >= 2 and len(places) == 1 and places[0] in (1, len(shape) - 1) and (
        places[0] > 0 and shape[places[0]] == reader.shape[places[0]]
    )  # fmt: skip


def scalar(value, reader):
    """One number, or one for every sample."""
    return math.prod(value.shape) == 1 or per_sample(value, reader)


def activation(value, reader):
    """Computed or given, but no weight."""
    return not value.operand.parameter


def is_complex(value, reader):
    return value.operand.dtype.is_complex


def over_last_dimension(node):
    """Of a softmax: over the keys."""
    return len(node.args) > 1 and node.args[1] in (-1, len(node.shape) - 1)


def over_last_dimension_alone(node):
    """Of a mean: over the last dimension, and no other."""
    dims = node.args[1] if len(node.args) > 1 else None
    return isinstance(dims, tuple) and dims in ((-1,), (len(node.shape) - 1,))


def of_one_dimension(node):
    """Of a norm: its normalized_shape is the last dimension alone."""
    return len(node.args[1]) == 1


def of_a_sample(node):
    """Of a reduction: over all but the batch."""
    return len(node.shape) > 0 and math.prod(node.shape) == node.shape[0]
