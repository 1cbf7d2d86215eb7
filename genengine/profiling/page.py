"""The page that `genengine profile --html` writes: totals, flame view, roofline and tables; nothing is fetched."""

from __future__ import annotations

import html
from pathlib import Path

from genengine.benchmarks import svg
from genengine.profiling import flame
from genengine.profiling.report import Kernel, Profile, place, quantity, seconds, short

ROWS = 40  # of the table of kernels
LABELLED = 12  # dots of the roofline with a number
_MEMORY = 1 << 28  # bytes that no cache holds

STYLE = """
:root { color-scheme: light dark; --ink: #1c1b19; --paper: #fbfaf7; --faint: #7d786e; --line: #ddd7cb; --call: #e4dfd3;
  --op: #eab676; --ours: #8fbf8f; --range: #b9c8de; --outside: #cfccc6; --dark: #1c1b19;
  --muted: var(--faint); --grid: var(--line) }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e4dc; --paper: #191816; --faint: #98928a; --line: #3a3733;
  --call: #4a463e; --op: #a8742f; --ours: #4f7f4f; --range: #4d6180; --outside: #35332f; --dark: #f3efe7 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem } p { margin: .2rem 0 .8rem }
.faint, figcaption { color: var(--faint); font-size: .88rem; max-width: 60rem }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1.2rem 0 } dt { color: var(--faint); font-size: .85rem }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100% }
th { text-align: right; font-weight: 500; color: var(--faint); border-bottom: 1px solid var(--line) }
th { padding: .2rem .5rem }
td { text-align: right; padding: .14rem .5rem; vertical-align: top; white-space: nowrap }
.word { text-align: left; white-space: normal }
td code, td.word { overflow-wrap: anywhere } code { font: .95em ui-monospace, "DejaVu Sans Mono", monospace }
figure { margin: 0 } svg { width: 100%; height: auto; display: block }
.flame text { font: 10.5px ui-monospace, "DejaVu Sans Mono", monospace; fill: var(--dark); pointer-events: none }
.call rect { fill: var(--call) } .op rect { fill: var(--op) } .ours rect { fill: var(--ours) }
.range rect { fill: var(--range) } .outside rect { fill: var(--outside) } g:hover rect { stroke: var(--ink) }
.key { margin-top: .5rem }
.key span { display: inline-block; padding: 0 .5rem; margin-right: .5rem; color: var(--dark) }
.roofline { max-width: 56rem; color: var(--ink) }
"""


def write(profile: Profile, path: str | Path) -> Path:
    """Write the page of a profile to a file; returns the path.

    Raises RuntimeError where Matplotlib is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(profile), encoding="utf-8")
    return path


def render(profile: Profile) -> str:
    """The page as one HTML document."""
    title = html.escape(f"{profile.name} on {profile.device}")
    parts = [_head(profile), _flame(profile), _roofline(profile), _kernels(profile), _gaps(profile)]
    body = "\n".join([*parts, _syncs(profile), _fusions(profile)])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>profile: {title}</title><style>{STYLE}</style></head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _head(profile):
    facts = {
        "a pass": seconds(profile.seconds),
        "under the profiler": f"{seconds(profile.profiled)} ({profile.profiled / max(profile.seconds, 1e-9):.2f} x)",
        "in kernels": f"{seconds(profile.busy)} ({profile.busy / max(profile.profiled, 1e-12):.0%})",
        "moved at least": quantity(profile.bytes, "B"),
        "products": quantity(profile.flops, "FLOP"),
    }
    notes = "".join(f'<p class="faint">{html.escape(note)}</p>' for note in profile.notes)
    return f"{notes}<dl>{''.join(f'<div><dt>{k}</dt><dd>{v}</dd></div>' for k, v in facts.items())}</dl>"


def _flame(profile):
    kinds = {"call": "Python call", "range": "range", "op": "kernel of torch", "ours": "kernel of genengine",
             "outside": "outside kernels"}  # fmt: skip
    key = "".join(f'<span style="background: var(--{kind})">{text}</span>' for kind, text in kinds.items())
    return (
        f"<h2>Flame view</h2><figure>{flame.svg(profile.flame)}<figcaption class='key'>{key}</figcaption>"
        "<figcaption>One pass. A box is as wide as its time; below a call stand the calls and kernels that it led to, "
        "equal paths merged, the longest first. Time outside kernels stands beside the kernel that came next."
        "</figcaption></figure>"
    )


def _table(head, rows, words):
    cells = lambda row, tag: "".join(  # noqa: E731
        f"<{tag}{' class=word' if i in words else ''}>{cell}</{tag}>" for i, cell in enumerate(row)
    )
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>"


def _kernels(profile):
    head = ["", "kernel", "operands", "calls", "time", "", "each", "GB/s", "GFLOP/s", "of ceiling", "binding"]
    rows = []
    for number, kernel in enumerate(profile.kernels[:ROWS], start=1):
        name, operands = html.escape(short(kernel.name)), html.escape(f"{kernel.dtype} {kernel.shapes}")
        share = f"{kernel.seconds / max(profile.profiled, 1e-12):.1%}"
        rows.append([
            str(number), f"<code>{name}</code>", operands, str(kernel.calls), seconds(kernel.seconds), share,
            seconds(kernel.seconds / kernel.calls), _giga(kernel.bandwidth), _giga(kernel.rate),
            "" if kernel.of_ceiling is None else f"{kernel.of_ceiling:.0%}", kernel.bound or "",
        ])  # fmt: skip
    left = profile.kernels[ROWS:]
    more = f"<p class=faint>and {len(left)} more, {seconds(sum(k.seconds for k in left))}</p>" if left else ""
    return f"<h2>Kernels</h2>{_table(head, rows, {1, 2, 10})}{more}"


def _giga(rate):
    return "" if rate is None else f"{rate * 1e-9:.3g}" if rate < 1e12 else f"{rate * 1e-9:.0f}"


def _line(line):
    where, _, code = place(line).partition("  ")
    return f"{html.escape(where)} <code>{html.escape(code)}</code>"


def _gaps(profile):
    rows = [[seconds(gap.seconds), f"{gap.seconds / max(profile.profiled, 1e-12):.1%}", str(gap.count), _line(gap.line)]
            for gap in profile.gaps[:ROWS // 2]]  # fmt: skip
    return f"<h2>Gaps</h2>{_table(['time', '', 'gaps', 'before an op called at'], rows, {3})}"


def _syncs(profile):
    if not profile.syncs:
        return "<h2>Host syncs</h2><p>none</p>"
    rows = [
        [
            str(sync.count),
            html.escape(sync.call),
            "" if sync.seconds is None else seconds(sync.seconds),
            _line(sync.line),
        ]
        for sync in profile.syncs
    ]
    return f"<h2>Host syncs</h2>{_table(['times', 'call', 'waited', 'called at'], rows, {1, 3})}"


def _fusions(profile):
    if not profile.fusions:
        return "<h2>Fused ops</h2><p>nothing found that one would replace</p>"
    rows = []
    for fusion in profile.fusions:
        kernels = ", ".join(f"{count} {short(name)}" for name, count in fusion.kernels.items())
        rows.append([
            f"<code>{fusion.op}</code>", html.escape(kernels), str(fusion.launches),
            f"-{fusion.saved / max(fusion.bytes, 1):.0%}", f"-{fusion.saved / max(profile.bytes, 1):.1%}",
            f"{fusion.seconds / max(profile.profiled, 1e-12):.1%}", _line(fusion.line),
        ])  # fmt: skip
    head = ["op", "replaces", "launches", "of their bytes", "of all bytes", "of the time", "found at"]
    return f"<h2>Fused ops that would replace what ran</h2>{_table(head, rows, {0, 1, 6})}"


# ---- roofline --------------------------------------------------------------------------------------------------------


def _roofline(profile):
    dots = {
        number: kernel
        for number, kernel in enumerate(profile.kernels, start=1)
        if kernel.seconds > 0 and kernel.bytes and kernel.operations
    }
    if not dots:
        return ""
    text = (
        "Kernels by their operations per byte and per second; the area is the time, the numbers are those of the table "
        "below. Where no formula counts the operations of an op, it is one for every element written."
    )
    if profile.ceilings is None:
        text += " Ceilings were not measured."
    return (
        f'<h2>Roofline</h2><figure class="roofline">{_roofline_svg(profile, dots)}'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _roofline_svg(profile, dots):
    with svg.style():
        figure = svg.figure(9, 5)
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot(
            xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second"
        )
        _draw_dots(axes, dots)
        if profile.ceilings is not None:
            _draw_ceilings(axes, profile.ceilings, list(dots.values()))
        svg.log_ticks(axes.xaxis, axes.get_xlim(), lambda value: f"{value:g}")
        svg.log_ticks(axes.yaxis, axes.get_ylim(), lambda value: quantity(value, "").strip())
        return svg.inline(figure, "roofline", "roofline of the kernels")


def _draw_dots(axes, dots: dict[int, Kernel]):
    longest = max(kernel.seconds for kernel in dots.values())
    for number, kernel in dots.items():
        x, y = kernel.operations / kernel.bytes, kernel.operations / kernel.seconds
        colour = "#4f9f4f" if kernel.name.startswith("genengine") else "#d98e32"
        axes.scatter(x, y, s=12 + 260 * kernel.seconds / longest, color=colour, alpha=0.65, linewidths=0)
        if number <= LABELLED:
            axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=8)


def _draw_ceilings(axes, ceilings, dots):
    """Slanted: the bandwidth of the largest working set here, and of main memory. Level: matrix products."""
    intensities = [kernel.operations / kernel.bytes for kernel in dots]
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 100.0) * 2
    style = {"color": svg.COLOURS["ink"], "linewidth": 0.9, "alpha": 0.75}
    products = {name: rate for name, rate in ceilings.matmul.items() if any(kernel.dtype == name for kernel in dots)}
    top = max(products.values(), default=max(ceilings.matmul.values()))
    largest = max(kernel.bytes // kernel.calls for kernel in dots)
    streams = {f"moving {quantity(largest, 'B')}": largest} | ({"main memory": _MEMORY} if largest < _MEMORY else {})
    for name, nbytes in streams.items():
        rate = ceilings.bandwidth(nbytes)
        end = max(min(top / rate, high), low)
        axes.plot([low, end], [low * rate, end * rate], **style)
        text = f"{quantity(rate, 'B')}/s, {name}"
        axes.annotate(text, (low, low * rate), xytext=(4, 9), textcoords="offset points", fontsize=8)
    for name, rate in products.items():
        axes.plot([rate / ceilings.bandwidth(largest), high], [rate, rate], **style)
        text = f"{name} products, {quantity(rate, 'FLOP')}/s"
        axes.annotate(text, (high, rate), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8)
    axes.set_xlim(low, high)
