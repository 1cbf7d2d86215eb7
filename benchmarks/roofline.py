"""Operations per second against operations per byte, under the measured ceilings (Williams et al. 2009)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from genengine.benchmarks import svg, table
from genengine.benchmarks.ceilings import Ceilings
from genengine.benchmarks.svg import COLOURS, WIDTH

POINTS = 72  # in an inch
CAPTION = (
    "Operations per second of fused against the operations per byte that it must move. Sloped are the measured "
    "bandwidths of memory and of the fastest cache, level the matrix products and exponentials. Numbers are those of "
    "the rows below, where they fit; point at a dot for its name. Rows that count no bytes or operations have no dot."
)


def draw(ceilings: dict | None, rows: Sequence[tuple[int, dict]]) -> list[str]:
    """One figure of all rows that have a cost; none without ceilings."""
    dots = [
        (number, row, row["cost"]["flops"] / row["cost"]["bytes"], row["TFLOP_per_s"] * 1e12)
        for number, row in rows
        if row.get("cost") and row["cost"]["bytes"] and row["cost"]["flops"]
    ]
    if ceilings is None or not dots:
        return []
    found = Ceilings.from_json(ceilings)
    by = "group" if len({row["group"] for _, row, _, _ in dots}) > 1 else "name"
    names = list(dict.fromkeys(row[by] for _, row, _, _ in dots))
    legend = math.ceil(len(names) / 4)
    height = 4.3 + 0.2 * legend
    drawn = svg.figure(WIDTH, height)
    axes = drawn.add_axes((0.105, (0.5 + 0.2 * legend) / height, 0.875, 1 - (0.6 + 0.2 * legend) / height))
    _set_axes(axes, dots, found)
    places = _Places(axes)
    for _, _, x, y in dots:
        places.take_dot(x, y)
    _lines(axes, found, places)
    tips = _dots(axes, dots, [names.index(row[by]) for _, row, _, _ in dots])
    for number, _, x, y in dots:
        places.name_dot(str(number), x, y)
    _legend(drawn, names)
    return [svg.inline(drawn, "roofline", "roofline of all rows", tips)]


def _set_axes(axes, dots, found):
    bandwidth, peak = found.bandwidth(max(found.copy)), max([*found.matmul.values(), found.exps or 0.0])
    xs, ys = [x for _, _, x, _ in dots], [y for _, _, _, y in dots]
    xlim = min(xs) / 2, max(*xs, min(peak / bandwidth, 8 * max(xs))) * 2
    ylim = min(ys) / 2.5, max(*ys, peak) * 2
    axes.set(
        xscale="log", yscale="log", xlim=xlim, ylim=ylim, xlabel="operations per byte", ylabel="operations per second"
    )
    svg.log_ticks(axes.xaxis, xlim, "{:g}".format)
    svg.log_ticks(axes.yaxis, ylim, _amount)


def _amount(value):
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{table.figure(value / scale)} {unit}"
    return f"{table.figure(value)} "


def _lines(axes, found: Ceilings, places):
    """The ceilings, each with its name where there is room."""
    left, right = axes.get_xlim()
    peak = max([*found.matmul.values(), found.exps or 0.0])
    sizes = sorted(found.copy)
    slow, fast = found.bandwidth(sizes[-1]), max(found.bandwidth(size) for size in sizes)
    look = {"color": COLOURS["muted"], "linewidth": 1.1, "zorder": 1}
    parts = (0.75, 0.6, 0.45, 0.3, 0.85, 0.15)  # of a line's length: where its name may stand
    levels = {f"products in {name}": rate for name, rate in found.matmul.items()}
    if found.exps is not None:
        levels["exponentials"] = found.exps
    for name, rate in sorted(levels.items(), key=lambda item: -item[1]):
        start = min(max(left, rate / fast), right)
        axes.plot((start, right), (rate, rate), ":", **look)
        places.name_line(f"{name}, {_amount(rate)}/s", [(start * (right / start) ** part, rate) for part in parts])
    for rate, name, dashes in ((slow, "memory", "-"), (fast, "cache", "--")):
        end = min(right, peak / rate)
        axes.plot((left, end), (left * rate, end * rate), dashes, **look)
        spots = [left * (end / left) ** part for part in parts]
        places.name_line(f"{name}, {table.figure(rate * 1e-9)} GB/s", [(x, x * rate) for x in spots])


def _dots(axes, dots, looks):
    """Draws them, each a link to its row; returns what is shown where the pointer rests."""
    tips = {}
    for (number, row, x, y), index in zip(dots, looks, strict=True):
        gid = f"tip{number}"
        axes.plot(
            [x], [y], linestyle="", markersize=5.5, markeredgecolor=COLOURS["paper"], markeredgewidth=0.5, zorder=3,
            gid=gid, url=f"#row-{number}", **svg.look(index),
        )  # fmt: skip
        share = f", {row['ceiling']['percent']:.0f} % of {row['ceiling']['name']}" if "ceiling" in row else ""
        tips[gid] = f"{number}: {row['name']}, {table.work(row)}: {_amount(y)}FLOP/s{share}"
    return tips


def _legend(drawn, names):
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", markersize=5.5, label=svg.line(name, 28), **svg.look(index))
        for index, name in enumerate(names)
    ]
    drawn.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.03, 0), ncols=min(4, len(names)), handletextpad=0.1,
        columnspacing=1.2,
    )  # fmt: skip


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

    def name_line(self, text: str, spots: Sequence[tuple[float, float]]) -> bool:
        """Along a line, above or below it, around the first of the points where there is room."""
        (x0, y0), (x1, y1) = (self._points(*spot) for spot in (min(spots), max(spots)))
        angle = math.atan2(y1 - y0, x1 - x0)
        length, look = 4.1 * len(text), {"size": 7.5, "color": COLOURS["muted"], "angle": math.degrees(angle)}
        width, height = (length * math.cos(angle) + 8 * math.sin(angle), length * math.sin(angle) + 8 * math.cos(angle))
        for x, y in spots:
            px, py = self._points(x, y)
            for side in (6, -6):
                if self._write(text, px - side * math.sin(angle), py + side * math.cos(angle), width, height, **look):
                    return True
        return False

    def _write(self, text, cx, cy, width, height, *, size, color, angle=0.0):
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        bounds = [value * POINTS / self.axes.figure.dpi for value in self.axes.bbox.extents]
        inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
        if not inside or any(_overlap(box, other) for other in self.taken):
            return False
        self.taken.append(box)
        self.axes.annotate(
            text, (cx, cy), xycoords="figure points", ha="center", va="center_baseline", fontsize=size, color=color,
            rotation=angle, zorder=4,
        )  # fmt: skip
        return True

    def _points(self, x, y):
        return self.axes.transData.transform((x, y)) * POINTS / self.axes.figure.dpi


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
