"""A report as text: lines for the terminal, a table for Markdown."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

GREEN, RED, DIM, BOLD = "32", "31", "2", "1"
NOISE = 0.03  # a ratio this near to 1 is neither a gain nor a loss
MARKDOWN_HEAD = "| work | shape, dtype | fused | of the ceiling | the others' time over ours | goals |\n|" + "---|" * 6


def duration(seconds: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def is_yardstick(name: str) -> bool:
    """Whether a variant is there to compare sizes with, not to compete: it does less than the work."""
    return name.startswith(("copy_", "setup"))


def is_eager(name: str) -> bool:
    return name.startswith("eager")


def work(row: dict) -> str:
    """What was timed: shape with its model, and dtype."""
    shape = "x".join(map(str, row["shape"]))
    return f"{row['label']} ({shape}), {row['dtype']}" if row["label"] else f"{shape}, {row['dtype']}"


def reach(row: dict) -> str:
    """Throughput and its share of the ceiling that binds."""
    if "ceiling" not in row:
        return "-"
    ceiling, products = row["ceiling"], row["ceiling"]["name"] == "matrix products"
    rate = f"{row['TFLOP_per_s']:.3g} TFLOP/s" if products else f"{row['GB_per_s']:.3g} GB/s"
    return f"{rate}, {ceiling['percent']:.0f} % of {ceiling['name']}"


# ---- the terminal ------------------------------------------------------------------------------------------------


def colour_wanted(stream=None) -> bool:
    """Colours on a terminal, unless NO_COLOR is set (no-color.org)."""
    return not os.environ.get("NO_COLOR") and (stream or sys.stdout).isatty()


def painted(text: str, code: str, colour: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if colour else text


def lines(row: dict, *, colour: bool = False) -> str:
    """A row for the terminal: the work, our time, then every other variant as its time over ours; losses are named."""
    head = f"{painted(row['name'], BOLD, colour)}  {work(row)}"
    if "error" in row:
        return f"{head}\n    {painted('failed', RED, colour)}: {row['error'].splitlines()[0]}"
    fused = row["variants"]["fused"]
    spread = f"{duration(fused['median'])} ({duration(fused['p20'])} to {duration(fused['p80'])})"
    body = [f"fused {spread}; {reach(row)}" if "ceiling" in row else f"fused {spread}"]
    body += _wrapped(_ratio(name, entry, colour) for name, entry in row["ratios"].items())
    body += [painted(f"{name}: skipped, {why}", DIM, colour) for name, why in row["skipped"].items()]
    body += [_goal(goal, colour) for goal in row["goals"]]
    return "\n    ".join([head, *body])


def _ratio(name, entry, colour):
    value, interval = entry["ratio"], f"{entry['ratio']:.2f}x ({entry['low']:.2f}-{entry['high']:.2f})"
    if is_yardstick(name):
        return f"{name} {interval}"
    if value < 1 - NOISE:
        return f"{name} {painted(f'{interval} LOSS', RED, colour)}"
    return f"{name} {painted(interval, GREEN, colour)}" if value > 1 + NOISE else f"{name} {interval}"


def _wrapped(parts: Iterable[str], per_line=3):
    parts = list(parts)
    return ["; ".join(parts[i : i + per_line]) for i in range(0, len(parts), per_line)]


def _goal(goal, colour):
    verdict = painted("reached", GREEN, colour) if goal["reached"] else painted("MISSED", RED, colour)
    return f"goal {goal['goal']}: {goal['value']:.2f}, {verdict}"


def totals(report: dict) -> str:
    """How many rows gained, lost, failed."""
    timed = [row for row in report["rows"] if "error" not in row]
    rivals = [e["ratio"] for row in timed for name, e in row["ratios"].items() if not is_yardstick(name)]
    goals = [goal["reached"] for row in timed for goal in row["goals"]]
    return (
        f"{len(timed)} rows timed, {len(report['rows']) - len(timed)} failed; of {len(rivals)} comparisons "
        f"{sum(r > 1 + NOISE for r in rivals)} gains, {sum(r < 1 - NOISE for r in rivals)} losses, the rest within "
        f"{NOISE:.0%}; {sum(goals)} of {len(goals)} goals reached"
    )


# ---- Markdown ----------------------------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    """The report as a table; losses and missed goals in bold."""
    return "\n".join([MARKDOWN_HEAD, *map(markdown_row, report["rows"])])


def markdown_row(row: dict) -> str:
    head = f"| {row['name']} | {work(row)} "
    if "error" in row:
        return head + f"| failed | | {row['error'].splitlines()[0].replace('|', '/')} | |"
    others = ", ".join(f"{name} {_bold_loss(name, entry['ratio'])}" for name, entry in row["ratios"].items())
    goals = "; ".join(
        f"{goal['goal']}: {goal['value']:.2f}" + ("" if goal["reached"] else " **missed**") for goal in row["goals"]
    )
    share = f"{row['ceiling']['percent']:.0f} %" if "ceiling" in row else "-"
    return head + f"| {duration(row['variants']['fused']['median'])} | {share} | {others or '-'} | {goals or '-'} |"


def _bold_loss(name, value):
    return f"**{value:.2f}**" if value < 1 - NOISE and not is_yardstick(name) else f"{value:.2f}"
