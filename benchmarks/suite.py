"""Finds, selects and runs benchmarks, and turns a report into a table."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator

import torch

from genengine import benchmarks
from genengine.benchmarks import harness
from genengine.models import FAMILIES

SUITES = ("quick", "models", "peers", "all")
PEERS = ("diffusers", "k_diffusion", "trace")
TABLE_HEAD = "| work | shape | dtype | fused | others / fused (95 % interval) | goals |\n|---|---|---|---|---|---|"


def discover(device: str = "cpu", suite: str = "all") -> Iterator[harness.Benchmark]:
    """The benchmarks of a suite, built when it is their turn: inputs are big.

    "all" is every benchmark of every bench_<name>.py, "models" those of the families, "peers" the drop-ins for other
    libraries against these, "quick" the short ones of all.
    """
    members = {"models": FAMILIES, "peers": PEERS}.get(suite, names())
    for name in names():
        if name not in members:
            continue
        for benchmark in module_benchmarks(name, device):
            if suite != "quick" or benchmark.quick:
                yield benchmark


def names() -> list[str]:
    """What bench_<name>.py files there are."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name.removeprefix("bench_") for name in found if name.startswith("bench_"))


def run(what: str = "quick", device: str = "cpu", *, budget: float = 2.0, report_row: Callable | None = None) -> dict:
    """Run a suite ("quick", "models", "peers", "all") or the benchmarks of one op or model; returns the report."""
    if what not in SUITES and what not in names():
        raise ValueError(f"bench: expected one of {', '.join((*SUITES, *names()))}, got {what!r}")
    if not 0 < budget < math.inf:
        raise ValueError(f"bench: budget must be a finite number of seconds > 0, got {budget}; the default is 2")
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for benchmark in discover(device, what) if what in SUITES else module_benchmarks(what, device):
            row = harness.run(benchmark, budget=budget)
            rows.append(row)
            if report_row is not None:
                report_row(row)
    return {"environment": harness.environment(device), "suite": what, "rows": rows}


def module_benchmarks(name: str, device: str):
    return importlib.import_module(f"genengine.benchmarks.bench_{name}").benchmarks(device)


def restart_with_malloc_settings() -> None:
    """Start this process again with the allocator settings of the protocol, unless they are set."""
    if sys.platform != "linux" or all(os.environ.get(name) for name in harness.MALLOC_SETTINGS):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | harness.MALLOC_SETTINGS)


def table(report: dict) -> str:
    """The report as Markdown: each row's time, ratios to the other variants, and goals."""
    return "\n".join([TABLE_HEAD, *map(table_row, report["rows"])])


def table_row(row) -> str:
    head = f"| {row['name']} | {row['shape']} | {row['dtype']} "
    if "error" in row:
        return head + f"| failed | {row['error'].splitlines()[0]} | |"
    fused = row["variants"]["fused"]["median"]
    others = ", ".join(
        f"{name} {entry['ratio']:.2f} ({entry['low']:.2f}-{entry['high']:.2f})" for name, entry in row["ratios"].items()
    )
    goals = "; ".join(
        f"{goal['goal']}: {goal['value']:.2f} {'reached' if goal['reached'] else 'MISSED'}" for goal in row["goals"]
    )
    return head + f"| {duration(fused)} | {others} | {goals} |"


def duration(seconds: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
