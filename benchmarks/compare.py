"""The regression gate: has a ratio to eager got worse than noise explains?

Ratios, not times: two machines, or one machine on two days, differ in speed, but eager PyTorch beside our kernel sees
the same day. A row that looks worse by more than the threshold is measured again, twice; it has got worse if it looks
so each time, and all measurements together put the upper end of the 95 % interval of new / old below 1 - threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genengine.benchmarks import results
from genengine.benchmarks.table import is_pytorch, strongest

THRESHOLD = 0.10
ELSEWHERE = 0.50  # against a result of another machine, whose caches and vector units differ
CONFIRMATIONS = 2


@dataclass(frozen=True)
class Change:
    """One row's ratio of `baseline` to ours, then and now; low and high bound now / then with 95 % confidence."""

    row: tuple
    baseline: str
    old: float
    new: float
    low: float
    high: float

    def is_suspect(self, threshold: float) -> bool:
        return self.new / self.old < 1 - threshold

    def is_loss(self, threshold: float) -> bool:
        return self.high < 1 - threshold

    def describe(self) -> str:
        return (
            f"{_work(self.row)}: {self.baseline} / fused was {self.old:.2f}, "
            f"is {self.new:.2f} ({self.new / self.old - 1:+.0%}, interval {self.low - 1:+.0%} to {self.high - 1:+.0%})"
        )


@dataclass(frozen=True)
class Verdict:
    """losses: changes that fail. changes: of all compared rows. failed: rows that can no longer be timed, or no longer
    against what they were compared with, and why. missing: rows of the old report that were not run. without: rows
    that have no PyTorch variant to compare with. threshold: what counted as a loss."""

    changes: list[Change]
    losses: list[Change]
    failed: list[str]
    missing: list[tuple]
    without: list[tuple]
    threshold: float

    @property
    def passed(self) -> bool:
        return bool(self.changes) and not self.losses and not self.failed

    def describe(self) -> str:
        lines = [f"compare: {len(self.changes)} ratios to eager compared, {self.threshold:.0%} allowed"]
        lines += [f"  slower: {change.describe()}" for change in self.losses]
        lines += [f"  failed: {text}" for text in self.failed]
        for title, rows in (("not run now", self.missing), ("without a PyTorch variant", self.without)):
            if rows:
                lines.append(f"  {title}: {', '.join(sorted({row[0] for row in rows}))}")
        if not self.changes:
            lines.append("  no row is in both reports: nothing was compared")
        return "\n".join([*lines, "compare: " + ("passed" if self.passed else "FAILED")])


def _work(key):
    name, label, shape, dtype, _ = key
    return " ".join(filter(None, (name, label, "x".join(map(str, shape)), dtype)))


def _no_longer(old, new):
    """Why what was compared then cannot be now, or None."""
    if "error" in new:
        return new["error"].splitlines()[0]
    found = strongest(old["ratios"], is_pytorch)
    if found is None or found[0] in new["ratios"]:
        return None
    return f"{found[0]!r} is gone: {new['skipped'].get(found[0], 'the row has no such variant')}"


def change(old: dict, new: dict) -> Change | None:
    """Between two rows of the same work, by the strongest eager variant of the old one; None if they share none."""
    found = strongest(old["ratios"], lambda name: is_pytorch(name) and name in new.get("ratios", {}))
    if found is None:
        return None
    name, then = found
    return _change(results.key(old), name, then, [new["ratios"][name]])


def _change(key, name, then, measured):
    """From then to all that was measured now: the mean of the logarithms, weighted by their precision."""
    weights = [1 / max(_half_width(now), 1e-4) ** 2 for now in measured]
    logs = [math.log(now["ratio"] / then["ratio"]) for now in measured]
    centre = sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights)
    spread = math.hypot(_half_width(then), sum(weights) ** -0.5)
    ends = (math.exp(centre - spread), math.exp(centre + spread))
    return Change(key, name, then["ratio"], then["ratio"] * math.exp(centre), *ends)


def _half_width(entry):
    """Half of the 95 % interval of log(ratio)."""
    return math.log(entry["high"] / entry["low"]) / 2


def compare(
    old: dict, new: dict, *, threshold: float = THRESHOLD, again: Callable[[tuple], dict] | None = None
) -> Verdict:
    """Compare the rows that two reports share.

    again: again(key) -> the row measured anew, for the CONFIRMATIONS repetitions of what looks like a loss; without it,
    one measurement decides. A row that was timed then and fails now is a failure.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"bench: threshold must be between 0 and 1, got {threshold}; the default is {THRESHOLD}")
    then = {results.key(row): row for row in old["rows"] if "error" not in row}
    now = {results.key(row): row for row in new["rows"]}
    changes, losses, failed, without = [], [], [], []
    for key in (key for key in then if key in now):
        if why := _no_longer(then[key], now[key]):
            failed.append(f"{_work(key)}: {why}")
            continue
        if (found := change(then[key], now[key])) is None:
            without.append(key)
            continue
        if again and found.is_suspect(threshold):
            found = _confirmed(found, then[key], now[key], threshold, again)
        changes.append(found)
        if found.is_loss(threshold):
            losses.append(found)
    return Verdict(changes, losses, failed, [key for key in then if key not in now], without, threshold)


def _confirmed(found, old, new, threshold, again):
    """The change by all measurements if every repetition looks like a loss, else by the first that does not."""
    measured = [new["ratios"][found.baseline]]
    for _ in range(CONFIRMATIONS):
        row = again(found.row)
        if why := _no_longer(old, row):
            raise RuntimeError(f"bench: {_work(found.row)} could be timed once, and then not again: {why}")
        measured.append(row["ratios"][found.baseline])
        latest = _change(found.row, found.baseline, old["ratios"][found.baseline], measured[-1:])
        if not latest.is_suspect(threshold):
            return latest
    return _change(found.row, found.baseline, old["ratios"][found.baseline], measured)


def allowed(threshold: float | None, same_machine: bool) -> float:
    """The loss to allow: what was asked for, or THRESHOLD; against another machine's result at least ELSEWHERE."""
    threshold = THRESHOLD if threshold is None else threshold
    return threshold if same_machine else max(threshold, ELSEWHERE)


def find_old(path: str, environment: dict, suite: str) -> tuple[dict, bool]:
    """The report to compare with, and whether it is of such a machine: the same device, and vector instructions.

    path: a result file; or a folder of results, of which the newest of the suite on this device is taken, or else the
    newest of any device. environment: of this machine (`machine.environment`).
    """
    if not Path(path).is_dir():
        report = results.load(path)
        return report, _same_machine(report["environment"], environment)
    found, old = [], []
    for file in sorted(Path(path).glob("*/*.json")):
        try:
            report = results.load(file)
        except ValueError:  # of an older version
            old.append(file.name)
            continue
        partial = any(report["options"].get(name) for name in ("shape", "dtypes", "sweep", "labels"))
        if report["suite"] == suite and not partial:
            found.append((_same_machine(report["environment"], environment), report["environment"]["time"], report))
    if not found:
        passed_over = f"; of an older version: {', '.join(old)}" if old else ""
        raise ValueError(
            f"bench: no result of the suite {suite!r} under {path}{passed_over}; make one with --save {path}"
        )
    same, _, report = max(found, key=lambda item: item[:2])
    return report, same


def _same_machine(one, other):
    return all(one.get(name) == other.get(name) for name in ("device", "isa"))
