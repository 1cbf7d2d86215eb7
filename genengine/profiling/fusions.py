"""Which of our ops would replace what ran, and how many bytes that would save.

The recorded dataflow is searched for the forms of `forms.FORMS`. A match counts if nothing but what the op returns is
used elsewhere, and if the op would move less or launch fewer kernels. Bytes of the forward pass alone are counted:
what autograd kept of a match is recomputed by the op's own backward.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass

from genengine.profiling import graph as dataflow
from genengine.profiling.forms import FORMS, Form, fits
from genengine.profiling.graph import Graph, Node, Value
from genengine.profiling.patterns import Match, full, scalar
from genengine.profiling.record import Recording, Step
from genengine.profiling.report import Fusion

_AFFINE = ("add", "sub", "mul", "div", "clamp")
_OF_THE_KL = (*_AFFINE, "exp", "square", "sum", "mean")
_MOST_STATES = 5  # x, three registers, and the noise
_REACH = 48  # nodes after the guided output among which the rest of a sampler's step is looked for


@dataclass(frozen=True)
class Found:
    """One place where a form stands: its steps, in order, what they move and what the op would."""

    form: Form
    steps: tuple[Step, ...]
    bytes: int
    fused_bytes: int


def find(recording: Recording, durations: dict[int, float]) -> list[Fusion]:
    """The fusions of a recording, by bytes saved; durations: step -> measured seconds, of all steps that ran.

    A step without one was recorded but did not run as such: torch.compile has fused it already.
    """
    groups = defaultdict(list)
    for found in search(recording):
        if any(step.index not in durations for step in found.steps):
            continue
        groups[found.form.op, found.steps[-1].line].append(found)
    rows = []
    for (name, line), members in groups.items():
        steps = [step for found in members for step in found.steps]
        launches = 1 if members[0].form.one_launch else len(members)
        moved = sum(found.bytes for found in members)
        saved = moved - sum(found.fused_bytes for found in members)
        if saved > 0 or launches * 4 <= len(steps):
            kernels = dict(Counter(step.name for step in steps))
            spent = sum(durations[step.index] for step in steps)
            rows.append(Fusion(name, line, len(members), kernels, launches, moved, max(saved, 0), spent))
    return sorted(rows, key=lambda fusion: (-fusion.saved, -fusion.seconds))


def search(recording: Recording) -> list[Found]:
    """All matches, longest forms first; no step belongs to two."""
    graph, used, found = dataflow.build(recording), set(), []
    for form in FORMS:
        for root in _candidates(graph, form):
            if root.step.index in used:
                continue
            steps = _match(graph, form, root, used)
            if steps:
                used |= {step.index for step in steps}
                found.append(_measured(graph, form, steps))
    return found


def _candidates(graph, form) -> list[Node]:
    options = getattr(form.root, "options", (form.root,))
    names = {name for option in options for name in option.ops}
    return sorted((node for name in names for node in graph.roots[name]), key=lambda node: node.step.index)


def _match(graph, form, root, used) -> tuple[Step, ...]:
    """The steps of the first way in which the form stands at this node, () if there is none."""
    for match in form.root.match_node(root, Match({"root": root})):
        if not fits(form, match) or (form.check is not None and not form.check(match)):
            continue
        results = [root, *(match.names[name] for name in form.results if name in match.names)]
        nodes = set(match.nodes)
        for further in _further(graph, form, match):
            nodes |= further.nodes
            results.append(further.names["also"])
        if form.grow is not None:
            grown = (_grown_row if form.grow == "row" else _grown_kl)(graph, match, nodes)
            if grown is None:
                continue
            nodes |= set(grown)
            results += grown
        steps = {node.step.index: node.step for node in nodes}
        if used.isdisjoint(steps) and len(steps) > 1 - form.one_launch and not _leaks(graph, steps, results):
            return tuple(steps[index] for index in sorted(steps))
    return ()


def _further(graph, form, match):
    """Matches of the form's further results, among what reads what is bound."""
    if not form.also:
        return
    bound = [thing for thing in match.names.values() if isinstance(thing, (Node, Value))]
    operands = [thing.operand for thing in bound if isinstance(thing, Value)]
    operands += [operand for thing in bound if isinstance(thing, Node) for operand in thing.step.writes]
    seen = set()
    for operand in operands:
        for node in graph.consumers.get((operand.storage, operand.version), ()):
            candidates = [node] + [reader for write in node.step.writes for reader in _readers(graph, write)]
            for candidate in candidates:
                if candidate in seen or candidate in match.nodes:
                    continue
                seen.add(candidate)
                for pattern in form.also:
                    if candidate.op in pattern.ops:
                        for further in pattern.match_node(candidate, match):
                            yield further.bind("also", candidate)
                            break


def _readers(graph, operand):
    return graph.consumers.get((operand.storage, operand.version), ())


def _leaks(graph, steps, results) -> bool:
    """Whether something that the op does not return is used elsewhere."""
    returned = {node.step.index for node in results}
    return any(_outside_uses(graph, steps, operand) for index, step in steps.items() if index not in returned
               for operand in step.writes)  # fmt: skip


def _outside_uses(graph, steps, operand) -> bool:
    readers = graph.readers.get((operand.storage, operand.version), ())
    return graph.kept(operand) or any(not step.backward and step.index not in steps for step in readers)


def _measured(graph: Graph, form: Form, steps: tuple[Step, ...]) -> Found:
    """Bytes now, and those of distinct inputs from elsewhere plus results that are used elsewhere."""
    by_index = {step.index: step for step in steps}
    written = {(operand.storage, operand.version) for step in steps for operand in step.writes}
    inputs = {
        operand.region: operand.nbytes
        for step in steps
        for operand in step.reads
        if (operand.storage, operand.version) not in written
    }
    results = sum(
        operand.nbytes for step in steps for operand in step.writes if _outside_uses(graph, by_index, operand)
    )
    return Found(form, steps, sum(step.cost.bytes for step in steps), sum(inputs.values()) + results)


# ---- chains of no fixed length ---------------------------------------------------------------------------------------


def _grown_row(graph, match, nodes) -> list[Node] | None:
    """The affine steps after the guided output: of states that were there before it, scalars and noise, as a table row.

    None where no state comes in: guidance alone is no step of a sampler.
    """
    guided = match.names["guided"]
    taken: dict[Node, list[Value]] = {}

    def belongs(value):
        made = value.node
        if made is not None and value.whole and (made is guided or made in taken):
            return True
        before = made is None or made.op == "randn" or made.step.index < guided.step.index
        return scalar(value, guided) or (before and full(value, guided))

    first = bisect.bisect_right(graph.nodes, guided.step.index, key=lambda node: node.step.index)
    for node in graph.nodes[first : first + _REACH]:
        arguments = list(_flat(dataflow.sources(node)))
        if node.op in _AFFINE and node.shape == guided.shape and all(map(belongs, arguments)):
            taken[node] = arguments
    linked = _linked(guided, taken)
    states = {value.key for node in linked for value in taken[node] if value.node not in (guided, *linked)
              and full(value, guided)}  # fmt: skip
    return linked if 1 <= len(states) <= _MOST_STATES else None


def _linked(guided, taken) -> list[Node]:
    """Those of the steps that the guided output flows into, and those that flow into these."""
    after = {guided}
    for node, arguments in taken.items():
        if any(value.node in after for value in arguments):
            after.add(node)
    before = set(after)
    for node in reversed(taken):
        if node in before:
            before |= {value.node for value in taken[node] if value.node in taken}
    return [node for node in taken if node in before]


def _grown_kl(graph, match, nodes) -> list[Node] | None:
    """KL(q || N(0, 1)): what is computed from mean and logvar alone, as far as a sum; nothing, where there is none."""
    mean, logvar, std = (match.names[name] for name in ("mean", "logvar", "std"))
    taken = []

    def belongs(value):
        inside = value.node is not None and value.whole and (value.node in taken or value.node is std)
        return inside or value.key in (mean.key, logvar.key)

    for node in _downstream(graph, (mean.operand, logvar.operand, *std.step.writes)):
        if node in nodes or node.op not in _OF_THE_KL:
            continue
        if all(map(belongs, _flat(dataflow.sources(node)))):
            taken.append(node)
    kinds = {node.op for node in taken}
    if "sum" in kinds and kinds & {"square", "mul"}:
        return taken
    return []


def _flat(values):
    """What the values within one step are made of: tensors that exist."""
    for value in values:
        if value.operand is None:
            yield from _flat(dataflow.sources(value.node))
        else:
            yield value


def _downstream(graph, operands) -> list[Node]:
    """All nodes that read the operands, or what such nodes wrote, as they ran; a few dozen at most."""
    found, waiting = {}, list(operands)
    while waiting and len(found) < 64:
        for node in _readers(graph, waiting.pop(0)):
            if node.step.index not in found and node.op in _OF_THE_KL:
                found[node.step.index] = node
                waiting += node.step.writes
    return [found[index] for index in sorted(found)]
