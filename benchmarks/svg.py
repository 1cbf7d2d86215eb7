"""A matplotlib figure as SVG to stand inside a page: text stays text, colours follow the page's light or dark theme."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape

# Each colour is drawn as its light value and becomes a variable of page.css; after Okabe and Ito (2008), whose eight
# colours stay apart for readers who are colour-blind.
COLOURS = {
    "ink": "#16181d", "muted": "#5a6270", "grid": "#d9dde3", "paper": "#fefefe", "ours": "#16181e", "blue": "#0072b2",
    "orange": "#e69f00", "green": "#009e73", "red": "#d55e00", "purple": "#cc79a7", "sky": "#56b4e9",
    "olive": "#8a7f00",
}  # fmt: skip
SERIES = [COLOURS[name] for name in ("blue", "orange", "green", "purple", "sky", "olive", "red")]
MARKERS = "os^DvPX<>"  # 9 beside 7 colours: together they tell 63 series apart
WIDTH = 7.2  # of a figure, in inches
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "genengine", "text.parse_math": False, "font.size": 8.5,
    "font.family": "sans-serif", "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"], "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": COLOURS["grid"], "grid.linewidth": 0.6, "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"], "xtick.labelcolor": COLOURS["muted"], "ytick.labelcolor": COLOURS["muted"],
    "legend.frameon": False, "legend.fontsize": 8, "axes.facecolor": "none", "figure.facecolor": "none",
}  # fmt: skip
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # else addresses on the web and the time of day


def check() -> None:
    """Raise RuntimeError unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "a page needs matplotlib to draw its plots, which is missing: pip install 'genengine[plot]'"
        ) from error


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for as long as they are drawn."""
    check()
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the reader's fonts draw it, not these
        yield


def figure(width: float, height: float):
    """An empty figure of that size in inches, on no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def heading(drawn, text: str) -> None:
    """A title in the upper left corner of a figure."""
    height = drawn.get_size_inches()[1]
    drawn.text(0.008, 1 - 0.16 / height, text, fontsize=9.5, fontweight="bold", va="center")


def look(index: int) -> dict:
    """Colour and marker of the series of that number."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def line(text: str, length: int) -> str:
    """The text on one line and of at most that length."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def log_ticks(axis, limits: tuple[float, float], text: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of every decade, of many decades at 1 alone."""
    steps = (1, 2, 5) if math.log10(limits[1] / limits[0]) < 2.5 else (1,)
    first, last = math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1]))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def inline(drawn, name: str, title: str, tips: Mapping[str, str] | None = None) -> str:
    """The figure as an <svg> element.

    name: unique on the page, it tells apart what figures refer to inside. title: read aloud for the picture. tips: gid
    of an artist -> what is shown where the pointer rests on it.
    """
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata=NO_METADATA)
    text = buffer.getvalue()
    opening = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', text)
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text[opening.end() :], flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _own(tag[0], name), text)  # what stands in them, not the words between
    for gid, tip in (tips or {}).items():
        text = text.replace(f'<g id="{name}-{gid}">', f"<g><title>{escape(tip)}</title>")
    text = re.sub(r"\s*\n\s*", "\n", text).strip().replace("<defs>\n</defs>\n", "")
    return f'<svg viewBox="{opening[1]}" role="group" aria-label="{escape(title)}">\n{text}'


def _own(tag, name):
    """A tag whose names are of this figure, with the page's font and colours, and without digits that no one sees."""
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", tag)  # of groups, to which nothing refers
    tag = tag.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-")
    tag = re.sub(r'xlink:href="#(?!row-)', f'href="#{name}-', tag).replace("xlink:href", "href")
    tag = re.sub(r"font: (?:[a-z]+ |\d+ )*([\d.]+)px [^;\"]*", _font, tag)
    tag = re.sub(r' (d|x|y|transform|points)="[^"]*"', _rounded, tag)
    for colour, value in COLOURS.items():
        tag = tag.replace(value, f"var(--{colour})")
    return tag


def _font(match):
    """The size, and the weight if it has one; the family is the page's."""
    weight = next((word for word in match[0].split() if word in ("700", "bold")), None)
    return f"font-size: {match[1]}px" + ("; font-weight: 600" if weight else "")


def _rounded(match):
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), match[0])
