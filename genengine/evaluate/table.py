"""The evaluation of a family as a table for readers: the model, its bars, and the baselines beside it."""

from __future__ import annotations

from genengine.evaluate.metrics import ARROWS


def comparison(result: dict, beside: dict, bars: dict) -> str:
    """One line per metric: what is better, mean +- spread over the seeds, the bar, and every baseline's value.

    Args:
        result: of `evaluate_seeds`.  beside: name -> Report, of `baselines`.  bars: metric -> (sense, bar).
    """
    names = list(beside)
    rows = [["metric", "", f"model, {len(result['seeds'])} seeds", "bar", *names]]
    for name, value in result["mean"].items():
        if name == "num_samples":
            continue
        bar = "{} {:g}".format(*bars[name]) if name in bars else ""
        if name in bars and not met(value, bars[name]):
            bar += " MISSED"
        others = [f"{beside[other][name]:.3f}" if name in beside[other] else "" for other in names]
        rows.append([name, ARROWS.get(name, ""), f"{value:.4f} +- {result['std'][name]:.4f}", bar, *others])
    return columns(rows)


def measured(values: dict, bars: dict) -> str:
    """name -> {split: mean} as lines, with the bar of the held-out split, the last."""
    rows = []
    for name, splits in values.items():
        bar, held_out = bars.get(name), list(splits.values())[-1]
        text = "" if bar is None else "bar {} {:g}{}".format(*bar, "" if met(held_out, bar) else " MISSED")
        rows.append([name, *(f"{split} {value:.4f}" for split, value in splits.items()), text])
    return columns(rows)


def met(value: float, bar: tuple) -> bool:
    """Whether a value meets a bar (sense, number)."""
    return value <= bar[1] if bar[0] == "<=" else value >= bar[1]


def columns(rows: list[list[str]]) -> str:
    """Rows of text with every column as wide as its widest entry."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
