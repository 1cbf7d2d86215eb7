"""The dataflow of a recording: what every tensor was computed from, in a few canonical operations.

In-place forms, `alpha=`, `addcmul`, `lerp` and `rsub` are written out as additions and products, so that a pattern
need not list them: one recorded step may stand for several nodes. Views are looked through: what counts is which step
wrote the storage, and whether all of what it wrote is read, or a part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from genengine.profiling.record import Operand, Recording, Step

# Canonical names where ATen's differ beyond a trailing underscore.
_NAMES = {
    "native_layer_norm": "layer_norm", "native_group_norm": "group_norm", "_softmax": "softmax", "_to_copy": "copy",
    "clone": "copy", "randn_like": "randn", "normal": "randn", "hardtanh": "clamp", "_fused_rms_norm": "rms_norm",
}  # fmt: skip


@dataclass(eq=False)
class Node:
    """One canonical operation. args: `Value`, numbers, tuples of them, None.

    shape: of its result. final: the last of its step's nodes, whose result is what the step wrote.
    """

    op: str
    args: tuple
    step: Step
    shape: tuple[int, ...]
    final: bool = True


@dataclass(eq=False)
class Value:
    """A tensor as a node reads it. operand: None for what only exists within one step. node: None if from outside.

    whole: all of what the node wrote is read, not a slice of it.
    """

    operand: Operand | None
    node: Node | None
    shape: tuple[int, ...]
    whole: bool = True

    @property
    def key(self) -> object:
        """Equal for two reads of the same numbers."""
        return self.node if self.operand is None else self.operand.value


@dataclass
class Graph:
    """The nodes of the forward pass, in order and by operation, and who reads what.

    readers: (storage, version) -> the steps that read it. returned: storages of the function's result.
    """

    nodes: list[Node] = field(default_factory=list)
    roots: dict[str, list[Node]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[tuple[int, int], list[Step]] = field(default_factory=lambda: defaultdict(list))
    consumers: dict[tuple[int, int], list[Node]] = field(default_factory=lambda: defaultdict(list))
    last: dict[int, int] = field(default_factory=dict)
    returned: frozenset[int] = frozenset()

    def kept(self, operand: Operand) -> bool:
        """Whether what was written outlives the function: returned, or in memory that was there before."""
        final = self.last.get(operand.storage) == operand.version
        return final and (operand.storage in self.returned or operand.outside)


def build(recording: Recording) -> Graph:
    """The graph of a recording; what autograd or an optimiser ran is no part of it but as a reader."""
    graph = Graph(returned=recording.returned)
    writers: dict[tuple[int, int], tuple[Operand, Node]] = {}
    for step in recording.steps:
        for operand in step.reads:
            graph.readers[operand.storage, operand.version].append(step)
        node = None if step.backward or step.optimizer else _canonical(step, writers)
        for operand in step.writes:
            graph.last[operand.storage] = operand.version
        if node is not None and step.writes:  # a second result, such as a norm's mean, is not what the node stands for
            writers[step.writes[0].storage, step.writes[0].version] = step.writes[0], node
        if node is not None:
            graph.nodes.append(node)
            graph.roots[node.op].append(node)
            for operand in step.reads:
                graph.consumers[operand.storage, operand.version].append(node)
    return graph


def _canonical(step: Step, writers) -> Node:
    name = step.name.removeprefix("aten::")
    name = name.removesuffix("_") if not name.startswith("_") else name
    args = tuple(_value(argument, writers) for argument in step.args)
    shape = step.writes[0].shape if step.writes else ()
    make = _Maker(step, shape)
    rewrite = _REWRITES.get(name)
    if rewrite is not None and step.name.startswith("aten::"):
        return rewrite(make, *args)
    if name == "copy":  # copy_(target, source)
        args = args[1:2]
    return make.last(_NAMES.get(name, name) if step.name.startswith("aten::") else step.name, *args)


def _value(argument, writers):
    if isinstance(argument, Operand):
        written, node = writers.get((argument.storage, argument.version), (None, None))
        if node is None:
            return Value(argument, None, argument.shape)
        if not _covers(written, argument):
            return Value(argument, None, argument.shape, whole=False)
        whole = math.prod(argument.shape) * argument.dtype.itemsize >= written.nbytes
        return Value(argument, node, argument.shape, whole)
    if isinstance(argument, tuple):
        return tuple(_value(entry, writers) for entry in argument)
    return argument


def _covers(written: Operand, read: Operand) -> bool:
    """Whether all that is read lies where this step wrote; an in-place write to a slice says nothing of the rest."""
    first, last = _extent(written)
    begin, end = _extent(read)
    return first <= begin and end <= last


def _extent(operand):
    span = sum((size - 1) * stride for size, stride in zip(operand.shape, operand.stride, strict=True) if size > 1)
    begin = operand.offset * operand.dtype.itemsize
    return begin, begin + (span + 1) * operand.dtype.itemsize


class _Maker:
    """Makes the nodes of one step; `last` its final one, `inner` what lives only within it."""

    def __init__(self, step, shape):
        self.step, self.shape = step, shape

    def last(self, op, *args):
        return Node(op, args, self.step, self.shape)

    def inner(self, op, *args, shape=None):
        if shape is None:
            shape = tuple(torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Value))))
        return Value(None, Node(op, args, self.step, shape, final=False), shape)

    def scaled(self, value, factor):
        if isinstance(factor, (int, float)) and factor == 1:
            return value
        return value * factor if isinstance(value, (int, float)) else self.inner("mul", value, factor)


def _add(make, a, b, alpha=1):
    return make.last("add", a, make.scaled(b, alpha))


def _sub(make, a, b, alpha=1):
    return make.last("sub", a, make.scaled(b, alpha))


def _rsub(make, a, b, alpha=1):
    return make.last("sub", b, make.scaled(a, alpha))


def _div(make, a, b, *rounding):
    if isinstance(b, (int, float)) and b and not any(rounding):
        return make.last("mul", a, 1.0 / b)
    return make.last("div", a, b)


def _addcmul(make, a, b, c, value=1):
    return make.last("add", a, make.scaled(make.inner("mul", b, c), value))


def _lerp(make, a, b, weight):
    return make.last("add", a, make.inner("mul", make.inner("sub", b, a), weight))


def _pow(make, a, exponent):
    return make.last("square", a) if exponent == 2 else make.last("pow", a, exponent)


def _baddbmm(make, a, b, c, beta=1, alpha=1):
    if beta != 0:
        return make.last("baddbmm", a, b, c)
    return make.last("mul", make.inner("bmm", b, c, shape=make.shape), alpha)


_REWRITES = {
    "add": _add, "sub": _sub, "rsub": _rsub, "div": _div, "addcmul": _addcmul, "lerp": _lerp, "pow": _pow,
    "baddbmm": _baddbmm, "neg": lambda make, a: make.last("mul", a, -1),
}  # fmt: skip


def sources(node: Node) -> Iterator[Value]:
    """The tensors among a node's arguments, also within lists."""
    for argument in node.args:
        for value in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(value, Value):
                yield value
