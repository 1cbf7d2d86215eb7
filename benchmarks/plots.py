"""The figures of a report: a roofline, speed-ups with their intervals, times against the size of a swept axis, and
published speed-ups beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from genengine.benchmarks import registry, roofline, svg, sweeps, table
from genengine.benchmarks.svg import COLOURS, WIDTH

RIVALS = {"eager": table.is_pytorch, "torch.compile": table.is_compiled, "peer": table.is_peer}
RIVAL_COLOURS = {"eager": COLOURS["blue"], "torch.compile": COLOURS["green"], "peer": COLOURS["purple"]}
ROWS_PER_FIGURE = 12
BAR, HEADING, GAP = 0.16, 0.19, 0.09  # heights in a figure of bars, in inches

check = svg.check


@dataclass(frozen=True)
class Section:
    """Figures of one kind, each an <svg> element, with a heading, a sentence on how to read them, and notes below."""

    heading: str
    caption: str
    drawn: list[str]
    notes: list[str] = field(default_factory=list)


def sections(report: dict) -> list[Section]:
    """All figures that the report has data for. Raises RuntimeError without matplotlib."""
    timed = sweeps.timed(report)
    with svg.style():
        found = [
            Section("Roofline", roofline.CAPTION, roofline.draw(report["ceilings"], timed)),
            Section("Speed-up", _speedup_caption(timed), speedups(timed)),
            Section("Scaling", SCALING_CAPTION, scalings(timed), [*sweeps.growths(timed), *sweeps.ways(timed)]),
            Section("Beside published figures", PUBLISHED_CAPTION, publisheds(timed)),
        ]
    return [section for section in found if section.drawn]


# ---- speed-up ----------------------------------------------------------------------------------------------------


def _speedup_caption(rows):
    cold = " Inputs are not in the cache." if any("hot" in row for _, row in rows) else ""
    return (
        "Time of the strongest eager variant, of torch.compile and of the strongest peer over ours; thin lines are "
        f"95 % intervals. Left of 1 is a loss.{cold} Numbers are those of the rows below."
    )


def speedups(rows: Sequence[tuple[int, dict]]) -> list[str]:
    """Bars of each row's strongest rivals: ops or models with few rows share a figure, those with many take several."""
    groups: dict[tuple[str, str], list] = {}
    for number, row in rows:
        bars = [(kind, *found) for kind, wanted in RIVALS.items() if (found := table.strongest(row["ratios"], wanted))]
        if bars:
            groups.setdefault((row["kind"], row["group"]), []).append((number, row, bars))
    drawn = []
    for names, found in _shared(groups):
        ends = [value for _, _, bars in found for _, _, entry in bars for value in (entry["low"], entry["high"])]
        limits = min(0.7, *ends) / 1.15, max(1.5, *ends) * 1.45  # room for the figures beside the bars
        parts = _parts(found, ROWS_PER_FIGURE)
        for part, chosen in enumerate(parts, 1):
            title = ", ".join(names) + (f", {part} of {len(parts)}" if len(parts) > 1 else "")
            drawn.append(_bars(svg.line(title, 80), chosen, limits, f"bars{len(drawn)}"))
    return drawn


def _shared(groups: dict[tuple[str, str], list]) -> list[tuple[list[str], list]]:
    """The groups by kind, neighbours together as long as they fit one figure: their names and their rows."""
    found, last = [], None
    for (kind, group), rows in sorted(groups.items(), key=lambda item: registry.KINDS.index(item[0][0])):
        if kind == last and len(found[-1][1]) + len(rows) <= ROWS_PER_FIGURE:
            found[-1][0].append(group)
            found[-1][1].extend(rows)
        else:
            found.append(([group], list(rows)))
        last = kind
    return found


def _parts(rows: Sequence, most: int) -> list[Sequence]:
    """Split into parts of nearly equal length, none longer than `most`."""
    count = math.ceil(len(rows) / most)
    size = math.ceil(len(rows) / count)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _bars(title, rows, limits, name):
    inches = sum(HEADING + BAR * len(bars) + GAP for _, _, bars in rows)
    height = inches + 0.75
    drawn = svg.figure(WIDTH, height)
    axes = drawn.add_axes((0.185, 0.4 / height, 0.8, inches / height))
    axes.set(xscale="log", xlim=limits, ylim=(inches, 0), yticks=[])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    svg.heading(drawn, title)
    y = 0.0
    for number, row, bars in rows:
        heading = f"{number}  {svg.line(row['name'], 50)}, {svg.line(table.work(row), 55)}"
        axes.annotate(
            heading, (0.008, y + HEADING / 2), xycoords=("figure fraction", "data"), va="center", url=f"#row-{number}",
            fontsize=8, annotation_clip=False,
        )  # fmt: skip
        y += HEADING
        axes.plot((1, 1), (y - 0.02, y + BAR * len(bars) + 0.02), color=COLOURS["ink"], linewidth=1, zorder=3)
        for kind, variant, entry in bars:
            _bar(axes, y + BAR / 2, kind, variant, entry)
            y += BAR
        y += GAP
    svg.log_ticks(axes.xaxis, limits, "{:g}×".format)
    return svg.inline(drawn, name, f"speed-up, {title}")


def _bar(axes, y, kind, variant, entry):
    value, low, high = entry["ratio"], entry["low"], entry["high"]
    loss = table.is_loss(value)
    axes.barh(
        y, value - 1, left=1, height=BAR * 0.72, color=COLOURS["red"] if loss else RIVAL_COLOURS[kind], clip_on=False,
        zorder=2,
    )  # fmt: skip
    axes.plot((low, high), (y, y), color=COLOURS["ink"], linewidth=0.8, zorder=4, clip_on=False)
    axes.annotate(
        f"{table.times(value)}×" + (" loss" if loss else ""), (max(value, high, 1), y), xytext=(4, 0),
        textcoords="offset points", va="center_baseline", fontsize=7.5, fontweight="bold" if loss else "normal",
        color=COLOURS["ink"], annotation_clip=False,
    )  # fmt: skip
    axes.annotate(
        svg.line(variant, 21), (0, y), xycoords=("axes fraction", "data"), xytext=(-5, 0),
        textcoords="offset points", ha="right", va="center_baseline", fontsize=7.5, color=COLOURS["muted"],
        annotation_clip=False,
    )  # fmt: skip


# ---- scaling -----------------------------------------------------------------------------------------------------


SCALING_CAPTION = (
    "Time of every variant (left; the band is the 20th to 80th percentile) and its time over ours (right, with 95 % "
    "intervals; above 1 we are faster) against the size of the axis that the sweep scaled."
)


def scalings(rows: Sequence[tuple[int, dict]]) -> list[str]:
    """Times and ratios against the size of an axis, of rows that a sweep labelled "batch 4" and the like."""
    return [
        _scaling(svg.line(f"{name}, {dtype}, {_swept_shape(found, axis)}", 90), axis, found, f"scaling{index}")
        for index, ((name, dtype, _, axis), found) in enumerate(sweeps.sweeps(rows).items())
    ]


def _swept_shape(rows, axis):
    columns = zip(*(row["shape"] for row in rows.values()), strict=True)
    return " × ".join(str(column[0]) if len(set(column)) == 1 else axis for column in columns)


def _scaling(title, axis, rows, name):
    sizes = sorted(rows)
    variants = list(dict.fromkeys(variant for size in sizes for variant in rows[size]["variants"]))
    legend = math.ceil(len(variants) / 4)
    height = 3.1 + 0.19 * legend
    drawn = svg.figure(WIDTH, height)
    bottom, tall = (0.5 + 0.19 * legend) / height, 1 - (0.85 + 0.19 * legend) / height
    times, ratios = drawn.add_axes((0.095, bottom, 0.4, tall)), drawn.add_axes((0.565, bottom, 0.42, tall))
    svg.heading(drawn, title)
    for axes in (times, ratios):
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.minorticks_off()
        axes.set_xticks(sizes, list(map(str, sizes)))
    for index, variant in enumerate(variants):
        _curve(times, ratios, variant, rows, _curve_look(variant, index))
    times.yaxis.set_major_formatter(lambda value, _: table.duration(value))
    ratios.axhline(1, color=COLOURS["ink"], linewidth=1)
    low, high = ratios.get_ylim()
    ratios.set_ylim(min(low, 0.7), max(high, 1.5))
    svg.log_ticks(ratios.yaxis, ratios.get_ylim(), "{:g}×".format)
    drawn.legend(*times.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.01, 0), ncols=4)
    return svg.inline(drawn, name, f"scaling of {title} with {axis}")


def _curve_look(variant, index):
    if variant == "fused":
        return {"color": COLOURS["ours"], "marker": "o", "linewidth": 2.2, "zorder": 4}
    style = ":" if table.is_yardstick(variant) else "-"
    return svg.look(index - 1) | {"linestyle": style, "markersize": 4.5, "linewidth": 1.3}


def _curve(times, ratios, variant, rows, look: dict):
    """One variant's times, and its ratios where it competes."""
    there = [size for size in sorted(rows) if variant in rows[size]["variants"]]
    timings = [rows[size]["variants"][variant] for size in there]
    times.plot(there, [timing["median"] for timing in timings], label=svg.line(variant, 26), **look)
    times.fill_between(
        there, [timing["p20"] for timing in timings], [timing["p80"] for timing in timings], color=look["color"],
        alpha=0.15, linewidth=0,
    )  # fmt: skip
    if variant == "fused" or table.is_yardstick(variant):
        return
    entries = [rows[size]["ratios"][variant] for size in there]
    middle = [entry["ratio"] for entry in entries]
    whiskers = [
        [entry["ratio"] - entry["low"] for entry in entries],
        [entry["high"] - entry["ratio"] for entry in entries],
    ]
    ratios.errorbar(there, middle, yerr=_positive(whiskers), elinewidth=0.8, **look)


def _positive(whiskers: list[list[float]]) -> list[list[float]]:
    """A median can lie outside its bootstrap interval by rounding; matplotlib refuses such a whisker."""
    return [[max(0.0, length) for length in side] for side in whiskers]


# ---- beside what is published ------------------------------------------------------------------------------------


PUBLISHED_CAPTION = (
    "How many times as fast as one variant, such as a naive loop, each of the others is, against the size of an axis, "
    "with the speed-ups that papers report of such work. Dashed lines are as published: on other hardware, of the "
    "paper's own network, against its own baseline. Compare how they grow, not how high they are."
)


def publisheds(rows: Sequence[tuple[int, dict]]) -> list[str]:
    """Our speed-ups by size, and those of papers, on logarithmic axes."""
    return [_comparison(found, f"published{index}") for index, found in enumerate(sweeps.comparisons(rows))]


def _comparison(found, name):
    legend = math.ceil(len(found.curves) / 2)
    height = 3.6 + 0.19 * legend
    drawn = svg.figure(WIDTH, height)
    title = svg.line(f"{found.name}: speed-up over {found.over}", 90)
    svg.heading(drawn, title)
    bottom = 0.5 + 0.19 * legend
    axes = drawn.add_axes((0.085, bottom / height, 0.85, (height - bottom - 0.35) / height))
    axes.set(xscale="log", yscale="log", xlabel=found.axis)
    axes.minorticks_off()
    axes.set_xticks(found.sizes, list(map(str, found.sizes)))
    for index, curve in enumerate(found.curves):
        _speedup_curve(axes, curve, _comparison_look(curve, index))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.7), high * 1.6)  # room for the figures
    svg.log_ticks(axes.yaxis, axes.get_ylim(), "{:,g}×".format)
    drawn.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.01, 0), ncols=2)
    return svg.inline(drawn, name, f"beside published figures, {title}, by {found.axis}")


def _comparison_look(curve, index):
    if curve.published:
        return {"color": COLOURS["muted"], "marker": "x", "markersize": 4, "linestyle": "--", "linewidth": 1.3}
    return _curve_look(curve.label, index)


def _speedup_curve(axes, curve, look):
    """A line; of "fused" and of what is published the first and last figures stand beside it."""
    sizes = sorted(curve.speedups)
    values = [curve.speedups[size] for size in sizes]
    label = f"published: {curve.label}" if curve.published else curve.label
    axes.plot(sizes, values, label=svg.line(label, 64), **look)
    if not (curve.published or curve.label == "fused"):
        return
    below = curve.published
    for end in (0, -1):
        axes.annotate(
            f"{table.figure(values[end])}×", (sizes[end], values[end]), xytext=(0, -6 if below else 6),
            textcoords="offset points", ha="center", va="top" if below else "bottom", fontsize=7.5,
            color=COLOURS["ink"], annotation_clip=False,
        )  # fmt: skip
