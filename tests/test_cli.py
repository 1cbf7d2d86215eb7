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
    assert status == 0 and "sampler_step" in out and "runs on" in out
    status, out, _ = run("env", "--json", capsys=capsys)
    report = json.loads(out)
    attention = report["ops"]["attention"]["cpu"]
    assert attention["default"] == "cpu" and attention["unavailable"]["cuda"] == "attention has no cuda kernel"


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
    status, out, _ = run("verify", "--device", "cpu", capsys=capsys)
    assert status == 0 and "2 cuda kernels not available: it runs on cuda tensors, these are on cpu" in out


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


def test_no_samples_are_an_empty_archive(tmp_path, capsys):
    arguments = ("sample", "flow", "--num", "0", "--no-progress", "--device", "cpu", "--out")
    status, out, err = run(*arguments, str(tmp_path / "q.npz"), capsys=capsys)
    assert status == 0 and out.startswith("0 samples"), err
    with np.load(tmp_path / "q.npz") as stored:
        assert stored["arr_0"].shape == (0, 8, 8, 1) and stored["arr_0"].dtype == np.uint8
        assert stored["arr_1"].shape == (0,) and stored["arr_1"].dtype == np.int64
    status, _, err = run(*arguments, str(tmp_path / "q.png"), capsys=capsys)
    assert status == 2 and "there is nothing to draw with 0 images" in err
    with pytest.raises(ValueError, match="nothing to draw"):
        images.save(tmp_path / "q.png", np.zeros((0, 8, 8, 1), np.uint8))


def test_a_model_that_is_not_finite_writes_no_images(tmp_path, capsys):
    from genengine.models import FlowMatching

    flow = FlowMatching.pretrained()
    flow.net.final_layer.linear.bias.data.fill_(float("nan"))
    flow.save(tmp_path / "nan.safetensors")
    common = ("flow", "--checkpoint", str(tmp_path / "nan.safetensors"), "--steps", "1", "--device", "cpu")
    picture = tmp_path / "x.png"
    for arguments in (("sample", *common, "--num", "2", "--out", str(picture)), ("evaluate", *common, "--seeds", "2")):
        status, out, err = run(*arguments, capsys=capsys)
        assert status == 2 and out == "" and "model output of row 0 of 2" in err and "not finite" in err
    assert not picture.exists()


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_a_full_disk_is_one_line_and_leaves_nothing(name, tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "replace", full_disk)
    status, _, err = run(
        "sample", "flow", "--num", "1", "--steps", "1", "--no-progress", "--device", "cpu", "--out",
        str(tmp_path / name), capsys=capsys,
    )  # fmt: skip
    assert status == 2 and err == "genengine sample: [Errno 28] No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_a_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    common = ("flow", "--no-progress", "--device", "cpu", "--out")
    for command, out in (("sample", "file/x.npz"), ("train", "file/run"), ("train", "file")):
        status, _, err = run(command, *common, str(tmp_path / out), capsys=capsys)
        assert status == 2 and err.startswith(f"genengine {command}: [Errno ") and err.count("\n") == 1


def test_split_chooses_the_training_images_and_what_they_are_measured_against(tmp_path, monkeypatch, capsys):
    from genengine import data, evaluate
    from genengine.models import checkpoint

    common = ("flow", "--device", "cpu")
    for split in ("train", "train_fit", None):
        folder, option = tmp_path / str(split), () if split is None else ("--split", split)
        status, _, err = run(
            "train", *common, "--steps", "1", "--batch-size", "2", "--no-progress", *option, "--out", str(folder),
            capsys=capsys,
        )  # fmt: skip
        assert status == 0, err
        _, config = checkpoint.read(folder / "model.safetensors")
        assert config["extra"]["train"]["split"] == (split or "train")
    seen = {}
    monkeypatch.setattr(
        evaluate, "evaluate_model", lambda model, seen_, unseen, **options: seen.update(sets=(seen_, unseen)) or {}
    )
    for split, held_out in (("train", "test"), ("train_fit", "validation")):
        status, _, err = run("evaluate", *common, "--split", split, "--json", capsys=capsys)
        assert status == 0, err
        for part, name in zip(seen["sets"], (split, held_out), strict=True):
            assert np.array_equal(part.labels, data.digits(name)[1])  # in their own order, as recorded
            assert np.array_equal(part.images, data.digits(name)[0])


def test_the_recorded_command_is_one_that_the_parser_knows():
    from pathlib import Path

    folder = Path(cli.__file__).parent / "pretrained"
    command = json.loads((folder / "flow_digits.json").read_text(encoding="utf-8"))["command"]
    options = cli._parser().parse_args(command.split()[1:])
    assert options.threads == 1  # the bits depend on it
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(f"`{command}`" in line for line in lines)
    commands = [line.split()[1:] for line in lines if line.startswith("    genengine ")]
    assert [cli._parser().parse_args(command).split for command in commands] == ["train", "train_fit", "train_fit"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "flow", "--out", "x.gif"), "--out must end in .png or .npz, got 'x.gif'"),
        (("sample", "flow", "--out", "x.npz", "--num", "-1"), "--num must be at least 0, got -1"),
        (("sample", "flow", "--out", "x.npz", "--checkpoint", "absent.safetensors"), "absent.safetensors"),
        (("bench", "nothing"), "expected one of quick, all"),
        (("train", "flow", "--preset", "huge"), "name must be one of digits, smoke"),
        (("sample", "flow", "--out", "x.npz", "--device", "cuda:9"), "cuda:9"),
        (("sample", "flow", "--out", "x.npz", "--labels", "12"), "labels must be in 0 .. 9, got 12"),
        (("sample", "flow", "--out", "x.npz", "--num", "1", "--labels", "8-99999999999"), "0 .. 9, got 99999999999"),
        (("sample", "flow", "--out", "x.npz", "--seed", "-1"), "--seed must be in [0, 2^64), got -1"),
        (("train", "flow", "--seed", str(2**64)), "--seed must be in [0, 2^64), got 18446744073709551616"),
        (("demo", "--seed", "-3"), "--seed must be in [0, 2^64), got -3"),
        (("bench", "diffuse", "--budget", "0"), "budget must be a finite number of seconds > 0, got 0"),
        (("bench", "diffuse", "--budget", "-1"), "budget must be a finite number of seconds > 0, got -1"),
        (("bench", "diffuse", "--budget", "nan"), "budget must be a finite number of seconds > 0, got nan"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    from genengine.benchmarks import suite

    monkeypatch.setattr(suite, "restart_with_malloc_settings", lambda: None)
    status, out, err = run(*arguments, capsys=capsys)
    assert status == 2 and message in err and "Traceback" not in err
    assert err.startswith(f"genengine {arguments[0]}: ") and err.count("\n") == 1 and out == ""


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
