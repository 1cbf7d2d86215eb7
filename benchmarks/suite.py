"""Runs what is registered, one row after the other, and gathers a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from genengine.benchmarks import ceilings, harness, machine, registry, results


@dataclass(frozen=True)
class Options:
    """How to run a suite.

    budget: seconds of timing per row. shape: one shape instead of the registered ones. dtypes: names; those that a
    benchmark has are run. compile_modes: of torch.compile. sweep: an axis to scale, such as "batch". load: files that
    have registered benchmarks of their own, for the record. first: of every benchmark its first shape alone. labels:
    names of shapes; the registered ones of these names alone.
    """

    budget: float = 2.0
    shape: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] = ()
    compile_modes: tuple[str, ...] = ("default",)
    sweep: str | None = None
    load: tuple[str, ...] = ()
    first: bool = False
    labels: tuple[str, ...] = ()

    def check(self) -> None:
        if not 0 < self.budget < math.inf:
            raise ValueError(f"bench: budget must be a finite number of seconds > 0, got {self.budget}; default 2")
        for name in self.dtypes:
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"bench: dtype must be a name of torch's, such as bfloat16, got {name!r}")
        for mode in self.compile_modes:
            if mode not in harness.COMPILE_MODES:
                raise ValueError(f"bench: compile mode must be among {', '.join(harness.COMPILE_MODES)}, got {mode!r}")
        if self.shape is not None and self.sweep is None and any(size < 0 for size in self.shape):
            raise ValueError(f"bench: shape must have sizes >= 0, got {self.shape}")


def cases(what: str, device: str, options: Options) -> list[tuple[registry.Entry, registry.Case]]:
    """What will be run, without building any input. Raises ValueError if that is nothing."""
    entries = registry.select(what)
    if options.shape is not None:
        entries = _of_rank(entries, options.shape, what)
    found = [
        (entry, case)
        for entry in entries
        for case in entry.cases(
            device,
            quick=what in ("quick", "gate"),
            first=options.first,
            shape=options.shape,
            dtypes=options.dtypes,
            sweep=options.sweep,
        )
        if not options.labels or case.label in options.labels
    ]
    if not found and what != "ceilings":
        axes = sorted({axis for entry in entries for axis in entry.axes})
        kinds = sorted({dtype for entry in entries for dtype in entry.dtypes})
        raise ValueError(
            f"bench: nothing of {what!r} fits the options; its dtypes are {', '.join(kinds)}, its axes to sweep "
            f"{', '.join(axes) or '(none)'}, its labels those of `genengine bench {what} --list`"
        )
    return found


def _of_rank(entries, shape, what):
    fitting = [entry for entry in entries if len(shape) in entry.ranks]
    if not fitting:
        examples = {str(next(iter(entry.shapes.values()))): entry.name for entry in entries}
        raise ValueError(
            f"bench: --shape {','.join(map(str, shape))} has {len(shape)} dimensions, but {what!r} takes shapes like "
            + ", ".join(f"{text} ({name})" for text, name in examples.items())
        )
    return fitting


def run(
    what: str = "quick",
    device: str = "cpu",
    options: Options = Options(),  # noqa: B008
    *,
    done: Sequence[dict] = (),
    report_row: Callable[[dict], None] | None = None,
    report_ceilings: Callable[[str], None] | None = None,
    keep: Callable[[dict], None] | None = None,
) -> dict:
    """Run a suite, the benchmarks of one op or model, or one benchmark; returns the report.

    A benchmark that fails is a row that says so; the rest goes on. keep: called with the report so far after every row.
    done: rows of an earlier run, of which those that did not fail are kept and not run again. report_row,
    report_ceilings: for showing progress. torch is set to one thread while it runs.
    """
    options.check()
    device = torch.device(device).type
    work = cases(what, device, options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(what, device, options, work, done, report_row, report_ceilings, keep)
    finally:
        torch.set_num_threads(threads)


def _run(what, device, options, work, done, report_row, report_ceilings, keep):
    dtypes = list(dict.fromkeys(case.dtype for _, case in work if case.dtype.is_floating_point))
    found = ceilings.measure(device, dtypes or [torch.float32], report=report_ceilings)
    report = {
        "schema_version": results.SCHEMA_VERSION, "suite": what, "options": recorded(options, device),
        "environment": machine.environment(device), "ceilings": found.to_json(), "rows": [],
    }  # fmt: skip
    kept = {results.key(row): row for row in done if "error" not in row}
    for entry, case in work:
        row = kept.get(results.key(harness.describe(entry, case))) or time_one(entry, case, options, found)
        report["rows"].append(row)
        if report_row is not None:
            report_row(row)
        if keep is not None:
            keep(_plain(report))
    return _plain(report)


def recorded(options: Options, device: str) -> dict:
    """The options as a result file has them."""
    return _plain(vars(options) | {"device": device})


def time_one(entry, case, options: Options, found: ceilings.Ceilings | None = None) -> dict:
    """One row, under no_grad; what torch.compile has cached for it is dropped afterwards."""
    with torch.no_grad():
        row = harness.run(entry, case, budget=options.budget, compile_modes=options.compile_modes, ceilings=found)
    torch.compiler.reset()
    return _plain(row)


def again(key: tuple, device: str, options: Options) -> dict:
    """Measure one row anew, by its `results.key`."""
    name, label, shape, dtype, _ = key
    case = registry.Case(shape, getattr(torch, dtype), device, label)
    return time_one(registry.find(name), case, options)


def _plain(value):
    """As JSON gives it back: lists for tuples, text for keys."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
