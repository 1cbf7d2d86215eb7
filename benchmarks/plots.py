"""The figures of a report: rooflines, speed-ups with their intervals, and times against the size of a swept axis."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from genengine.benchmarks import svg, table
from genengine.benchmarks.ceilings import Ceilings

COLOURS = svg.COLOURS
SERIES = [COLOURS[name] for name in ("blue", "orange", "green", "purple", "sky", "olive", "red")]
MARKERS = "os^DvPX<>"
RIVALS = {"eager": table.is_eager, "torch.compile": table.is_compiled, "peer": table.is_peer}
RIVAL_COLOURS = {"eager": COLOURS["blue"], "torch.compile": COLOURS["green"], "peer": COLOURS["purple"]}
WIDTH = 7.2  # inches
ROWS_PER_FIGURE = 12
BAR, HEADING, GAP = 0.16, 0.19, 0.09  # heights in a figure of bars, in inches
POINTS = 72  # in an inch

check = svg.check


@dataclass(frozen=True)
class Plot:
    """One figure, drawn, and the sentence below it."""

    svg: str
    caption: str


def figures(report: dict) -> dict[str, list[Plot]]:
    """All figures that the report has data for, by heading."""
    with svg.style():
        found = {"Roofline": rooflines(report), "Speed-up": speedups(report), "Scaling": scalings(report)}
    return {heading: drawn for heading, drawn in found.items() if drawn}


def _timed(report):
    """Row number, counted from 1 over all rows, and row, of those that were timed."""
    return [(number, row) for number, row in enumerate(report["rows"], 1) if "error" not in row]


def _line(text):
    return " ".join(text.split())


def _short(text, length):
    return text if len(text) <= length else text[: length - 1] + "…"


# ---- roofline ----------------------------------------------------------------------------------------------------


def rooflines(report: dict) -> list[Plot]:
    """Operations per second against operations per byte, under the measured ceilings; nothing without ceilings."""
    dots = [
        (number, row, row["cost"]["flops"] / row["cost"]["bytes"], row["TFLOP_per_s"] * 1e12)
        for number, row in _timed(report)
        if row.get("cost") and row["cost"]["bytes"] and row["cost"]["flops"]
    ]
    if report["ceilings"] is None or not dots:
        return []
    found = Ceilings.from_json(report["ceilings"])
    groups = list(dict.fromkeys(row["group"] for _, row, _, _ in dots))
    legend = math.ceil(len(groups) / 5)
    height = 4.4 + 0.2 * legend
    drawn = svg.figure(WIDTH, height)
    axes = drawn.add_axes((0.105, (0.55 + 0.2 * legend) / height, 0.875, 1 - (0.85 + 0.2 * legend) / height))
    _roofline_axes(axes, dots, found)
    places = _Places(axes)
    for _, _, x, y in dots:
        places.take_dot(x, y)
    _roofs(axes, found, places)
    tips, numbered = _dots(axes, dots, groups, places), _numbers(axes, dots, places)
    drawn.legend(
        handles=_handles(groups), loc="lower left", bbox_to_anchor=(0.04, 0), ncols=min(5, len(groups)),
        handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    left_out = len(_timed(report)) - len(dots)
    caption = (
        "Operations per second of fused against operations per byte that it must move. The sloped lines are the "
        "measured bandwidths of memory and of the fastest cache, the level ones the products and exponentials. Numbers "
        f"are those of the rows below ({numbered} of {len(dots)} fit; point at a dot for its name)."
    )
    if left_out:
        caption += f" {left_out} timed rows count no bytes or no operations and are not shown."
    return [Plot(svg.inline(drawn, "roofline", "roofline of all rows", tips), caption)]


def _roofline_axes(axes, dots, found):
    bandwidth, peak = max(chain(found.copy.values(), found.triad.values())), max(found.matmul.values(), default=0)
    xs, ys = [x for _, _, x, _ in dots], [y for _, _, _, y in dots]
    ridge = peak / bandwidth
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second",
        xlim=(min(xs) / 2, max(*xs, min(ridge, 8 * max(xs))) * 2.5), ylim=(min(ys) / 2.5, max(*ys, peak) * 2.2),
    )  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: _rate(value))
    axes.minorticks_off()


def _rate(value):
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def _roofs(axes, found: Ceilings, places):
    """The ceilings as lines, each with its name where there is room."""
    left, right = axes.get_xlim()
    top = max([*found.matmul.values(), found.exps])
    sizes = sorted(found.copy)
    slow, fast = found.bandwidth(sizes[-1]), max(found.bandwidth(size) for size in sizes)
    for rate, name, dashes in ((slow, "memory", "-"), (fast, "cache", "--")):
        end = min(right, top / rate)
        axes.plot((left, end), (left * rate, end * rate), dashes, color=COLOURS["muted"], linewidth=1.1, zorder=1)
        spots = [(left * (end / left) ** part, 1) for part in (0.75, 0.55, 0.35, 0.15)]
        places.name_line(f"{name} {rate * 1e-9:.3g} GB/s", [(x, x * rate) for x, _ in spots])
    levels = {f"{name} products": rate for name, rate in found.matmul.items()} | {"exponentials": found.exps}
    for name, rate in sorted(levels.items(), key=lambda item: -item[1]):
        start = max(left, rate / fast)
        axes.plot((start, right), (rate, rate), ":", color=COLOURS["muted"], linewidth=1.1, zorder=1)
        spots = [(start * (right / start) ** part, rate) for part in (0.75, 0.45, 0.15, 0.9)]
        places.name_line(f"{name} {_rate(float(f'{rate:.3g}'))}/s", spots)


def _look(index):
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def _dots(axes, dots, groups, places):
    """Draws them, each a link to its row; returns what is shown where the pointer rests."""
    tips = {}
    for number, row, x, y in dots:
        gid = f"tip{number}"
        look = _look(groups.index(row["group"]))
        axes.plot(
            [x], [y], linestyle="", markersize=5.5, markeredgecolor=COLOURS["paper"], markeredgewidth=0.5, zorder=3,
            gid=gid, url=f"#row-{number}", **look,
        )  # fmt: skip
        share = f", {row['ceiling']['percent']:.0f} % of {row['ceiling']['name']}" if "ceiling" in row else ""
        tips[gid] = f"{number}: {row['name']}, {table.work(row)}: {_rate(float(f'{y:.3g}'))}FLOP/s{share}"
    return tips


def _numbers(axes, dots, places):
    """Writes row numbers beside the dots, those that fit; returns how many do."""
    return sum(places.name_dot(str(number), x, y) for number, _, x, y in dots)


def _handles(groups):
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], linestyle="", markersize=5.5, label=_short(_line(group), 24), **_look(index))
        for index, group in enumerate(groups)
    ]


@dataclass
class _Places:
    """Rectangles of the axes, in points, that are taken: a label is only written where nothing stands."""

    axes: object
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def take_dot(self, x, y):
        px, py = self._points(x, y)
        self.taken.append((px - 2.8, py - 2.8, px + 2.8, py + 2.8))

    def name_dot(self, text: str, x: float, y: float) -> bool:
        """Beside, above or below a dot."""
        px, py = self._points(x, y)
        width, height = 4.6 * len(text), 6.5
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            cx, cy = px + dx * (width / 2 + 4), py + dy * (height / 2 + 4)
            if self._write(text, cx, cy, width, height, size=7, color=COLOURS["ink"]):
                return True
        return False

    def name_line(self, text: str, spots: Iterable[tuple[float, float]]) -> bool:
        """Just above one of the points of a line."""
        width, height = 4.3 * len(text), 8.5
        for x, y in spots:
            px, py = self._points(x, y)
            for dy in (1, -1):
                if self._write(text, px, py + dy * (height / 2 + 1.5), width, height, size=7.5, color=COLOURS["muted"]):
                    return True
        return False

    def _write(self, text, cx, cy, width, height, *, size, color):
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        bounds = [value * POINTS / self.axes.figure.dpi for value in self.axes.bbox.extents]
        inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
        if not inside or any(_overlap(box, other) for other in self.taken):
            return False
        self.taken.append(box)
        self.axes.annotate(
            text, (cx, cy), xycoords="figure points", ha="center", va="center_baseline", fontsize=size, color=color,
            zorder=4,
        )  # fmt: skip
        return True

    def _points(self, x, y):
        return self.axes.transData.transform((x, y)) * POINTS / self.axes.figure.dpi


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---- speed-up ----------------------------------------------------------------------------------------------------


def speedups(report: dict) -> list[Plot]:
    """Bars of the strongest eager variant, torch.compile and the strongest peer over ours, an op or a model a figure."""
    groups: dict[str, list] = {}
    for number, row in _timed(report):
        bars = [(kind, *found) for kind, wanted in RIVALS.items() if (found := table.strongest(row["ratios"], wanted))]
        if bars:
            groups.setdefault(row["group"], []).append((number, row, bars))
    cold = ", inputs not in the cache" if any("hot" in row for _, row in _timed(report)) else ""
    drawn = []
    for group, rows in groups.items():
        ends = [value for _, _, bars in rows for _, _, entry in bars for value in (entry["low"], entry["high"])]
        limits = min(0.7, *ends) / 1.15, max(1.5, *ends) * 1.45  # room for the figures beside the bars
        parts = _parts(rows, ROWS_PER_FIGURE)
        for part, chosen in enumerate(parts):
            title = f"{group}, {part + 1} of {len(parts)}" if len(parts) > 1 else group
            picture = _bars(_line(title), chosen, limits, f"bars{len(drawn)}")
            caption = f"Time of the others over ours{cold}; whiskers are 95 % intervals. Left of 1 is a loss."
            drawn.append(Plot(picture, caption))
    return drawn


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
    drawn.text(0.008, 1 - 0.16 / height, title, fontsize=9.5, fontweight="bold", va="center")
    y = 0.0
    for number, row, bars in rows:
        heading = f"{number}  {_short(_line(row['name']), 50)}, {_short(_line(table.work(row)), 55)}"
        axes.annotate(
            heading, (0.008, y + HEADING / 2), xycoords=("figure fraction", "data"), va="center", url=f"#row-{number}",
            fontsize=8, annotation_clip=False,
        )  # fmt: skip
        y += HEADING
        for kind, variant, entry in bars:
            _bar(axes, y + BAR / 2, kind, variant, entry)
            y += BAR
        y += GAP
    axes.axvline(1, color=COLOURS["ink"], linewidth=1, zorder=3)
    _ratio_ticks(axes.xaxis, limits)
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
        f"{value:.2f}×" + (" loss" if loss else ""), (max(value, high, 1), y), xytext=(4, 0),
        textcoords="offset points", va="center_baseline", fontsize=7.5, fontweight="bold" if loss else "normal",
        color=COLOURS["ink"], annotation_clip=False,
    )  # fmt: skip
    axes.annotate(
        _short(_line(variant), 21), (0, y), xycoords=("axes fraction", "data"), xytext=(-5, 0),
        textcoords="offset points", ha="right", va="center_baseline", fontsize=7.5, color=COLOURS["muted"],
        annotation_clip=False,
    )  # fmt: skip


def _ratio_ticks(axis, limits):
    decades = math.log10(limits[1] / limits[0])
    steps = (1, 2, 5) if decades < 2.5 else (1,)
    first, last = math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1]))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    axis.set_ticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.set_ticks([], minor=True)


# ---- scaling -----------------------------------------------------------------------------------------------------


def scalings(report: dict) -> list[Plot]:
    """Times and ratios against the size of an axis, of rows that a sweep labelled "batch 4" and the like."""
    drawn = []
    for (name, dtype, device, axis), rows in sweeps(report).items():
        title = f"{name}, {dtype} on {device}"
        picture = _scaling(_line(title), axis, rows, f"scaling{len(drawn)}")
        fixed = rows[min(rows)]["shape"]
        caption = (
            f"Time of every variant (left; the band is the 20th to 80th percentile) and over ours (right, with 95 % "
            f"intervals) against {axis}, at {' × '.join(map(str, fixed))} and up."
        )
        drawn.append(Plot(picture, caption))
    return drawn


def sweeps(report: dict) -> dict[tuple[str, str, str, str], dict[int, dict]]:
    """(name, dtype, device, axis) -> size -> row, where rows differ in one dimension, which their labels name."""
    found: dict[tuple, dict[int, dict]] = {}
    for _, row in _timed(report):
        if match := re.fullmatch(r"(\w+) (\d+)", row["label"]):
            key = row["name"], row["dtype"], row["device"], match[1]
            found.setdefault(key, {})[int(match[2])] = row
    return {key: rows for key, rows in found.items() if len(rows) > 1 and _along_one(rows)}


def _along_one(rows):
    columns = list(zip(*(row["shape"] for row in rows.values()), strict=False))
    return [column for column in columns if len(set(column)) > 1] == [tuple(rows)]


def _scaling(title, axis, rows, name):
    sizes = sorted(rows)
    variants = list(dict.fromkeys(variant for size in sizes for variant in rows[size]["variants"]))
    legend = math.ceil(len(variants) / 4)
    height = 3.1 + 0.19 * legend
    drawn = svg.figure(WIDTH, height)
    bottom, tall = (0.5 + 0.19 * legend) / height, 1 - (0.85 + 0.19 * legend) / height
    times, ratios = drawn.add_axes((0.095, bottom, 0.4, tall)), drawn.add_axes((0.565, bottom, 0.42, tall))
    drawn.text(0.008, 1 - 0.16 / height, title, fontsize=9.5, fontweight="bold", va="center")
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
    _ratio_ticks(ratios.yaxis, ratios.get_ylim())
    drawn.legend(*times.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.01, 0), ncols=4)
    return svg.inline(drawn, name, f"scaling of {title} with {axis}")


def _curve_look(variant, index):
    if variant == "fused":
        return {"color": COLOURS["ours"], "marker": "o", "linewidth": 2.2, "zorder": 4}
    style = ":" if table.is_yardstick(variant) else "-"
    return _look(index - 1) | {"linestyle": style, "markersize": 4.5, "linewidth": 1.3}


def _curve(times, ratios, variant, rows, look: dict):
    """One variant's times, and its ratios where it competes."""
    there = [size for size in sorted(rows) if variant in rows[size]["variants"]]
    timings = [rows[size]["variants"][variant] for size in there]
    times.plot(there, [timing["median"] for timing in timings], label=_short(_line(variant), 26), **look)
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
