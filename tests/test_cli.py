"""The commands as a user types them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from genengine import cli, images

COMMANDS = ("env", "verify", "demo", "train", "sample", "evaluate", "bench")


def run(*arguments, capsys):
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"Example: genengine {command}" in text


def test_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "genengine", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("genengine 0.")


def test_env(capsys):
    status, out, _ = run("env", capsys=capsys)
    assert status == 0 and "sampler_step_out" in out and "runs on" in out
    status, out, _ = run("env", "--json", capsys=capsys)
    report = json.loads(out)
    assert report["ops"]["attention"]["cpu"] == {
        "default": "reference",
        "unavailable": {b: f"attention has no {b} kernel" for b in ("cpu", "triton", "cuda")},
    }


def test_verify_writes_verdicts(tmp_path, monkeypatch, capsys):
    from genengine.ops import _registry, _verify

    monkeypatch.setenv("GENENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(_verify, "_verdicts", None)
    few = {name: op for name, op in _registry.OPS.items() if name in ("advance", "diffuse")}
    monkeypatch.setattr(_registry, "OPS", few)
    status, out, _ = run("verify", "--device", "cpu", "--json", capsys=capsys)
    assert status == 0 and {row["op"] for row in json.loads(out)} == {"advance", "diffuse"}
    assert all(row["verdict"] in ("right", "not available") for row in json.loads(out))
    assert (tmp_path / "verified.json").exists()


@pytest.mark.parametrize(("text", "labels"), [("7", [7]), ("0-3", [0, 1, 2, 3]), ("1,3,5-6", [1, 3, 5, 6])])
def test_labels(text, labels):
    assert cli.parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,,2"])
def test_bad_labels(text):
    with pytest.raises(ValueError, match="--labels"):
        cli.parse_labels(text)


def test_train_then_sample(tmp_path, capsys):
    folder = tmp_path / "run"
    status, out, err = run(
        "train", "flow", "--preset", "smoke", "--steps", "3", "--out", str(folder), "--no-progress", "--device", "cpu",
        capsys=capsys,
    )  # fmt: skip
    assert status == 0 and str(folder / "model.safetensors") in out
    archive = tmp_path / "samples.npz"
    arguments = ("sample", "flow", "--checkpoint", str(folder / "model.safetensors"), "--num", "5", "--labels", "3,1",
                 "--steps", "2", "--guidance", "2", "--seed", "4", "--no-progress", "--device", "cpu")  # fmt: skip
    status, out, err = run(*arguments, "--out", str(archive), capsys=capsys)
    assert status == 0, err
    with np.load(archive) as stored:
        assert stored["arr_0"].shape == (5, 8, 8, 1) and stored["arr_0"].dtype == np.uint8
        assert stored["arr_1"].tolist() == [3, 1, 3, 1, 3]
    status, _, _ = run(*arguments, "--out", str(tmp_path / "grid.png"), capsys=capsys)
    assert status == 0 and (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "flow", "--out", "x.gif"), "--out must end in .png or .npz, got 'x.gif'"),
        (("sample", "flow", "--out", "x.npz", "--num", "-1"), "--num must be at least 0, got -1"),
        (("sample", "flow", "--out", "x.npz", "--checkpoint", "absent.safetensors"), "absent.safetensors"),
        (("bench", "nothing"), "expected one of quick, all"),
        (("train", "flow", "--preset", "huge"), "name must be one of digits, smoke"),
        (("sample", "flow", "--out", "x.npz", "--device", "cuda:9"), "cuda:9"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    from genengine.benchmarks import suite

    monkeypatch.setattr(suite, "restart_with_malloc_settings", lambda: None)
    status, _, err = run(*arguments, capsys=capsys)
    assert status == 2 and message in err and "Traceback" not in err
    assert err.startswith(f"genengine {arguments[0]}: ")


def test_bench_list_and_json(capsys, monkeypatch):
    from genengine.benchmarks import suite

    monkeypatch.setattr(suite, "restart_with_malloc_settings", lambda: None)
    status, out, _ = run("bench", "--list", capsys=capsys)
    assert status == 0 and {"quick", "all", "normal", "sampler_step"} <= set(out.split())
    status, out, _ = run("bench", "diffuse", "--budget", "0.02", "--device", "cpu", "--json", capsys=capsys)
    report = json.loads(out)
    assert status == 0 and report["rows"][0]["name"] == "diffuse" and "error" not in report["rows"][0]
    assert report["environment"]["torch"] and report["rows"][0]["ratios"]["eager, as written"]["ratio"] > 0


def test_grid_layout():
    tiles = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * np.ones((3, 2, 2, 1), dtype=np.uint8)
    picture = images.grid(tiles, columns=2, scale=3, gap=1)
    assert picture.shape == (2 * 7 + 1, 2 * 7 + 1, 1)
    assert picture[1, 1, 0] == 0 and picture[1, 8, 0] == 1 and picture[8, 1, 0] == 2 and picture[8, 8, 0] == 32
