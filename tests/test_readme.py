"""README's figures are what its result files say, and the tool that writes them notices when they are not."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import report_support as made

from genengine.benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "readme_figures.py"
CPU, GPU = "results/a-cpu/2026-01-02-0123456789ab.json", "results/nvidia-h/2026-01-02-0123456789ab.json"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_figures_are_what_the_results_say():
    done = run("--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tool():
    import importlib.util

    spec = importlib.util.spec_from_file_location("readme_figures", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_ops_shows_benchmarks_that_there_are(tool):
    from genengine.benchmarks import registry

    names = {entry.name for entry in registry.select("ops")}
    assert [name for *_, wanted in tool.OPS for name in wanted if name not in names] == []


def op_rows(tool, ratio=3.0):
    """A row for each of those that the table of ops shows."""
    names = [name for *_, names in tool.OPS for name in names]
    others = {"eager, as written": 2 * ratio, "eager, in place": ratio, "torch.compile": 1.25, "copy_": 0.5}
    return [made.row(name, others=others, **made.costly()) for name in names]


def model_row(**changes):
    return made.row("DiT, training step", kind="models", group="flow", label="4 images", **changes)


@pytest.fixture
def readme(tool, tmp_path):
    """A README with a table of every kind, and the results that it names."""
    rows = [*op_rows(tool), model_row(others={"eager": 0.85, "torch.compile": 1.5})]
    results.save(made.report(rows, suite="all"), tmp_path / CPU)
    cuda = {"device": "NVIDIA H", "cuda": "13.0", "gpu": None}
    results.save(
        made.report([model_row(device="cuda")], suite="models", environment=cuda, device="cuda"), tmp_path / GPU
    )
    path = tmp_path / "README.md"
    path.write_text(
        f"# A library\n\n<!-- ops: {CPU} -->\n<!-- /ops -->\n\nOn CPU:\n\n<!-- figures models: {CPU} -->\n"
        f"<!-- /figures models -->\n\nOn GPU:\n\n<!-- figures models: {GPU} -->\n<!-- /figures models -->\n\nThe end.\n"
    )
    return path


def test_tables_are_written_and_then_agree(tool, readme):
    with pytest.raises(SystemExit, match=re.escape(f"<!-- ops: {CPU} -->, <!-- figures models: {CPU} -->, <!-- fig")):
        tool.main(["--check", "--readme", str(readme)])
    tool.main(["--readme", str(readme)])
    text = readme.read_text()
    assert "| `adaln` | LayerNorm, then modulation | CPU, Triton, CUDA | both | 2; backward 3 | 3.00 / 3.00 |" in text
    assert text.count("| DiT, training step | 4 images (16x256x1152), float32 | 2 ms |") == 2
    assert "eager **0.85**, torch.compile 1.50" in text
    assert "`genengine bench all --device cpu`, one thread of A CPU (CPU), torch 2.13.0, commit 0123456789ab" in text
    assert "`genengine bench models --device cuda`, NVIDIA H, torch 2.13.0" in text and f"]({GPU})." in text
    assert text.startswith("# A library\n\n<!-- ops:") and text.endswith("<!-- /figures models -->\n\nThe end.\n")
    tool.main(["--check", "--readme", str(readme)])
    tool.main(["--readme", str(readme)])
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("figure", "forged", "marker"),
    [("| 3.00 / 3.00 |", "| 9.00 / 3.00 |", f"ops: {CPU}"), ("**0.85**", "0.95", f"figures models: {CPU}"),
     ("NVIDIA H,", "NVIDIA I,", f"figures models: {GPU}")],
)  # fmt: skip
def test_an_edited_figure_fails_and_its_marker_is_named(tool, readme, figure, forged, marker):
    tool.main(["--readme", str(readme)])
    edited = readme.read_text().replace(figure, forged, 1)
    readme.write_text(edited)
    with pytest.raises(SystemExit, match=re.escape(f"README.md is not what the results say at <!-- {marker} -->;")):
        tool.main(["--check", "--readme", str(readme)])
    assert readme.read_text() == edited


def test_a_new_result_takes_the_place_of_what_fits(tool, readme):
    new = "results/a-cpu/2026-02-03-ba9876543210-models.json"
    slower = model_row(seconds=7e-3)
    results.save(made.report([slower], suite="models"), readme.parent / new)
    tool.main([str(readme.parent / new), "--readme", str(readme)])
    text = readme.read_text()
    assert f"<!-- figures models: {new} -->" in text and f"<!-- ops: {CPU} -->" in text
    assert f"<!-- figures models: {GPU} -->" in text and text.count("| 7 ms |") == 1
    both = "results/a-cpu/2026-03-04-aaaaaaaaaaaa.json"
    results.save(made.report([*op_rows(tool, 5.0), slower], suite="all"), readme.parent / both)
    tool.main([str(readme.parent / both), "--readme", str(readme)])
    text = readme.read_text()
    assert f"<!-- figures models: {both} -->" in text and f"<!-- ops: {both} -->" in text and "| 5.00 / 5.00 |" in text
    assert new not in text and CPU not in text and GPU in text
    quick = readme.parent / "results/a-cpu/2026-03-04-aaaaaaaaaaaa-quick.json"
    results.save(made.report([slower], suite="quick"), quick)
    with pytest.raises(SystemExit, match="no marker fits .* of the suite 'quick'"):
        tool.main([str(quick), "--readme", str(readme)])


def test_what_cannot_be_shown_is_named(tool, readme, tmp_path):
    whole = readme.read_text()
    (tmp_path / GPU).write_text('{"schema_version": 1, "rows": []}')
    results.save(made.report([model_row()], suite="models"), tmp_path / CPU)
    with pytest.raises(SystemExit) as stop:
        tool.main(["--readme", str(readme)])
    told = str(stop.value)
    assert f"<!-- figures models: {GPU} -->: bench: " in told and "schema version 1" in told
    assert f"<!-- ops: {CPU} -->: `normal`, `uniform` has no row 'normal'" in told
    assert readme.read_text() == whole
    (tmp_path / CPU).unlink()
    with pytest.raises(SystemExit, match="No such file"):
        tool.main(["--check", "--readme", str(readme)])
    for text, message in (
        ("nothing", "there is no marker"),
        (whole.replace("<!-- /ops -->\n", ""), "has no <!-- /ops --> behind it"),
    ):
        readme.write_text(text)
        with pytest.raises(SystemExit, match=re.escape(message)):
            tool.main(["--check", "--readme", str(readme)])


def test_a_suite_without_rows_of_a_kind_is_no_empty_table(tool, readme, tmp_path):
    results.save(made.report([made.row()], suite="ops"), tmp_path / GPU)
    with pytest.raises(SystemExit, match="has no rows of models; it is of the suite 'ops'"):
        tool.main(["--check", "--readme", str(readme)])


def test_a_failed_row_is_said_to_have_failed(tool):
    rows = [made.failed("normal", "ValueError: no"), made.row("uniform")]
    assert tool.op_line(rows, "`normal`", "noise", "CPU", "forward", "1", ("normal",)).endswith("| failed | failed |")


def test_a_result_of_one_group_takes_the_place_of_its_own_kind_alone():
    takes = runpy.run_path(str(TOOL))["takes"]
    assert takes("figures models", "models", "models") and takes("figures models", None, "all")
    assert takes("figures models", "pixelcnn", "pixelcnn")
    assert not takes("figures models", "pixelcnn", "models") and not takes("figures models", "models", "pixelcnn")
