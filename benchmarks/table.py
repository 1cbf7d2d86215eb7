"""A report as text: lines for the terminal, a table for Markdown."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

GREEN, RED, DIM, BOLD = "32", "31", "2", "1"
NOISE = 0.03  # a ratio this near to 1 is neither a gain nor a loss
MARKDOWN_HEAD = (
    "| work | shape, dtype | fused | of the ceiling | error | the others' time over ours | goals |\n|" + "---|" * 7
)


def figure(value: float) -> str:
    """Three digits, or all those before the point: 0.0123, 12.3, 4,812."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio to two places, or of three digits or more as a whole number: 0.97, 12.34, 1,050."""
    return f"{ratio:.2f}" if ratio < 99.995 else f"{ratio:,.0f}"


def duration(seconds: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{figure(seconds / scale)} {unit}"
    return f"{figure(seconds / 1e-9)} ns"


def is_yardstick(name: str) -> bool:
    """Whether a variant is there to compare sizes with, not to compete: it does less than the work."""
    return name.startswith(("copy_", "setup"))


def is_eager(name: str) -> bool:
    return name.startswith("eager")


def is_compiled(name: str) -> bool:
    return name.startswith("torch.compile")


def is_pytorch(name: str) -> bool:
    """Whether a variant is PyTorch without its compiler: eager code, or an op of torch's own that does the work."""
    return is_eager(name) or (name.startswith("torch") and not is_compiled(name))


def is_ours(name: str) -> bool:
    """Whether a variant is another way to use what is under test, as "fused, philox" is: it competes with none."""
    return name.startswith("fused")


def is_rival(name: str) -> bool:
    """Whether a variant competes: one that does the same work, and is not ours."""
    return not (is_ours(name) or is_yardstick(name))


def is_peer(name: str) -> bool:
    """Whether a variant is someone else's kernel or library: neither PyTorch nor its compiler."""
    return is_rival(name) and not (is_pytorch(name) or is_compiled(name))


def strongest(ratios: dict, wanted: Callable[[str], bool]) -> tuple[str, dict] | None:
    """The name and ratio of the fastest variant that `wanted` picks, the one hardest to beat; None if there is none."""
    found = [item for item in ratios.items() if wanted(item[0])]
    return min(found, key=lambda item: item[1]["ratio"], default=None)


def work(row: dict) -> str:
    """What was timed: shape with its model, and dtype."""
    shape = "x".join(map(str, row["shape"]))
    return f"{row['label']} ({shape}), {row['dtype']}" if row["label"] else f"{shape}, {row['dtype']}"


def rate(row: dict) -> str:
    """Work per second: operations where matrix products bind, else bytes; "-" where no cost is known."""
    if "cost" not in row:
        return "-"
    if row.get("ceiling", {}).get("name") == "matrix products":
        return f"{figure(row['TFLOP_per_s'])} TFLOP/s"
    return f"{figure(row['GB_per_s'])} GB/s"


def reach(row: dict) -> str:
    """Throughput and its share of the ceiling that binds."""
    if "ceiling" not in row:
        return rate(row)
    return f"{rate(row)}, {row['ceiling']['percent']:.0f} % of {row['ceiling']['name']}"


def extrapolated(row: dict) -> dict[str, str]:
    """Of each variant of which a part was timed, how its time came about: "784 passes, one timed"."""
    return {name: f"{count:,} passes, one timed" for name, count in row.get("repeats", {}).items()}


def accuracy(row: dict) -> str:
    """The largest error against float64, and what was allowed; "-" where bits or samples are compared instead."""
    found = row.get("accuracy")
    return f"{found['error']:.1e} of {found['allowed']:.1e} allowed" if found else "-"


def command(report: dict) -> str:
    """The command, or commands, that measure this report again."""
    return "; ".join(_command(suite, report["options"]) for suite in report["options"].get("suites", [report["suite"]]))


def _command(suite, options):
    words = ["genengine", "bench", suite, *(word for path in options.get("load", ()) for word in ("--load", path))]
    joined = {"shape": options.get("shape"), "dtype": options.get("dtypes")}
    words += [word for name, value in joined.items() if value for word in (f"--{name}", ",".join(map(str, value)))]
    words += ["--first"] if options.get("first") else []
    if options.get("sweep"):
        words += ["--sweep", options["sweep"]]
    if (modes := options.get("compile_modes", ["default"])) != ["default"]:
        words += ["--compile", ",".join(modes) or "none"]
    if options.get("budget", 2.0) != 2.0:
        words += ["--budget", f"{options['budget']:g}"]
    return shlex.join([*words, "--device", options.get("device", "cpu")])


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
    if row["accuracy"]:
        body.append(painted(f"error {accuracy(row)} against float64", DIM, colour))
    if fused.get("reason"):
        body.append(painted(f"timed by plain calls: {fused['reason']}", DIM, colour))
    if "hot" in row:
        body.append(f"inputs in the cache: {duration(row['hot']['variants']['fused']['median'])}")
    body += _wrapped(_ratio(name, entry, colour) for name, entry in row["ratios"].items())
    body += [painted(f"{name}: {how}", DIM, colour) for name, how in extrapolated(row).items()]
    body += [painted(f"{name}: its results are not checked", DIM, colour) for name in row["unchecked"]]
    body += [painted(f"{name}: skipped, {why}", DIM, colour) for name, why in row["skipped"].items()]
    body += [_goal(goal, colour) for goal in row["goals"]]
    return "\n    ".join([head, *body])


def _ratio(name, entry, colour):
    value, interval = entry["ratio"], f"{times(entry['ratio'])}x ({times(entry['low'])}-{times(entry['high'])})"
    if not is_rival(name):
        return f"{name} {interval}"
    if is_loss(value):
        return f"{name} {painted(f'{interval} LOSS', RED, colour)}"
    return f"{name} {painted(interval, GREEN, colour)}" if is_gain(value) else f"{name} {interval}"


def _wrapped(parts: Iterable[str], per_line=3):
    parts = list(parts)
    return ["; ".join(parts[i : i + per_line]) for i in range(0, len(parts), per_line)]


def _goal(goal, colour):
    verdict = painted("reached", GREEN, colour) if goal["reached"] else painted("MISSED", RED, colour)
    return f"goal {goal['goal']}: {times(goal['value'])}, {verdict}"


@dataclass(frozen=True)
class Tally:
    """How many rows were timed and failed; how many comparisons gain, lose, do neither; how many goals are reached."""

    timed: int
    failed: int
    gains: int
    losses: int
    even: int
    reached: int
    goals: int


def tally(report: dict) -> Tally:
    timed = [row for row in report["rows"] if "error" not in row]
    rivals = [e["ratio"] for row in timed for name, e in row["ratios"].items() if is_rival(name)]
    goals = [goal["reached"] for row in timed for goal in row["goals"]]
    gains, losses = sum(map(is_gain, rivals)), sum(map(is_loss, rivals))
    return Tally(
        len(timed),
        len(report["rows"]) - len(timed),
        gains,
        losses,
        len(rivals) - gains - losses,
        sum(goals),
        len(goals),
    )


def is_gain(value: float) -> bool:
    return value > 1 + NOISE


def is_loss(value: float) -> bool:
    return value < 1 - NOISE


def typical(report: dict, wanted: Callable[[str], bool]) -> tuple[float, int] | None:
    """The geometric mean of the ratios to each row's strongest variant that `wanted` picks, and of how many rows."""
    found = [strongest(row["ratios"], wanted) for row in report["rows"] if "error" not in row]
    logs = [math.log(item[1]["ratio"]) for item in found if item]
    return (math.exp(sum(logs) / len(logs)), len(logs)) if logs else None


def totals(report: dict) -> str:
    """How many rows gained, lost, failed."""
    count = tally(report)
    return (
        f"{count.timed} rows timed, {count.failed} failed; of {count.gains + count.losses + count.even} comparisons "
        f"{count.gains} gains, {count.losses} losses, the rest within {NOISE:.0%}; "
        f"{count.reached} of {count.goals} goals reached"
    )


# ---- Markdown ----------------------------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    """The report as a table; losses and missed goals in bold."""
    return "\n".join([MARKDOWN_HEAD, *map(markdown_row, report["rows"])])


def markdown_row(row: dict) -> str:
    if "error" in row:
        return _markdown_line(row["name"], work(row), "failed", "", "", row["error"].splitlines()[0], "")
    told = {name: f" ({how})" for name, how in extrapolated(row).items()}
    others = ", ".join(
        f"{name} {_bold_loss(name, entry['ratio'])}{told.get(name, '')}" for name, entry in row["ratios"].items()
    )
    goals = "; ".join(
        f"{goal['goal']}: {times(goal['value'])}" + ("" if goal["reached"] else " **missed**") for goal in row["goals"]
    )
    share = f"{row['ceiling']['percent']:.0f} %" if "ceiling" in row else "-"
    time = duration(row["variants"]["fused"]["median"])
    time += f" (hot {duration(row['hot']['variants']['fused']['median'])})" if "hot" in row else ""
    error = f"{row['accuracy']['error']:.1e}" if row["accuracy"] else "-"
    return _markdown_line(row["name"], work(row), time, share, error, others or "-", goals or "-")


def _markdown_line(*cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _bold_loss(name, value):
    return f"**{times(value)}**" if is_loss(value) and is_rival(name) else times(value)
