"""What a result says of its device and its source, with pretended nvidia-smi and git."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from genengine.benchmarks import machine

LINE = "NVIDIA H100, 570.1, 1980 MHz, 2619 MHz, 700 W, 120 W, 41\n"


@pytest.fixture
def gpu(monkeypatch):
    """Device 1 of a process, and what nvidia-smi was asked and answers."""
    gpu = SimpleNamespace(properties=SimpleNamespace(uuid="1234-5678"), asked=[], answer=LINE, code=0)

    def run(command, check=False, **_):
        gpu.asked.append(command)
        if check and gpu.code:
            raise subprocess.CalledProcessError(gpu.code, command)
        return SimpleNamespace(stdout=gpu.answer, returncode=gpu.code)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu.properties)
    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return gpu


def test_the_state_is_that_of_the_current_device(gpu):
    state = machine.gpu_state()
    assert (state["name"], state["clocks.sm"], state["temperature.gpu"]) == ("NVIDIA H100", "1980 MHz", "41")
    assert "--id=GPU-1234-5678" in gpu.asked[0]


@pytest.mark.parametrize(("visible", "name"), [(None, "1"), ("", "1"), ("3,5", "5"), ("GPU-aa, GPU-bb", "GPU-bb")])
def test_without_a_uuid_the_visible_devices_tell(gpu, monkeypatch, visible, name):
    gpu.properties = SimpleNamespace()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine.gpu_state()
    assert f"--id={name}" in gpu.asked[0]


def test_an_error_of_nvidia_smi_is_no_state(gpu):
    gpu.code, gpu.answer = 6, "No devices were found\n"
    assert machine.gpu_state() is None
    gpu.code = 0
    assert machine.gpu_state() is None  # nor is a line without the fields


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("GENENGINE_COMMIT", "GENENGINE_DIRTY"):
        monkeypatch.delenv(name, raising=False)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "file").write_text("1")
    (tmp_path / "site").mkdir()
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path.resolve())
    return tmp_path


def test_a_checkout_tells_its_commit_and_edits(repository):
    source = machine._source()
    assert len(source["commit"]) == 12 and source["dirty"] is False
    (repository / "file").write_text("2")
    assert machine._source() == source | {"dirty": True}


def test_a_copy_inside_another_repository_has_not_its_commit(repository, monkeypatch):
    (repository / "file").write_text("2")
    monkeypatch.setattr(machine, "ROOT", repository.resolve() / "site")
    assert machine._source() == {"commit": None, "dirty": False}
    monkeypatch.setenv("GENENGINE_COMMIT", "abc")
    monkeypatch.setenv("GENENGINE_DIRTY", "1")
    assert machine._source() == {"commit": "abc", "dirty": True}
    monkeypatch.setenv("GENENGINE_DIRTY", "0")
    assert machine._source() == {"commit": "abc", "dirty": False}
