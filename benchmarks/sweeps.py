"""What a sweep says beyond its rows: how time grows along the axis, what other ways to use ours gain, and ours beside
what papers report of such work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from genengine.benchmarks import table


def sweeps(rows: Sequence[tuple[int, dict]]) -> dict[tuple[str, str, str, str], dict[int, dict]]:
    """(name, dtype, device, axis) -> size -> row, where rows differ in one dimension, which their labels name."""
    found: dict[tuple, dict[int, dict]] = {}
    for _, row in rows:
        if match := re.fullmatch(r"(\w+) (\d+)", row["label"]):
            key = row["name"], row["dtype"], row["device"], match[1]
            found.setdefault(key, {})[int(match[2])] = row
    return {key: sizes for key, sizes in found.items() if len(sizes) > 1 and _along_one(sizes)}


def _along_one(rows):
    """Whether shapes differ in one dimension, by the sizes that their labels name."""
    shapes = [row["shape"] for row in rows.values()]
    if len(set(map(len, shapes))) > 1:
        return False
    return [column for column in zip(*shapes, strict=True) if len(set(column)) > 1] == [tuple(rows)]


def timed(report: dict) -> list[tuple[int, dict]]:
    """The rows that did not fail, with their numbers."""
    return [(number, row) for number, row in enumerate(report["rows"], 1) if "error" not in row]


# ---- growth ------------------------------------------------------------------------------------------------------


def growths(rows: Sequence[tuple[int, dict]]) -> list[str]:
    """Of every sweep whose rows count elements our time per element: the same at all sizes, if time is linear.

    Layers that differ make work itself a little more or less per element, so time per operation stands beside it.
    """
    lines = []
    for (name, dtype, _, axis), sizes in sweeps(rows).items():
        each = {size: row["ns_per_element"] for size, row in sorted(sizes.items()) if "ns_per_element" in row}
        if len(each) == len(sizes):
            told = ", ".join(f"{table.duration(ns * 1e-9)} at {size}" for size, ns in each.items())
            spread = f"largest over smallest {_spread(each.values()):.2f}"
            if all(row.get("cost", {}).get("flops") for row in sizes.values()):
                spread += f", per operation {_spread(1 / row['TFLOP_per_s'] for row in sizes.values()):.2f}"
            lines.append(f"{name}, {dtype}, per element by {axis}: {told}; {spread}")
    return lines


def ways(rows: Sequence[tuple[int, dict]]) -> list[str]:
    """Of every sweep what the other ways to use ours gain over "fused", at each size: above 1 they are faster."""
    lines = []
    for (name, dtype, _, axis), sizes in sweeps(rows).items():
        gains: dict[str, list[str]] = {}
        for size, row in sorted(sizes.items()):
            for variant, entry in row["ratios"].items():
                if table.is_ours(variant):
                    gains.setdefault(variant, []).append(f"{table.times(1 / entry['ratio'])} at {size}")
        lines += [f"{name}, {dtype}, fused / {way} by {axis}: {', '.join(told)}" for way, told in gains.items()]
    return lines


def _spread(values):
    values = list(values)
    return max(values) / min(values)


# ---- beside what is published ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Speed-ups by size, of a variant of ours or as a paper reports them."""

    label: str
    speedups: dict[int, float]
    published: bool


@dataclass(frozen=True)
class Comparison:
    """Every curve of one sweep: the time of the variant `over`, or of a paper's own baseline, over its own."""

    name: str
    axis: str
    over: str
    curves: list[Curve]

    @property
    def sizes(self) -> list[int]:
        return sorted({size for curve in self.curves for size in curve.speedups})


def comparisons(rows: Sequence[tuple[int, dict]]) -> list[Comparison]:
    """Sweeps along an axis of which a paper has published speed-ups."""
    found = []
    for (name, dtype, _, axis), sizes in sweeps(rows).items():
        known = {curve["label"]: curve for row in sizes.values() for curve in row.get("published", ())}
        known = [curve for curve in known.values() if curve["axis"] == axis]
        for over in dict.fromkeys(curve["over"] for curve in known):
            ours = _speedups(sizes, over)
            theirs = [
                Curve(curve["label"], {int(size): value for size, value in curve["speedups"].items()}, True)
                for curve in known
                if curve["over"] == over
            ]
            if ours:
                found.append(Comparison(f"{name}, {dtype}", axis, over, ours + theirs))
    return found


def _speedups(sizes, over):
    """The curves of all variants but `over` itself, yardsticks left out."""
    curves: dict[str, dict[int, float]] = {}
    for size, row in sorted(sizes.items()):
        if over not in row["ratios"]:
            continue
        ours = row["ratios"][over]["ratio"]
        curves.setdefault("fused", {})[size] = ours
        for name, entry in row["ratios"].items():
            if name != over and not table.is_yardstick(name):
                curves.setdefault(name, {})[size] = ours / entry["ratio"]
    return [Curve(name, values, False) for name, values in curves.items()]


# ---- the terminal ------------------------------------------------------------------------------------------------


def lines(report: dict) -> list[str]:
    """All of it as text, to stand below the rows."""
    rows = timed(report)
    return [*growths(rows), *ways(rows), *(line for found in comparisons(rows) for line in _table(found))]


def _table(found):
    labels = [f"{curve.label}, published" if curve.published else curve.label for curve in found.curves]
    width = max(map(len, labels)) + 4
    cells = [
        [table.figure(curve.speedups[s]) if s in curve.speedups else "" for s in found.sizes] for curve in found.curves
    ]
    columns = [max(len(text) for text in column) for column in zip(map(str, found.sizes), *cells, strict=True)]
    put = lambda texts: "  ".join(text.rjust(size) for text, size in zip(texts, columns, strict=True)).rstrip()  # noqa: E731
    return [
        f"{found.name}: speed-up over {found.over}",
        f"    {found.axis}".ljust(width + 2) + put(map(str, found.sizes)),
        *(f"    {label}".ljust(width + 2) + put(row) for label, row in zip(labels, cells, strict=True)),
        "    published: on other hardware, of the paper's own network, against its own baseline",
    ]
