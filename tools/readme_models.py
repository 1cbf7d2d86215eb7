"""Writes what the shipped models measure into README.md and genengine/pretrained/README.md, from their records.

    python tools/readme_models.py [--check]        --check: change nothing, fail if a page is out of date

A record is genengine/pretrained/<family>_digits.json, written by tools/ship_pretrained.py. The tables stand between
`<!-- families -->` and `<!-- models -->` markers and their `/` forms.
"""

from __future__ import annotations

import json
import sys

from readme_figures import README, between

from genengine import models
from genengine.evaluate.metrics import ARROWS

PRETRAINED = README.parent / "genengine" / "pretrained"
SHORT = {
    "frechet_distance": "Fréchet distance", "coverage": "coverage", "recall": "recall", "knn_accuracy": "kNN accuracy",
    "nearer_train_share": "nearer to train",
}  # fmt: skip


def records() -> dict[str, dict]:
    """family -> record, in the order of the registry."""
    paths = {name: PRETRAINED / f"{name}_digits.json" for name in models.FAMILIES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def families_table(found) -> str:
    """One line per family: what it is, what it cost, and the test metrics."""
    head = ["family", "network", "weights", "CPU minutes", "bits/dim", *SHORT.values()]
    rows = [head, ["---"] * len(head)]
    for name, record in found.items():
        test, likelihood = record["test"], models.FAMILIES[name].likelihood
        bits = test["measured"].get("bits_per_dim")
        cells = [
            f"`{name}`", record["train"]["model"]["net"]["name"], f"{record['parameters']:,}",
            f"{record['environment']['train_seconds'] / 60:.1f}",
            "-" if bits is None else ("" if likelihood == "exact" else "<= ") + f"{bits['held_out']:.3f}",
        ]  # fmt: skip
        rows.append(cells + [value(test["samples"], metric) for metric in SHORT])
    return markdown(rows)


def models_table(found) -> str:
    """Every metric of every model on test, and on validation where it was recorded, with its bar."""
    parts = []
    for name, record in found.items():
        test, checked = record["test"], record.get("validation")
        rows = [["metric", "validation", "test", "bar"], ["---"] * 4]
        for metric in (*test["measured"], *(m for m in ARROWS if m in test["samples"]["mean"])):
            bar = test["bars"].get(metric)
            cells = [entry(part, metric) if part else "-" for part in (checked, test)]
            rows.append([metric, *cells, "{} {:g}".format(*bar) if bar else ""])
        missed = "; ".join(test["failures"])
        verdict = f"**Missed: {missed}.**" if missed else "Every bar is met."
        parts.append(
            f"## {name}\n\n`{name}_digits.safetensors`: {record['parameters']:,} weights, "
            f"{record['environment']['train_seconds']:.0f} s of one core (torch {record['environment']['torch']}).\n\n"
            f"    {record['command']}\n\n{markdown(rows)}\n\n{verdict} Sampled with {options(test)}.\n"
        )
    return "\n".join(parts).rstrip()


def options(test) -> str:
    return ", ".join(f"{key}={val}" for key, val in test["options"].items()) or "no options"


def entry(part, metric) -> str:
    measured = part["measured"].get(metric)
    return f"{measured['held_out']:.4f}" if measured else value(part["samples"], metric)


def value(samples, metric) -> str:
    if metric not in samples["mean"]:
        return "-"
    return f"{samples['mean'][metric]:.3f} ± {samples['std'][metric]:.3f}"


def markdown(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    found, stale = records(), []
    pages = {README: ("families", families_table), PRETRAINED / "README.md": ("models", models_table)}
    for page, (marker, table) in pages.items():
        before = page.read_text(encoding="utf-8")
        after = between(before, marker, table(found))
        if after != before:
            stale.append(str(page.relative_to(README.parent)))
            if "--check" not in sys.argv:
                page.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit(f"readme_models: {' and '.join(stale)} out of date; run python tools/readme_models.py")


if __name__ == "__main__":
    main()
