"""The rows of a report as HTML tables, one per op or model: every variant a column, losses as visible as gains."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from genengine.benchmarks import registry, table

KINDS = {"ops": "Ops", "samplers": "Samplers", "models": "Models", "peers": "Peers"}


def tables(report: dict) -> str:
    """Every row, by kind and by op or model; a row's number is its place in the report."""
    numbered = list(enumerate(report["rows"], 1))
    parts = []
    for kind in registry.KINDS:
        of_kind = [(number, row) for number, row in numbered if row["kind"] == kind]
        if of_kind:
            parts.append(f"<h3>{KINDS[kind]}</h3>")
        for group in dict.fromkeys(row["group"] for _, row in of_kind):
            parts.append(f"<h4>{escape(group)}</h4>")
            parts += map(_table, _alike([item for item in of_kind if item[1]["group"] == group]))
    return "\n".join(parts) or "<p>The report has no rows.</p>"


def _alike(rows):
    """Split into runs of rows with the same variants, so that a table has no empty columns; failed rows go along."""
    runs, names = [], None
    for number, row in rows:
        found = None if "error" in row else {*row["ratios"], *row["skipped"]}
        if not runs or None not in (found, names) and found != names:
            runs.append([])
            names = None
        names = names if found is None else found
        runs[-1].append((number, row))
    return runs


def _table(rows):
    timed = [row for _, row in rows if "error" not in row]
    names = list(dict.fromkeys(name for row in timed for name in (*row["ratios"], *row["skipped"])))
    names.sort(key=_rank)  # stable: within a rank as they come
    hot = any("hot" in row for row in timed)
    width = 6 + (1 + len(names)) * (2 if hot else 1)
    body = "\n".join(_row(number, row, names, hot, width) for number, row in rows)
    return (
        f'<div class="scroll"><table class="rows"><thead>{_head(names, hot)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{_notes(rows)}"
    )


def _rank(name):
    return [table.is_pytorch(name), table.is_compiled(name), table.is_peer(name), table.is_ours(name), True].index(True)


def _head(names: Sequence[str], hot: bool):
    fixed = ("throughput", "of ceiling", "error / allowed", "goals")
    if not hot:
        cells = ("#", "work", "ours", *names, *fixed)
        return "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in cells) + "</tr>"
    tall = lambda name: f'<th rowspan="2">{escape(name)}</th>'  # noqa: E731
    wide = "".join(f'<th colspan="2">{escape(name)}</th>' for name in ("ours", *names))
    first = tall("#") + tall("work") + wide + "".join(map(tall, fixed))
    return f"<tr>{first}</tr><tr>{'<th>cold</th><th>hot</th>' * (1 + len(names))}</tr>"


def _row(number, row, names, hot, width):
    head = f'<td class="number">{number}</td><td class="work">{_work(row)}</td>'
    if "error" in row:
        return f'<tr id="row-{number}" class="failed">{head}<td colspan="{width - 2}">{_error(row["error"])}</td></tr>'
    sides = [row, row.get("hot")] if hot else [row]
    cells = [_time(side, row) for side in sides]
    cells += [_ratio(name, side, row) for name in names for side in sides]
    cells += [_cell(table.rate(row), row.get("GB_per_s")), _share(row), _accuracy(row["accuracy"]), _goals(row)]
    lost = any(table.is_loss(e["ratio"]) for name, e in row["ratios"].items() if table.is_rival(name))
    css = ' class="lost"' if lost else ""
    return f'<tr id="row-{number}"{css}>{head}{"".join(cells)}</tr>'


def _work(row):
    shape = "×".join(map(str, row["shape"])) or "scalar"
    label = f"{escape(row['label'])}, " if row["label"] else ""
    return f"<b>{escape(row['name'])}</b> <small>{label}{shape}, {escape(row['dtype'])}</small>"


def _error(text):
    first, *rest = text.splitlines() or [""]
    more = "\n".join(rest)
    details = f"<details><summary>all of it</summary><pre>{escape(more)}</pre></details>" if more.strip() else ""
    return f'<b class="loss">failed</b> {escape(first)}{details}'


def _cell(text, value=None, *, css="", note="", title=""):
    """A cell: its figure, what sorts it, its interval or spread below."""
    attributes = f' class="{css}"' if css else ""
    attributes += f' data-value="{value:.6g}"' if value is not None else ""
    attributes += f' title="{escape(title)}"' if title else ""
    return f"<td{attributes}>{escape(text)}{f' <small>{escape(note)}</small>' if note else ''}</td>"


def _time(side, row):
    if side is None:
        return _cell("-")
    fused = side["variants"]["fused"]
    spread = f"{table.duration(fused['p20'])} – {table.duration(fused['p80'])}"
    wall = f", {table.duration(fused['wall'])} on the wall" if "wall" in fused else ""
    told = f"{fused['clock']}{wall}; least {table.duration(fused['min'])}; {row['samples']} samples; {_state(row)}"
    return _cell(table.duration(fused["median"]), fused["median"], note=spread, css="time", title=told)


def _state(row):
    """Load, clocks, power and temperature before and after the row."""
    told = []
    for state in row["state"]:
        facts = {"load": state["load"]} | {
            name: text for name, text in (state.get("gpu") or {}).items() if name != "name"
        }
        told.append(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    return " | ".join(told)


def _ratio(name, side, row):
    if name in row["skipped"]:
        return _cell("skipped", css="none", title=row["skipped"][name])
    if side is None or name not in side["ratios"]:
        return _cell("-", css="none")
    entry, timing = side["ratios"][name], side["variants"].get(name)
    value = entry["ratio"]
    css = "" if not table.is_rival(name) else "gain" if table.is_gain(value) else "loss" if table.is_loss(value) else ""
    title = f"{name}: {table.duration(timing['median'])}" if timing else ""
    if name in row["first_call"]:
        title += f"; its first call took {table.duration(row['first_call'][name])}"
    note = f"{table.times(entry['low'])} – {table.times(entry['high'])}"
    return _cell(f"{table.times(value)}×", value, css=css or "even", note=note, title=title)


def _share(row):
    if "ceiling" not in row:
        return _cell("-", css="none")
    percent, name = row["ceiling"]["percent"], row["ceiling"]["name"]
    bar = f'<i style="width:{min(percent, 100):.0f}%"></i>'
    return f'<td class="share" data-value="{percent:.6g}">{percent:.0f} % <small>{escape(name)}</small>{bar}</td>'


def _accuracy(found):
    if found is None:
        return _cell("checked", css="none", title="the check passed and records no error")
    return _cell(f"{found['error']:.2g}", found["error"], note=f"/ {found['allowed']:.2g}", title=found["of"])


def _goals(row):
    lines = [
        f'<span class="{"gain" if goal["reached"] else "loss"}">{"reached" if goal["reached"] else "missed"}</span> '
        f"<small>{escape(goal['goal'])}: {table.figure(goal['value'])}</small>"
        for goal in row["goals"]
    ]
    return f'<td class="goals">{"<br>".join(lines) or "-"}</td>'


def _notes(rows):
    """Which variants were skipped, and why, or timed in part: the same note once, with the rows that it holds for."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, row in rows:
        notes = [(name, f"skipped: {why}") for name, why in row.get("skipped", {}).items()]
        for note in [*notes, *table.extrapolated(row).items()]:
            found.setdefault(note, []).append(number)
    if not found:
        return ""
    lines = "".join(
        f"<li><b>{escape(name)}</b> {escape(note)} <small>(row {', '.join(map(str, numbers))})</small></li>"
        for (name, note), numbers in found.items()
    )
    return f'\n<ul class="notes">{lines}</ul>'
