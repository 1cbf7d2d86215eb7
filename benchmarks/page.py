"""A report as one HTML page that needs nothing else: no network, no script to be read, light and dark, for print."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from genengine.benchmarks import page_table, plots, table
from genengine.benchmarks.ceilings import Ceilings

LISTED = 12  # losses, and failed rows, before the rest folds away
SECTIONS = {
    "environment": "Environment", "ceilings": "Measured ceilings", "plots": "Plots", "rows": "Every row",
    "reading": "How to read it",
}  # fmt: skip


def check() -> None:
    """Raise RuntimeError unless a page can be made: matplotlib draws its plots. To be called before a long run."""
    plots.check()


def write(report: dict, path: str | Path) -> Path:
    """Write a report as a page, whole or not at all; returns the path. Raises RuntimeError without matplotlib."""
    path = Path(path)
    text = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def render(report: dict) -> str:
    """The page as text."""
    title = f"genengine bench {report['suite']}"
    body = [
        _header(report, title), _verdict(report), _environment(report), _ceilings(report), _plots(report),
        _section("rows", page_table.tables(report)), _reading(report), _footer(report),
    ]  # fmt: skip
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}, {escape(report['environment']['device'])}</title>",
        f"<style>\n{_asset('page.css')}</style>", "</head>", "<body>", "<main>", *body, "</main>",
        f"<script>\n{_asset('page.js')}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def _asset(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _section(name, body):
    return f'<section id="{name}">\n<h2>{SECTIONS[name]}</h2>\n{body}\n</section>'


# ---- title and verdict -------------------------------------------------------------------------------------------


def _header(report, title):
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in SECTIONS.items())
    found = report["environment"]
    state = " with uncommitted changes" if found["dirty"] else ""
    where = f"{found['device']}, {_minute(found['time'])}, commit {found['commit'] or 'none'}{state}"
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(where)}</p>\n<nav>{links}</nav>\n</header>"


def _minute(time):
    return f"{time[:16].replace('T', ' ')} UTC"


def _verdict(report):
    count = table.tally(report)
    tiles = [
        ("gain" if count.gains else "", count.gains, "gains"), ("loss" if count.losses else "", count.losses, "losses"),
        ("", count.even, f"within {table.NOISE:.0%}"), ("loss" if count.failed else "", count.failed, "failed rows"),
    ]  # fmt: skip
    if count.goals:
        reached = f"{count.reached} of {count.goals}"
        tiles.append(("gain" if count.reached == count.goals else "loss", reached, "goals reached"))
    shown = "".join(f'<li class="{kind}"><b>{value}</b> {text}</li>' for kind, value, text in tiles)
    return (
        f'<section id="verdict">\n<p class="lead">{escape(verdict(report))}</p>\n<ul class="tiles">{shown}</ul>\n'
        f"{_losses(report)}{_failures(report)}</section>"
    )


def verdict(report: dict) -> str:
    """What came out, in two sentences."""
    count = table.tally(report)
    comparisons = count.gains + count.losses + count.even
    failed = f"{count.failed} failed" if count.failed else "none failed"
    first = f"{_counted(count.timed, 'row')} timed, {failed}; of {_counted(comparisons, 'comparison')} with others "
    first += f"{count.gains} show a gain and {count.losses} a loss."
    rivals = (("the strongest eager PyTorch", table.is_pytorch), ("torch.compile", table.is_compiled),
              ("the strongest peer", table.is_peer))  # fmt: skip
    parts = [
        f"{found[0]:.2f} times as fast as {name} ({_counted(found[1], 'row')})"
        for name, wanted in rivals
        if (found := table.typical(report, wanted))
    ]
    return f"{first} In the geometric mean, fused is {', '.join(parts)}." if parts else first


def _counted(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _losses(report):
    """Every loss, worst first, with a link to its row."""
    found = [
        (entry["ratio"], name, number, row)
        for number, row in enumerate(report["rows"], 1)
        if "error" not in row
        for name, entry in row["ratios"].items()
        if table.is_loss(entry["ratio"]) and table.is_rival(name)
    ]
    return _listed("Losses", [
        f'<b class="loss">{ratio:.2f}</b> {escape(name)}: {_linked(number, row)}'
        for ratio, name, number, row in sorted(found, key=lambda item: item[:3])
    ])  # fmt: skip


def _failures(report):
    return _listed("Failed", [
        f"{_linked(number, row)}: {escape(row['error'].strip().splitlines()[0] if row['error'].strip() else '')}"
        for number, row in enumerate(report["rows"], 1)
        if "error" in row
    ])  # fmt: skip


def _linked(number, row):
    return f'<a href="#row-{number}">{escape(row["name"])}</a> {escape(table.work(row))}'


def _listed(heading, lines):
    if not lines:
        return ""
    lines = [f"<li>{line}</li>" for line in lines]
    shown, rest = "".join(lines[:LISTED]), "".join(lines[LISTED:])
    more = f"<details><summary>{len(lines) - LISTED} more</summary><ul>{rest}</ul></details>" if rest else ""
    return f'<div class="losses"><h3>{heading}</h3><ul>{shown}</ul>{more}</div>\n'


# ---- environment and ceilings ------------------------------------------------------------------------------------


def _environment(report):
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts_of(report))
    return _section("environment", f"<dl>{facts}</dl>")


def facts_of(report: dict) -> list[tuple[str, str]]:
    """Where it ran: name and text of everything the report says about the machine and the software."""
    found = dict(report["environment"])
    state = "with uncommitted changes" if found.pop("dirty") else "clean"
    facts = [("device", found.pop("device")), ("commit", f"{found.pop('commit') or 'none'}, {state}")]
    facts.append(("time", _minute(found.pop("time"))))
    if gpu := found.pop("gpu", None):
        facts += [(name.replace("_", " ").replace(".", " "), value) for name, value in gpu.items() if name != "name"]
    for name, value in found.items():
        if value is not None:
            facts.append((name.replace("_", " "), _fact(value)))
    return facts


def _fact(value):
    if isinstance(value, dict):
        return "; ".join(f"{name} {'not set' if item is None else item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(f"{item:.2f}" if isinstance(item, float) else str(item) for item in value)
    return str(value)


def _ceilings(report):
    if report["ceilings"] is None:
        return _section("ceilings", "<p>None were measured: the rows have no share of a ceiling.</p>")
    found = Ceilings.from_json(report["ceilings"])
    sizes = sorted(found.copy)
    streams = _plain_table(
        ["GB/s, by bytes moved", *map(_size, sizes)],
        [["copy", *(table.figure(found.copy[n] * 1e-9) for n in sizes)],
         ["triad", *(table.figure(found.triad[n] * 1e-9) for n in sizes)]],
    )  # fmt: skip
    products = [
        [f"matrix product, {name}", f"{table.figure(rate * 1e-12)} TFLOP/s"] for name, rate in found.matmul.items()
    ]
    exps = found.missing.get("exps", "not measured") if found.exps is None else f"{table.figure(found.exps * 1e-9)} G/s"
    single = [["exponentials", exps], ["a launch", table.duration(found.launch)]]
    return _section(
        "ceilings", f'<div class="side">{streams}{_plain_table(["ceiling", "reached"], products + single)}</div>'
    )


def _size(nbytes):
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {unit}"
    return f"{nbytes} B"


def _plain_table(head: Iterable[str], rows: Iterable[Iterable[str]]):
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="plain"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- plots and reading -------------------------------------------------------------------------------------------


def _plots(report):
    parts = [
        f"<h3>{escape(section.heading)}</h3>\n<p>{escape(section.caption)}</p>\n"
        f'<div class="figures">{"".join(f"<figure>{drawn}</figure>" for drawn in section.drawn)}</div>'
        f"{_notes(section.notes)}"
        for section in plots.sections(report)
    ]
    return _section("plots", "\n".join(parts) or "<p>There is nothing to draw: no row was timed.</p>")


def _notes(lines):
    return f'\n<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


READING = """<p>Each line of a table is one piece of work at one shape and dtype. Its result was checked against a
float64 reference before anything was timed: <b>error</b> is the largest error met, <b>allowed</b> what the rule of the
tests permits. Work that fails its check, or raises, is a failed row and is not timed.</p>
<p><b>ours</b> is the median time of "fused", with the 20th and 80th percentile below. Every other figure with a × is a
variant's time over ours, the median of paired samples, with its 95 % confidence interval below: above 1 we are faster.
Within {noise} of 1 is neither gain nor loss. Columns named copy_ or setup are yardsticks, which do less than the work
and show the size of it; columns that begin with fused are other ways to use what is under test. Neither is counted.</p>
<p><b>of ceiling</b> is the least time that this device could need, by ceilings measured in the same run, over ours; the
name says which ceiling binds. It can exceed 100 % where the data stay in a cache that the ceiling's own working set did
not fit. On a GPU, <b>cold</b> rotates its inputs over more than the second-level cache, <b>hot</b> takes the same ones
again and again; gains, losses and plots are of cold.</p>"""


def _reading(report):
    made = f"<p>Measured by</p>\n<pre>{escape(table.command(report))}</pre>"
    return _section("reading", f"{READING.format(noise=f'{table.NOISE:.0%}')}\n{made}")


def _footer(report):
    version = report["environment"].get("genengine", "")
    return (
        f"<footer>Made by genengine {escape(version)}. docs/reading_the_report.md explains every column and plot, "
        "docs/measuring.md the protocol.</footer>"
    )
