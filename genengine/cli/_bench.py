"""The commands about speed: bench, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from genengine.cli._options import add_command, chosen_device, with_device, with_json


def add_bench(commands):
    command = add_command(
        commands, "bench", _bench, "time the fused kernels, or your own, against eager PyTorch and torch.compile",
        "genengine bench adaln --shape 8,1024,1152 --dtype bfloat16 --html adaln.html",
    )  # fmt: skip
    command.add_argument(
        "what", nargs="?", default=None, metavar="SUITE|OP|MODEL",
        help="quick, ops, samplers, models, peers, gate, all; an op or model; or one benchmark's name (see --list); "
        "default quick",
    )  # fmt: skip
    command.add_argument(
        "--list",
        action="store_true",
        help="list what can be timed, of all or of the suite named, with shapes and dtypes",
    )
    command.add_argument("--budget", type=float, default=2.0, help="seconds of timing per row (default 2)")
    command.add_argument("--first", action="store_true", help="of every benchmark the first shape alone")
    command.add_argument("--shape", default=None, metavar="N,N,...", help="this shape instead of the registered ones")
    command.add_argument(
        "--label", action="append", default=[], metavar="NAME",
        help="the shapes of this name alone, such as DiT-XL/2 (see --list); may be repeated",
    )  # fmt: skip
    command.add_argument("--dtype", default=None, metavar="NAME,...", help="these dtypes alone, such as bfloat16")
    command.add_argument(
        "--sweep", default=None, metavar="AXIS", help="scale one axis of the first shape, such as batch (see --list)"
    )
    command.add_argument(
        "--compile", default="default", metavar="MODE,...", dest="compile_modes",
        help="modes of torch.compile to time: default, max-autotune, both, or none (default: default)",
    )  # fmt: skip
    command.add_argument(
        "--load", action="append", default=[], metavar="FILE.py", help="a file that registers benchmarks of your own"
    )
    command.add_argument(
        "--save", default=None, metavar="FOLDER", help="also write FOLDER/<device>/<date>-<commit>-<suite>.json"
    )
    command.add_argument(
        "--resume", action="store_true",
        help="with --save: keep the rows that the file of this day, commit and suite has, and run the rest",
    )  # fmt: skip
    command.add_argument("--html", default=None, metavar="FILE", help="also write one self-contained page with plots")
    command.add_argument("--markdown", default=None, metavar="FILE", help="also write the table as Markdown")
    command.add_argument(
        "--compare", default=None, metavar="OLD.json",
        help="fail, with exit status 1, if a ratio to eager got worse; of a folder, the newest result of this suite",
    )  # fmt: skip
    command.add_argument(
        "--threshold", type=float, default=None,
        help="loss that --compare allows (default 0.1; at least 0.5 against a result of another machine)",
    )  # fmt: skip
    command.add_argument("--strict", action="store_true", help="exit status 1 if a row failed")
    with_device(command)
    with_json(command)


def add_report(commands):
    command = add_command(
        commands, "report", _report, "show a stored result of bench again, or as a page with plots",
        "genengine report benchmarks/results/amd-epyc/2026-11-21-0123456789ab.json --html report.html",
    )  # fmt: skip
    command.add_argument(
        "results", nargs="+", metavar="RESULT.json",
        help="what `genengine bench ... --save` wrote; several of one device and commit are shown together",
    )  # fmt: skip
    command.add_argument("--html", default=None, metavar="FILE", help="write one self-contained page with plots")
    command.add_argument("--markdown", default=None, metavar="FILE", help="write the table as Markdown")


def _bench(options):
    from genengine.benchmarks import compare, machine, page, registry, results, suite, sweeps, table

    for path in options.load:
        registry.load_file(path)
    device = _device_kind(options)
    if options.list:
        print(_listing(registry.groups(registry.select(options.what or "all")), device))
        return 0
    wanted, options.what = _suite_options(options), options.what or "quick"
    suite.cases(options.what, device, wanted)  # a bad argument is refused before the process starts anew
    if options.html:
        page.check()
    machine.restart_with_malloc_settings()
    old = _old_report(options, device)
    colour = table.colour_wanted()
    show = None if options.json else lambda row: print(table.lines(row, colour=colour), flush=True)
    say = None if options.json else lambda text: print(text, flush=True)
    keep = (lambda report: results.write(report, results.path_of(report, Path(options.save)))) if options.save else None
    done = _rows_done(options, device, wanted)
    report = suite.run(options.what, device, wanted, done=done, report_row=show, report_ceilings=say, keep=keep)
    print(json.dumps(report, indent=1) if options.json else "\n".join([*sweeps.lines(report), table.totals(report)]))
    _write(options, report)
    failed = options.strict and any("error" in row for row in report["rows"])
    if old is None:
        return int(failed)
    report_then, same_machine = old
    if not same_machine:
        print("compare: the old result is of another machine", file=sys.stderr)
    verdict = compare.compare(
        report_then, report, threshold=compare.allowed(options.threshold, same_machine),
        again=lambda key: suite.again(key, device, wanted),
    )  # fmt: skip
    print(verdict.describe(), file=sys.stderr if options.json else sys.stdout)
    return int(failed or not verdict.passed)


def _report(options):
    """Without a file to write, the lines that bench showed."""
    from genengine.benchmarks import results, sweeps, table

    report = results.merged([results.load(path) for path in options.results])
    if not (options.html or options.markdown):
        colour = table.colour_wanted()
        rows = [table.lines(row, colour=colour) for row in report["rows"]]
        print("\n".join([*rows, *sweeps.lines(report), table.totals(report)]))
    _write_pages(options, report)


def _rows_done(options, device, wanted):
    """Of an interrupted run with the same options: what --resume need not run again."""
    if not options.resume:
        return []
    if not options.save:
        raise ValueError("--resume needs --save: rows are taken from the file that an earlier run has saved")
    from genengine.benchmarks import machine, results, suite

    now = {"suite": options.what, "options": suite.recorded(wanted, device), "environment": machine.environment(device)}
    path = results.path_of(now, Path(options.save))
    then = results.load(path) if path.exists() else None
    return then["rows"] if then and then["options"] == now["options"] else []


def _device_kind(options):
    """ "cpu" or "cuda"; of several GPUs, the one asked for becomes the current one."""
    device = chosen_device(options)
    if device.type == "cuda" and device.index is not None:
        import torch

        torch.cuda.set_device(device)
    return device.type


def _suite_options(options):
    from genengine.benchmarks import suite

    split = lambda text: tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()  # noqa: E731
    try:
        shape = tuple(int(size) for size in split(options.shape)) or None
    except ValueError:
        raise ValueError(f"--shape must be integers with commas, such as 16,256,1152, got {options.shape!r}") from None
    modes = () if options.compile_modes == "none" else split(options.compile_modes)
    if modes == ("both",):
        modes = ("default", "max-autotune")
    found = suite.Options(
        options.budget, shape, split(options.dtype), modes, options.sweep, tuple(options.load), options.first,
        tuple(options.label),
    )  # fmt: skip
    found.check()
    return found


def _old_report(options, device):
    """What --compare compares with, read before anything is timed."""
    if options.compare is None:
        return None
    from genengine.benchmarks import compare, machine

    return compare.find_old(options.compare, machine.environment(device), options.what)


def _write(options, report):
    from genengine.benchmarks import results

    if options.save:
        print(f"saved: {results.save(report, results.path_of(report, Path(options.save)))}", file=sys.stderr)
    _write_pages(options, report)


def _write_pages(options, report):
    from genengine.benchmarks import page, table

    if options.markdown:
        Path(options.markdown).write_text(table.markdown(report) + "\n", encoding="utf-8")
        print(f"saved: {options.markdown}", file=sys.stderr)
    if options.html:
        print(f"saved: {page.write(report, options.html)}", file=sys.stderr)


def _listing(groups, device):
    lines = []
    for group, entries in groups.items():
        lines.append(f"{group}  ({entries[0].kind})")
        for entry in entries:
            shapes = entry.shapes | (entry.cuda_shapes if device == "cuda" else {})
            described = "; ".join(f"{label} {'x'.join(map(str, shape))}" for label, shape in shapes.items())
            axes = f"; axes {', '.join(entry.axes)}" if entry.axes else ""
            lines.append(f"    {entry.name}: {described}; {', '.join(entry.dtypes)}{axes}")
    return "\n".join(lines)
