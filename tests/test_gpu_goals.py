"""The page of the GPU path's goals: every figure read from the rows that time it, absent ones said to be so."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from genengine.benchmarks import registry, suite

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_goals", ROOT / "tools" / "gpu_goals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(
    name, label="", dtype="bfloat16", group="attention", kind="ops", percent=95.0, rate=650.0, nbytes=1 << 30, **ratios
):
    named = {key.replace("_", " "): {"ratio": value} for key, value in ratios.items()}
    return {
        "name": name, "label": label, "dtype": dtype, "group": group, "kind": kind, "shape": [1], "ratios": named,
        "ceiling": {"percent": percent}, "TFLOP_per_s": rate, "cost": {"bytes": nbytes}, "sets": 3,
    }  # fmt: skip


def line(tool, work, *rows, device=None):
    report = {"environment": {"device": device or tool.DEVICE}, "rows": list(rows)}
    (found,) = [text for text in tool.page([report], []).splitlines() if text.startswith(f"| {work} |")]
    return found


def test_without_results_nothing_is_measured(tool):
    text = tool.page([], [])
    figures = sum(len(goal.figures) for goal in tool.GOALS) + len(tool.TESTS)
    assert text.count(tool.NOT_MEASURED) == figures and "missed" not in text


def test_the_strongest_baseline_counts_and_what_is_short_is_marked(tool):
    timed = row("attention", "hd 128, 16k", rate=600.0)
    timed["ratios"] = {"torch, flash_attention": {"ratio": 1.7}, "torch, cudnn_attention": {"ratio": 1.02}}
    text = line(tool, "attention, head dim 128, 16k", timed)
    assert ">= 1x: 1.02x;" in text and ">= 640 TFLOP/s: 600 TFLOP/s **missed**" in text
    assert tool.NOT_MEASURED in line(tool, "attention, head dim 128, 16k", timed, device="another GPU")
    assert tool.NOT_MEASURED in line(tool, "attention, head dim 128, 16k", timed | {"error": "broke"})


def test_the_worst_memory_bound_row_counts(tool):
    rows = [
        row("adaln", group="adaln", percent=96.0, **{"torch.compile": 1.3}),
        row("normal", group="normal", percent=93.0, **{"torch.compile": 1.05}),
        row("diffuse", group="diffuse", percent=20.0, nbytes=1 << 20),  # in the cache
        row("attention", percent=50.0),  # bound by products
        row("adaln_backward", group="adaln", percent=81.0),
    ]
    text = line(tool, "memory-bound ops, 64 MB and more, from memory: the worst", *rows)
    assert ">= 92 %: 93 %" in text and ">= 1.1x: 1.05x **missed**" in text
    assert ">= 80 %: 81 %" in line(tool, "their backward passes: the worst", *rows)


def test_every_goal_names_rows_that_exist(tool):
    """A label that no benchmark has would never be measured."""
    registry.load_ours()
    known = {
        (entry.name, case.label, str(case.dtype).removeprefix("torch."))
        for entry in registry.ENTRIES.values()
        for case in entry.cases("cuda")
    }
    rows = [
        row(*key) | {"group": registry.ENTRIES[key[0]].group, "kind": registry.ENTRIES[key[0]].kind} for key in known
    ]
    baselines = [*tool.TORCHS, tool.GRAPHED, "eager", "torch.compile"]
    for each in rows:
        each["ratios"] = {name: {"ratio": 2.0} for name in baselines}
    text = tool.page([{"environment": {"device": tool.DEVICE}, "rows": rows}], [])
    assert text.count(tool.NOT_MEASURED) == len(tool.TESTS)


def test_the_commands_time_every_goal(tool):
    """Of the rows that they choose, every figure can be read."""
    rows, baselines = [], (*tool.TORCHS, tool.GRAPHED, "eager", "torch.compile")
    for what, text in tool.commands().items():
        words = shlex.split(text)
        assert words[:3] == ["genengine", "bench", what]
        labels = tuple(word for flag, word in zip(words, words[1:], strict=False) if flag == "--label")
        options = suite.Options(labels=labels, dtypes=tuple(words[words.index("--dtype") + 1].split(",")))
        for entry, case in suite.cases(what, "cuda", options):
            rows.append(row(entry.name, case.label, str(case.dtype).removeprefix("torch."), entry.group, entry.kind))
            rows[-1]["ratios"] = {name: {"ratio": 2.0} for name in baselines}
    text = tool.page([{"environment": {"device": tool.DEVICE}, "rows": rows}], [])
    assert text.count(tool.NOT_MEASURED) == len(tool.TESTS)


def test_the_committed_page_says_what_the_committed_results_say(tool):
    assert tool.main(["--check"]) == 0


def test_it_writes_what_files_say(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "PAGE", tmp_path / "goals.md")
    report = {"environment": {"device": tool.DEVICE}, "rows": [row("attention", "hd 64, 512", rate=340.0)]}
    (tmp_path / "a.json").write_text(json.dumps(report))
    assert tool.main([str(tmp_path / "a.json")]) == 0 and "not measured" in capsys.readouterr().out
    assert ">= 335 TFLOP/s: 340 TFLOP/s" in (tmp_path / "goals.md").read_text()
