"""Suites and the command line: selection, options, errors, exit statuses."""

import json

import pytest
import torch
from bench_support import CEILINGS

from genengine import cli
from genengine.benchmarks import ceilings, machine, registry, results, suite
from genengine.benchmarks.registry import Benchmark, register, register_baseline, register_shapes


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(machine, "restart_with_malloc_settings", lambda: None)


@pytest.fixture
def mine(registered):
    """Two registered benchmarks: one that works, one that raises."""

    @register(
        "mine", shapes={"A": (2, 8), "B": (4, 8)}, dtypes=("float32", "bfloat16"), axes={"batch": 0}, group="my op"
    )
    def mine(case):
        x = case.randn()
        return Benchmark({"fused": lambda: x + 1, "eager": lambda: x + 1}, lambda: None, inputs=(x,))

    @register("mine, broken", shapes={"A": (2, 8)}, group="my op")
    def broken(case):
        raise RuntimeError("out of order")

    return registry


def run(*words, capsys):
    status = cli.main(["bench", *words, "--device", "cpu", "--budget", "0.01", "--compile", "none"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_suite_is_what_it_says(mine):
    kinds = {kind: registry.select(kind) for kind in registry.KINDS}
    assert all(entries and {e.kind for e in entries} == {kind} for kind, entries in kinds.items())
    assert sum(map(len, kinds.values())) == len(registry.select("all")) == len(registry.ENTRIES)
    assert {e.name for e in registry.select("my op")} == {"mine", "mine, broken"}
    assert [e.name for e in registry.select("mine")] == ["mine"] and registry.select("gate")


def test_every_op_and_every_family_has_benchmarks():
    from genengine.models import FAMILIES

    groups = registry.groups()
    assert set(FAMILIES) <= set(groups)
    assert {e.kind for family in FAMILIES for e in groups[family]} == {"models"}


def test_cases_follow_the_options(mine):
    def labels(**options):
        return [(case.label, str(case.dtype)[6:]) for _, case in suite.cases("mine", "cpu", suite.Options(**options))]

    assert labels() == [("A", "float32"), ("A", "bfloat16"), ("B", "float32"), ("B", "bfloat16")]
    assert labels(first=True) == [("A", "float32"), ("A", "bfloat16")]
    assert labels(labels=("B", "C")) == [("B", "float32"), ("B", "bfloat16")]
    with pytest.raises(ValueError, match="nothing of 'mine' fits the options; .* its labels those of .* mine --list"):
        labels(labels=("C",))
    assert labels(dtypes=("bfloat16",)) == [("A", "bfloat16"), ("B", "bfloat16")]
    assert labels(shape=(3, 3), dtypes=("float32",)) == [("", "float32")]
    assert [label for label, _ in labels(sweep="batch", dtypes=("float32",))] == [
        "batch 1",
        "batch 2",
        "batch 4",
        "batch 8",
    ]
    quick = [case for e, case in suite.cases("quick", "cpu", suite.Options()) if e.name == "mine"]
    assert [(case.label, case.dtype) for case in quick] == [("A", torch.float32)]


def test_a_sweep_takes_the_sizes_that_its_benchmark_names(registered):
    make = lambda case: Benchmark({"fused": lambda: None}, lambda: None)  # noqa: E731
    register("mine", shapes={"A": (2, 8)}, axes={"batch": 0, "size": 1}, sizes={"size": (3, 9)})(make)
    labels = {
        axis: [case.label for _, case in suite.cases("mine", "cpu", suite.Options(sweep=axis))]
        for axis in ("batch", "size")
    }
    assert labels == {"batch": ["batch 1", "batch 2", "batch 4", "batch 8"], "size": ["size 3", "size 9"]}
    with pytest.raises(ValueError, match="none of its axes"):
        register("other", shapes={"A": (2, 8)}, axes={"batch": 0}, sizes={"depth": (3, 9)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "expected a suite"),
        (["mine", "--shape", "4,x"], "--shape must be integers"),
        (["mine", "--shape", "4,8,2"], "has 3 dimensions, but 'mine' takes shapes like (2, 8) (mine)"),
        (["mine", "--dtype", "float99"], "dtype must be a name of torch's"),
        (["mine", "--dtype", "float64"], "its dtypes are bfloat16, float32"),
        (["mine", "--sweep", "depth"], "its axes to sweep batch"),
        (["mine", "--load", "nowhere.py"], "--load expects a Python file"),
        (["mine", "--compare", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_timed(mine, words, message, capsys):
    status, out, err = run(*words, capsys=capsys)
    assert status == 2 and message in err and err.count("\n") == 1 and not out


def test_a_failing_row_does_not_stop_the_rest_and_fails_only_where_asked(mine, capsys):
    status, out, _ = run("my op", capsys=capsys)
    assert status == 0 and "failed: RuntimeError: out of order" in out and "4 rows timed, 1 failed" in out
    assert run("my op", "--strict", capsys=capsys)[0] == 1


def test_results_are_saved_as_they_come_and_compared(mine, tmp_path, capsys):
    status, out, err = run("mine", "--save", str(tmp_path), "--markdown", str(tmp_path / "t.md"), capsys=capsys)
    (path,) = tmp_path.glob("*/*.json")
    report = results.load(path)
    assert status == 0 and len(report["rows"]) == 4 and str(path) in err
    assert (tmp_path / "t.md").read_text().count("\n") == 2 + 4
    status, out, _ = run("mine", "--compare", str(path), "--threshold", "0.95", capsys=capsys)
    assert status == 0 and "compare: 4 ratios to eager compared, 95% allowed" in out
    for row in report["rows"]:
        row["ratios"]["eager"] = {"ratio": 100.0, "low": 99.0, "high": 101.0}
    results.save(report, path)
    status, out, _ = run("mine", "--compare", str(path), capsys=capsys)
    assert status == 1 and "compare: FAILED" in out
    kept = []
    suite.run("my op", "cpu", suite.Options(0.01, compile_modes=()), keep=lambda r: kept.append(len(r["rows"])))
    assert kept == [1, 2, 3, 4, 5]


def test_json_is_the_report_alone(mine, capsys):
    _, out, _ = run("mine", "--json", capsys=capsys)
    results.validate(json.loads(out))


def test_a_file_that_registers_is_loaded_and_one_that_fails_names_the_line(registered, tmp_path, capsys):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(
        "from genengine.benchmarks import Benchmark, register\n"
        "@register('theirs', shapes={'A': (2,)})\n"
        "def theirs(case):\n"
        "    return Benchmark({'fused': lambda: None}, lambda: None)\n"
    )
    bad.write_text("\nimport no_such_thing\n")
    assert "1 rows timed" in run("theirs", "--load", str(good), capsys=capsys)[1]
    assert "bad.py, line 2: ModuleNotFoundError" in run("quick", "--load", str(bad), capsys=capsys)[2]


def test_registering_nonsense_is_refused(mine):
    with pytest.raises(ValueError, match="registered already"):
        register("mine", shapes={"A": (1,)})(lambda case: None)
    with pytest.raises(ValueError, match="needs at least one shape"):
        register("new", shapes={})
    with pytest.raises(ValueError, match="kind must be one of"):
        register("new", shapes={"A": (1,)}, kind="fast")
    with pytest.raises(ValueError, match="has no dtype 'half precision'"):
        register("new", shapes={"A": (1,)}, dtypes=("half precision",))
    with pytest.raises(ValueError, match="quick labels"):
        register("new", shapes={"A": (1,)}, quick=("B",))
    with pytest.raises(ValueError, match="there is no benchmark 'new'"):
        register_baseline("new", "peer")(lambda x: x)
    with pytest.raises(ValueError, match="takes 2 dimensions"):
        register_shapes("mine", {"C": (1, 2, 3)})


def test_the_list_names_shapes_dtypes_and_axes(mine, capsys):
    _, out, _ = run("my op", "--list", capsys=capsys)
    assert out == (
        "my op  (ops)\n    mine: A 2x8; B 4x8; float32, bfloat16; axes batch\n    mine, broken: A 2x8; float32\n"
    )


def test_an_interrupted_run_goes_on_where_it_stopped(mine, tmp_path, capsys):
    calls = []

    @register("counting", shapes={"A": (2,), "B": (3,)})
    def counting(case):
        calls.append(case.label)
        if case.label == "B" and len(calls) < 5:
            raise RuntimeError("not yet")
        return Benchmark({"fused": lambda: None}, lambda: None)

    run("counting", "--save", str(tmp_path), capsys=capsys)
    before = len(calls)
    _, out, _ = run("counting", "--save", str(tmp_path), "--resume", capsys=capsys)
    assert set(calls[before:]) == {"B"} and "2 rows timed, 0 failed" in out
    assert "--resume needs --save" in run("counting", "--resume", capsys=capsys)[2]


def test_other_options_go_to_another_file(mine, tmp_path, capsys):
    for words in ([], ["--shape", "3,3"], ["--dtype", "bfloat16"], ["--sweep", "batch"]):
        run("mine", *words, "--save", str(tmp_path), capsys=capsys)
    names = sorted(path.stem.partition("-mine")[2] for path in tmp_path.glob("*/*.json"))
    assert names == ["", "-3x3", "-bfloat16", "-by_batch"]


def test_threads_are_as_they_were(mine):
    torch.set_num_threads(2)
    try:
        suite.run("mine", "cpu", suite.Options(0.01, compile_modes=()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_one_benchmark_of_an_op_of_the_same_name_can_be_chosen():
    assert [entry.name for entry in registry.select("adaln/adaln")] == ["adaln"] and len(registry.select("adaln")) == 4
