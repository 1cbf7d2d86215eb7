"""The commands as a user types them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from genengine import cli, demo, images
from genengine.arguments import parse_labels, settings

COMMANDS = ("env", "verify", "demo", "train", "sample", "evaluate", "gallery", "bench", "report", "profile", "trace")


def run(*words, capsys):
    status = cli.main(list(words))
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
    op = report["ops"]["pixelcnn_sample"]["cpu"]
    assert op["default"] == "cpu" and op["unavailable"]["triton"] == "pixelcnn_sample has no triton kernel"


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
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,,2"])
def test_bad_labels(text):
    with pytest.raises(ValueError, match="--labels"):
        parse_labels(text)


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


def test_the_recorded_commands_are_ones_that_the_parser_knows():
    from pathlib import Path

    from genengine.models import FAMILIES

    folder = Path(cli.__file__).parents[1] / "pretrained"
    page = (folder / "README.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        command = json.loads((folder / f"{family}_digits.json").read_text(encoding="utf-8"))["command"]
        options = cli._parser().parse_args(command.split()[1:])
        assert options.family == family and options.threads == 1  # the bits depend on it
        assert f"    {command}\n" in page
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    genengine ")]
    assert [cli._parser().parse_args(command).split for command in commands[:3]] == ["train", "train_fit", "train_fit"]


def test_the_pages_say_what_the_records_say():
    from pathlib import Path

    tool = Path(__file__).resolve().parents[1] / "tools" / "readme_models.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_any_setting_from_the_command_line(tmp_path, capsys):
    from genengine.models import checkpoint

    assert settings(["a.b=1", "a.c=x", "d=[1, 2]"]) == {"a": {"b": 1, "c": "x"}, "d": [1, 2]}
    for text in ("a", "=1", "a..b=1"):
        with pytest.raises(ValueError, match="--set must look like NAME=VALUE"):
            settings([text])
    with pytest.raises(ValueError, match="must not be inside another"):
        settings(["a=1", "a.b=2"])
    status, _, err = run(
        "train", "flow", "--preset", "smoke", "--set", "model.net.dim=32", "--set", "ema_decay=0.5", "--steps", "2",
        "--data", "shapes-8", "--no-progress", "--device", "cpu", "--out", str(tmp_path), capsys=capsys,
    )  # fmt: skip
    assert status == 0, err
    _, config = checkpoint.read(tmp_path / "model.safetensors")
    assert config["net"]["dim"] == 32 and config["net"]["in_channels"] == 3 and config["num_levels"] == 256
    assert config["extra"]["train"]["ema_decay"] == 0.5 and config["extra"]["train"]["dataset"] == "shapes-8"
    status, _, err = run("train", "flow", "--set", "lrr=1", "--out", str(tmp_path / "x"), capsys=capsys)
    assert status == 2 and "fields must be among" in err and "got lrr" in err


def test_a_mistake_names_what_would_be_right(tmp_path, capsys):
    out = ("--out", str(tmp_path / "x.png"))
    for arguments, message in (
        (("sample", "gun", *out), "family must be one of ddpm, flow"),
        (("sample", "flow", "--temperature", "1", *out), "--temperature is no option of flow, which has --steps"),
        (("sample", "flow", "--solver", "rk45", *out), "--solver must be one of euler, heun, got 'rk45'"),
        (("sample", "flow", "--checkpoint", "faces", *out), "name must be one of digits, got 'faces'"),
        (("sample", "flow", "--labels", "0-12", *out), "labels must be in 0 .. 9, got 12"),
        (("sample", "flow", "--checkpoint", "runs/no.safetensors", *out), "must be an existing file, got runs/no.safe"),
        (("sample", "flow", "--checkpoint", str(tmp_path), *out), f"{tmp_path} must hold model.safetensors"),
        (("train", "flow", "--preset", "large"), "name must be one of digits, images, smoke"),
        (("train", "flow", "--set", "lr_scales=3"), "lr_scales must be a dict of finite numbers"),
        (("train", "flow", "--data", "cifar"), "data must be digits, shapes-N, textures-N"),
        (("evaluate", "flow", "--density", str(tmp_path)), "must hold images"),
    ):
        status, _, err = run(*arguments, "--device", "cpu", capsys=capsys)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_a_device_that_does_not_exist_is_named(tmp_path, capsys):
    arguments = ("sample", "flow", "--num", "1", "--out", str(tmp_path / "x.png"), "--device", "tpux")
    status, _, err = run(*arguments, capsys=capsys)
    assert status == 2 and "--device must be cpu, cuda or cuda:N, got 'tpux'" in err and err.count("\n") == 1


@pytest.mark.parametrize("family", ["pixelcnn", "ddpm"])
def test_images_of_ones_own_take_their_preset(family, tmp_path, capsys, monkeypatch):
    from genengine import train

    taken = []
    monkeypatch.setattr(train, "train", lambda config, *_, dataset, **__: taken.append((config, dataset)))
    for source in ("shapes-16", "digits"):
        assert run("train", family, "--data", source, "--out", str(tmp_path), capsys=capsys)[0] == 0
    (images, colour), (digits, _) = taken
    assert images.steps == train.preset(family, "images").steps and digits.steps == train.preset(family, "digits").steps
    assert train.build_model(images, colour).image_shape == (3, 16, 16)


def test_a_checkpoint_of_another_family_is_refused(tmp_path, capsys):
    from genengine.models import FlowMatching

    FlowMatching.pretrained().save(tmp_path / "flow.safetensors")
    status, _, err = run(
        "sample", "gan", "--checkpoint", str(tmp_path / "flow.safetensors"), "--out", str(tmp_path / "x.npz"),
        capsys=capsys,
    )  # fmt: skip
    assert status == 2 and "must hold a gan model" in err and "'flow'" in err


def test_the_density_report_finds_what_does_not_belong(tmp_path, capsys):
    from genengine import data

    digits = data.digits("test")[0][:40]
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "mixed.npz", arr_0=np.concatenate([data.to_uint8(digits), noise]))
    common = ("evaluate", "pixelcnn", "--density", str(tmp_path / "mixed.npz"), "--device", "cpu", "--threads", "1")
    status, out, err = run(*common, "--json", capsys=capsys)
    assert status == 0, err
    report = json.loads(out)
    assert report["num_images"] == 44 and {entry["index"] for entry in report["outliers"][:4]} == {40, 41, 42, 43}
    assert len(report["outliers"]) <= 8 and report["usual_mean"] < 2
    status, out, _ = run(*common, capsys=capsys)
    assert status == 0 and out.startswith("44 images: ") and "unlikely" in out
    status, _, err = run("evaluate", "gan", "--density", str(tmp_path / "mixed.npz"), "--device", "cpu", capsys=capsys)
    assert status == 2 and "gan has no likelihood" in err


def test_trace_shows_a_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_sampler.py").write_text(
        "def step(x, output, row, rate=0.5):\n    return x - rate * output\n"
        "def loop(model, x, sigmas):\n"
        "    for a, b in zip(sigmas[:-1], sigmas[1:]):\n"
        "        x = x + (x - model(x, a)) / a * (b - a)\n"
        "    return x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, out, _ = run("trace", "my_sampler:step", "--steps", "3", "--set", "rate=0.25", capsys=capsys)
    assert status == 0 and out.startswith("step: nfe 3") and "-0.25" in out
    status, out, _ = run("trace", "my_sampler:loop", "--steps", "5", "--sigmas", "0.1,10", "--json", capsys=capsys)
    record = json.loads(out)
    assert (
        status == 0 and record["init_scale"] == 10 and len(record["rows"]) == 5 and record["rows"][0]["t_model"] == 10
    )
    status, _, err = run("trace", "my_sampler:missing", capsys=capsys)
    assert status == 2 and "cannot find my_sampler:missing" in err
    status, _, err = run("trace", "my_sampler", capsys=capsys)
    assert status == 2 and "MODULE:NAME" in err


def test_profile_prints_a_report_and_writes_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the page's roofline is drawn by Matplotlib")
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    status, out, err = run(
        "profile", "flow.step", "--num", "4", "--eager", "--device", "cpu", "--no-ceilings", "--top", "30", "--html",
        str(page), "--trace", str(trace), capsys=capsys,
    )  # fmt: skip
    assert status == 0 and "flow.step, eager on cpu" in out and "gated_adaln: " in out and "addmm" in out
    assert f"saved: {page}" in err and "<svg" in page.read_text() and json.loads(trace.read_text())["traceEvents"]


def test_profile_of_an_op_as_json(capsys):
    words = (
        "profile",
        "adaln",
        "--shape",
        "2,3,16",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--no-ceilings",
        "--json",
    )
    status, out, _ = run(*words, capsys=capsys)
    report = json.loads(out)
    assert status == 0 and report["kernels"][0]["dtype"] == "bfloat16" and report["bytes"] == 2 * (2 * 96 + 2 * 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "there is no target 'nothing'; targets are an op (adaln, "),
        (("adaln", "--shape", "3,x"), "--shape must look like 16,256,1152"),
        (("adaln", "--shape", "0,1,2"), "--shape must hold numbers of at least 1"),
        (("adaln", "--dtype", "int8"), "--dtype must be one of float32, float16, bfloat16"),
        (("flow.step", "--num", "0"), "--num must be at least 1"),
    ],
)
def test_profile_of_bad_arguments(words, message, capsys):
    status, _, err = run("profile", *words, "--device", "cpu", capsys=capsys)
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_every_row_of_the_demo_is_timed(monkeypatch, capsys):
    from genengine.benchmarks import suite

    timed = []

    def time_one(entry, case, options):
        timed.append(entry.name)
        return {"name": entry.name, "error": "not timed here"}

    monkeypatch.setattr(suite, "time_one", time_one)
    demo.show_gain()
    assert timed == list(demo.GAINS) and capsys.readouterr().out.count("not timed here") == len(timed)
