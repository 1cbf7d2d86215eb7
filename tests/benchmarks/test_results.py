"""Result files: whole or absent, validated, versioned."""

import json

import pytest
from bench_support import report, row

from genengine.benchmarks import results, table


def test_a_report_survives_a_file_and_is_named_after_device_date_commit_suite(tmp_path):
    made = report(row())
    path = results.save(made, results.path_of(made, tmp_path))
    assert path == tmp_path / "made-up-cpu" / "2026-01-02-0123456789ab-quick.json" and results.load(path) == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing partial is left


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"rows": [row(samples=0)]}, "rows[0]"),
        ({"rows": [{"name": "adaln"}]}, "rows[0]"),
        ({"environment": {}}, "environment"),
        ({"extra": 1}, "$"),
        ({"ceilings": {"device": "cpu"}}, "ceilings"),
    ],
)
def test_a_malformed_report_is_refused_with_the_place(change, place, tmp_path):
    with pytest.raises(ValueError, match="malformed at") as error:
        results.save(report(row(), **change), tmp_path / "x.json")
    assert place in str(error.value) and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not a result file"), ('{"schema_version": 1}', "schema version 1")]
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        results.load(path)


def test_without_jsonschema_it_says_so_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    monkeypatch.setattr(results, "_told", [])
    for name in "ab":
        results.save(report(row()), tmp_path / f"{name}.json")
    assert capsys.readouterr().err.count("not validated") == 1 and json.loads((tmp_path / "b.json").read_text())


def test_reports_of_one_device_and_commit_are_shown_together():
    first, second = (
        report(row("adaln"), row("glu", ratio=2.0), suite="adaln"),
        report(row("glu", ratio=4.0), suite="glu"),
    )
    both = results.merged([first, second])
    assert [(r["name"], r["ratios"]["eager"]["ratio"]) for r in both["rows"]] == [("adaln", 3.0), ("glu", 4.0)]
    assert table.command(both) == "genengine bench adaln --device cpu; genengine bench glu --device cpu"
    results.validate(both)
    assert results.merged([first]) == first
    elsewhere = report(row(), environment=first["environment"] | {"device": "another"})
    with pytest.raises(ValueError, match="another at 0123456789ab; made-up CPU at 0123456789ab"):
        results.merged([first, elsewhere])
