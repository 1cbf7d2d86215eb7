"""The flame view: kernel time by the Python calls that led to it, equal paths merged, as boxes in one SVG."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field

from genengine.profiling.record import Step
from genengine.profiling.report import clip, seconds, short

OUTSIDE = "outside kernels"
WIDTH, ROW, MOST_ROWS = 1160.0, 19, 40
_SMALLEST, _LETTER = 0.4, 6.1  # pixels: of a box that is drawn, of a letter


@dataclass
class Box:
    """A call, a range or a kernel: its seconds, those of what it called included. kind: "call", "range", "op", "ours"
    (a kernel of genengine's) or "outside"."""

    name: str
    kind: str
    seconds: float = 0.0
    children: dict[tuple[str, str], Box] = field(default_factory=dict)

    def child(self, name: str, kind: str) -> Box:
        return self.children.setdefault((name, kind), Box(name, kind))


def build(steps: list[Step], durations, gaps, ranges, stray, name: str) -> Box:
    """The tree of a pass.

    durations: step -> seconds of its kernels. gaps: (seconds, step that ended it or -1): time outside kernels, put
    beside the kernel that came next. ranges: step -> the `record_function` ranges that were open. stray: name ->
    (calls, seconds) of kernels of no recorded op, which stand below the root.
    """
    root = Box(name, "call")
    for label, (_, spent) in stray.items():
        root.seconds += spent
        root.child(short(label), "op").seconds += spent
    entries = [(spent, index, None) for index, spent in durations.items()]
    entries += [(spent, index, OUTSIDE) for spent, index in gaps]
    for spent, index, outside in sorted(entries, key=lambda entry: entry[1]):
        path = [] if index < 0 else [(label, "range") for label in ranges.get(index, ())]
        path += [] if index < 0 else [(call, "call") for call in steps[index].stack]
        if outside:
            path.append((OUTSIDE, "outside"))
        else:
            kind = "ours" if steps[index].name.startswith("genengine") else "op"
            path.append((f"{short(steps[index].name)}  {steps[index].shapes}", kind))
        box = root
        box.seconds += spent
        for label, kind in path:
            box = box.child(label, kind)
            box.seconds += spent
    return root


def svg(root: Box) -> str:
    """The tree as an SVG of nested boxes, hottest first; every box says its name and time when pointed at."""
    boxes = list(_place(root, 0.0, 0, WIDTH / max(root.seconds, 1e-12)))
    height = ROW * (max((depth for *_, depth in boxes), default=0) + 1)
    shapes = "".join(_box(box, x, width, depth, root.seconds) for box, x, width, depth in boxes)
    return f'<svg class="flame" viewBox="0 0 {WIDTH:.0f} {height}" role="img" aria-label="flame view">{shapes}</svg>'


def _place(box: Box, x: float, depth: int, scale: float) -> Iterator[tuple[Box, float, float, int]]:
    width = box.seconds * scale
    if width < _SMALLEST or depth >= MOST_ROWS:
        return
    yield box, x, width, depth
    for child in sorted(box.children.values(), key=lambda child: (child.kind == "outside", -child.seconds)):
        yield from _place(child, x, depth + 1, scale)
        x += child.seconds * scale


def _box(box, x, width, depth, total):
    title = html.escape(f"{box.name}: {seconds(box.seconds)}, {box.seconds / max(total, 1e-12):.1%}")
    letters = int((width - 6) / _LETTER)
    text = ""
    if letters >= 4:
        text = f'<text x="{x + 3:.1f}" y="{depth * ROW + 13}">{html.escape(clip(box.name, letters))}</text>'
    return (
        f'<g class="{box.kind}"><title>{title}</title><rect x="{x:.1f}" y="{depth * ROW}" '
        f'width="{max(width - 0.5, 0.4):.1f}" height="{ROW - 1}"/>{text}</g>'
    )
