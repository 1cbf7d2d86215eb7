"""Training: the loss falls, a killed run resumes to the same bits, and bad files are refused by name."""

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import genengine
from genengine import data, models
from genengine.models import FlowMatching, checkpoint
from genengine.train import LOG_FILE, STATE_FILE, Run, TrainConfig, learning_rate, preset, train

SHORT = preset("flow", steps=12, batch_size=16, warmup=4, ema_decay=0.9, seed=3)
ROOT = Path(genengine.__file__).resolve().parents[1]


def run_train(config, folder, **options):
    return train(config, folder, **({"progress": False, "save_every": 4, "log_every": 2} | options))


def script(source, *arguments):
    """Start a Python process that trains, to be killed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    header = "import torch; torch.set_num_threads(1)\nimport sys\n"
    return subprocess.Popen([sys.executable, "-c", header + source, *map(str, arguments)], env=environment)


def log_of(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def contents(path):
    tensors, config = checkpoint.read(path)
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, config


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_loss_falls(tmp_path):
    config = preset("flow", "smoke", steps=80, batch_size=48, seed=1)
    run_train(config, tmp_path, save_every=1000, log_every=10)
    losses = [entry["loss"] for entry in log_of(tmp_path)]
    assert losses[0] > 1.2 and losses[-1] < 0.8 * losses[0]
    assert log_of(tmp_path)[-1]["step"] == 80


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, precision):
    config = dataclasses.replace(SHORT, precision=precision)
    whole = run_train(config, tmp_path / "whole")
    part = Run(config)
    for _ in range(5):
        part.train_step()
    (tmp_path / "parts").mkdir()
    part.save(tmp_path / "parts" / STATE_FILE)
    torch.manual_seed(123)  # the global generator must not matter
    torch.rand(7)
    resumed = run_train(config, tmp_path / "parts", resume=True)
    assert contents(whole) == contents(resumed)
    assert contents(tmp_path / "whole" / STATE_FILE) == contents(tmp_path / "parts" / STATE_FILE)


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    config = dataclasses.replace(SHORT, steps=40)
    source = (
        "from genengine.train import TrainConfig, train\n"
        f"config = TrainConfig(**{dataclasses.asdict(config)!r})\n"
        "train(config, sys.argv[1], progress=False, save_every=3, log_every=1)"
    )
    folder = tmp_path / "killed"
    process = script(source, folder)
    deadline = time.monotonic() + 60
    while not (folder / STATE_FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / STATE_FILE).exists(), "the process wrote no state within a minute"
    _, saved = checkpoint.read(folder / STATE_FILE)
    assert saved["step"] < 40, "the run ended before it could be killed"
    resumed = run_train(config, folder, resume=True, log_every=1)
    whole = run_train(config, tmp_path / "whole", log_every=1)
    assert contents(resumed) == contents(whole)
    strip = [{k: v for k, v in entry.items() if "seconds" not in k} for entry in log_of(folder)]
    assert [entry["step"] for entry in strip] == list(range(1, 41))  # no line lost or doubled
    assert strip == [{k: v for k, v in entry.items() if "seconds" not in k} for entry in log_of(tmp_path / "whole")]


def test_a_kill_in_mid_save_leaves_a_loadable_checkpoint(tmp_path):
    source = (
        "import torch\nfrom genengine.models import checkpoint\n"
        "tensors = {'a': torch.zeros(4_000_000)}\n"
        "i = 0\n"
        "while True:\n"
        "    i += 1\n"
        "    checkpoint.write(sys.argv[1], {'a': tensors['a'].fill_(i)}, {'step': i})\n"
    )
    path = tmp_path / STATE_FILE
    for trial in range(3):
        process = script(source, path)
        deadline = time.monotonic() + 60
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 + 0.017 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        tensors, config = checkpoint.read(path)
        assert torch.equal(tensors["a"], torch.full((4_000_000,), float(config["step"])))
        path.unlink()


def test_a_good_file_may_begin_like_a_pickle(tmp_path):
    for length in range(300):  # the first bytes are the header's length: find one that is 0x80
        checkpoint.write(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"note": "x" * length})
        if (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80":
            break
    assert (tmp_path / "a.safetensors").read_bytes()[:1] == b"\x80"
    assert checkpoint.read(tmp_path / "a.safetensors")[0]["a"].sum() == 3


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / STATE_FILE
    checkpoint.write(path, {"a": torch.ones(3)}, {"step": 1})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, config = checkpoint.read(path)
    assert config == {"step": 1} and torch.equal(tensors["a"], torch.ones(3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run_train(SHORT, folder)


def test_the_model_file_holds_the_average_and_how_it_was_made(trained, tmp_path):
    model = FlowMatching.load(trained)
    assert not model.net.training
    tensors, config = checkpoint.read(trained)
    assert config["extra"]["train"]["steps"] == 12 and config["net"]["dim"] == PRESET_NET_DIM
    state, _ = checkpoint.read(trained.parent / STATE_FILE)
    assert all(torch.equal(tensors[name], state[f"average.{name}"]) for name in tensors)
    assert any(not torch.equal(tensors[name], state[f"model.{name}"]) for name in tensors)
    model.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    again = FlowMatching.load(tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * trained.stat().st_size
    for p, q in zip(model.net.parameters(), again.net.parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p.to(torch.bfloat16).float(), q)


PRESET_NET_DIM = FlowMatching.from_config(
    {"family": "flow", "net": {"name": "dit", **genengine.nets.CONFIGS["tiny"]}}
).net.config.dim


def test_no_checkpoint_is_unpickled(tmp_path):
    path = tmp_path / "evil.safetensors"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Evil()}, path)
    with pytest.raises(ValueError, match=r"evil\.safetensors must be a safetensors file, got a pickle.*save_file"):
        FlowMatching.load(path)
    torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="got a pickle"):
        FlowMatching.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("keep", [0, 3, 8, 200, 0.5, -1])
def test_truncated_files_are_refused(trained, tmp_path, keep):
    whole = trained.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"cut\.safetensors must be a whole safetensors file.*fetch or train"):
        FlowMatching.load(path)


def test_wrong_keys_and_shapes_are_named(trained, tmp_path):
    tensors, config = checkpoint.read(trained)
    path, key = tmp_path / "bad.safetensors", "blocks.0.attn.qkv.weight"
    checkpoint.write(path, {k: v for k, v in tensors.items() if k != key}, config)
    with pytest.raises(ValueError, match=r"bad\.safetensors.*missing blocks\.0\.attn\.qkv\.weight; use the config"):
        FlowMatching.load(path)
    checkpoint.write(path, tensors | {"blocks.9.extra": torch.zeros(2)}, config)
    with pytest.raises(ValueError, match=r"bad\.safetensors.*unexpected blocks\.9\.extra"):
        FlowMatching.load(path)
    checkpoint.write(path, tensors | {key: torch.zeros(3, 5)}, config)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight must be \(.*\), got \(3, 5\)"):
        FlowMatching.load(path)


def test_foreign_files_are_refused(trained, tmp_path):
    tensors, config = checkpoint.read(trained)
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="must carry the metadata entry 'genengine'"):
        FlowMatching.load(path)
    checkpoint.write(path, tensors, config | {"family": "vae"})
    with pytest.raises(ValueError, match=r"foreign\.safetensors must hold a flow model.*'vae'"):
        FlowMatching.load(path)
    checkpoint.write(path, tensors, config | {"path": {"name": "Nowhere"}})
    with pytest.raises(ValueError, match="unknown path 'Nowhere'"):
        FlowMatching.load(path)
    damaged = {
        "net": [[], None, "dit", {}, {"name": 3}],
        "path": [[], "RectifiedFlow", {}, {"name": ["EDM"]}, {"name": "Path"}, {"name": "EDM", "sigma": 1.0}],
        "time_std": [None, "1", []],
    }
    for entry, values in damaged.items():
        for value in values:
            checkpoint.write(path, tensors, config | {entry: value})
            with pytest.raises(ValueError, match=rf"foreign\.safetensors must hold a flow model.*entry '{entry}'"):
                FlowMatching.load(path)
    for field, value in (("num_classes", None), ("dim", "64"), ("mlp_ratio", [4])):
        checkpoint.write(path, tensors, config | {"net": config["net"] | {field: value}})
        with pytest.raises(ValueError, match=rf"foreign\.safetensors must hold a flow model.*{field} must be"):
            FlowMatching.load(path)
    checkpoint.write(path, tensors, config | {"format": 99})
    with pytest.raises(ValueError, match="must have format 1"):
        FlowMatching.load(path)
    with pytest.raises(FileNotFoundError, match="must be an existing file"):
        FlowMatching.load(tmp_path / "none.safetensors")


def test_resuming_checks_the_state(trained, tmp_path):
    state = trained.parent / STATE_FILE
    tensors, saved = checkpoint.read(state)
    with pytest.raises(ValueError, match=r"another configuration: lr 0\.002, now 0\.1.*new folder"):
        Run(dataclasses.replace(SHORT, lr=0.1)).restore(state)
    with pytest.raises(ValueError, match="must be the state of a training run, got 'flow'"):
        Run(SHORT).restore(trained)
    path = tmp_path / STATE_FILE
    lacking = next(k for k in tensors if k.endswith(".exp_avg_sq"))
    for key in (lacking, "model.pos_embed", "average.final_layer.linear.bias"):
        checkpoint.write(path, {k: v for k, v in tensors.items() if k != key}, saved)
        with pytest.raises(ValueError, match=key.removeprefix("model.").removeprefix("average.").replace(".", r"\.")):
            Run(SHORT).restore(path)
    for step in (None, "3", -1, 13):
        checkpoint.write(path, tensors, saved | {"step": step})
        with pytest.raises(ValueError, match=r"state\.safetensors must have a step in 0 \.\. 12"):
            Run(SHORT).restore(path)
    checkpoint.write(path, tensors | {"surprise.x": torch.zeros(1)}, saved)
    with pytest.raises(ValueError, match="unexpected key surprise.x"):
        Run(SHORT).restore(path)
    with pytest.raises(ValueError, match=r"must hold no training state.*--resume"):
        run_train(SHORT, trained.parent)


def test_configuration_is_validated():
    bad = {"steps": 0, "batch_size": 1.5, "lr": math.nan, "weight_decay": None,  "ema_decay": 1.0, "precision": "fp8",
           "split": "valid", "family": "ganz", "betas": (0.9, 1.0),
           "schedule": "linear", "lr_scales": {"net": -1.0}, "seed": -1, "clip_norm": 0.0, "warmup": -1}  # fmt: skip
    for field, value in bad.items():
        with pytest.raises(ValueError, match=f"train/TrainConfig: {field} must be"):
            TrainConfig(**{field: value})
    for field, value in {"lr": "fast", "lr_scales": 3, "betas": 0.5, "clip_norm": "1"}.items():  # as --set gives them
        with pytest.raises(ValueError, match=f"train/TrainConfig: {field} must be .*got {value!r}"):
            preset("flow", **{field: value})
    with pytest.raises(ValueError, match="fields must be among.*got family"):
        preset("flow", **{"family": "vae"})
    with pytest.raises(ValueError, match="models/FlowMatching: entry 'net' must be a dict with a name, got 5"):
        Run(preset("flow", model={"net": 5}))
    with pytest.raises(ValueError, match="entry 'path': s must be a number.*got 'abc'"):
        Run(preset("ddpm", model={"path": {"s": "abc"}}))
    for name in ("save_every", "log_every"):
        with pytest.raises(ValueError, match=f"train/train: {name} must be an int >= 1, got 0"):
            run_train(SHORT, "never-made", **{name: 0})
    with pytest.raises(ValueError, match="name must be one of digits, images, smoke"):
        preset("flow", "huge")
    with pytest.raises(ValueError, match="family must be one of ddpm, flow.*got 'ganz'"):
        preset("ganz")
    with pytest.raises(ValueError, match="fields must be among.*got stepz"):
        preset("flow", stepz=3)
    with pytest.raises(ValueError, match=r"batch_size must be 1\.\.1437"):
        Run(preset("flow", batch_size=1438))
    with pytest.raises(ValueError, match="lr_scales must name networks among net, got 'generator'"):
        Run(preset("flow", lr_scales={"generator": 2.0}))
    assert preset("flow", steps=7).steps == 7 and preset("flow").steps > 7
    deep = preset("flow", model={"net": {"dim": 32}, "time_std": 0.5}).model
    assert deep["net"] == {"name": "dit", "config": "tiny", "dim": 32} and deep["time_std"] == 0.5


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1, abs=0.03)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_a_diverged_run_stops_and_says_so(tmp_path):
    config = dataclasses.replace(SHORT, lr=1e30, warmup=0, clip_norm=math.inf)
    with pytest.raises(FloatingPointError, match=r"must stay finite, got .* at step \d+; .*; lower lr"):
        run_train(config, tmp_path, log_every=1)
    assert not (tmp_path / STATE_FILE).exists() or checkpoint.read(tmp_path / STATE_FILE)[1]["step"] < 12


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch):
    healthy = FlowMatching.terms

    def terms(self, *args, step, **options):
        result = healthy(self, *args, step=step, **options)
        return result if step < 9 else {"loss": result["loss"] * math.nan}

    monkeypatch.setattr(FlowMatching, "terms", terms)
    message = r"loss must stay finite, got nan at step 10; the last good state is .*state\.safetensors; lower lr"
    with pytest.raises(FloatingPointError, match=message):
        run_train(SHORT, tmp_path, log_every=100)
    assert checkpoint.read(tmp_path / STATE_FILE)[1]["step"] == 8
    monkeypatch.undo()
    whole = run_train(SHORT, tmp_path / "whole")
    assert contents(run_train(SHORT, tmp_path, resume=True)) == contents(whole)


def test_a_run_knows_its_images(tmp_path):
    pairs = [(torch.full((3, 8, 8), i, dtype=torch.uint8), i % 2) for i in range(20)]
    images = data.from_iterable(pairs)
    run_train(SHORT, tmp_path, dataset=images)
    assert FlowMatching.from_pretrained(tmp_path).image_shape == (3, 8, 8)
    other = data.from_iterable([(255 - image, label) for image, label in pairs])
    with pytest.raises(ValueError, match="trained on other images than iterable holds now"):
        run_train(SHORT, tmp_path, dataset=other, resume=True)


def test_the_folder_describes_itself(trained):
    folder = trained.parent
    model = FlowMatching.from_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    assert described["family"] == "flow" and described["num_levels"] == 17 and model.num_levels == 17
    assert type(models.load(trained)) is FlowMatching
    (folder / "config.json").write_text(json.dumps(described | {"class_drop": 0.5}))
    with pytest.raises(ValueError, match="config.json must describe the weights beside it"):
        FlowMatching.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(described))


def test_what_training_ends_with_sees_all_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(FlowMatching, "finish", lambda self, x0, labels, *, seed: seen.append((len(x0), len(labels))))
    run_train(SHORT, tmp_path)
    assert seen == [(1437, 1437)]


def test_tensorboard_is_asked_for_by_name(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(RuntimeError, match="needs TensorBoard: pip install tensorboard"):
            run_train(SHORT, tmp_path, tensorboard=True)
    else:
        run_train(SHORT, tmp_path, tensorboard=True)
        assert list(tmp_path.glob("events.out.tfevents*"))
