"""`genengine profile` on a function of the user's own: its output, its errors, and what is checked before it runs."""

import json
import sys

import pytest
import torch

from genengine import cli
from genengine.benchmarks import ceilings

TARGETS = """
import torch

def loud():
    print("a line of the target's")
    return torch.ones(3, 4).sin()

def odd():
    return {}["x"]

def draws():
    return torch.rand(3)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_command_target.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("my_command_target", None)


def run(capsys, name, *options):
    status = cli.main(["profile", f"my_command_target:{name}", *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json_is_json_when_the_target_prints(capsys):
    status, out, err = run(capsys, "loud", "--device", "cpu", "--no-ceilings", "--json")
    assert status == 0 and json.loads(out)["device"] == "cpu" and "a line of the target's" in err


def test_an_error_of_the_users_is_one_line(capsys):
    status, _, err = run(capsys, "odd", "--device", "cpu", "--no-ceilings")
    assert status == 2
    assert err == "genengine profile: my_command_target:odd raised KeyError: 'x' at my_command_target.py:9\n"
    with pytest.raises(RuntimeError) as caught:
        run(capsys, "odd", "--device", "cpu", "--no-ceilings", "--debug")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("option", ["--trace", "--html"])
def test_a_file_that_cannot_be_written_is_refused_before_the_target_runs(folder, capsys, option):
    status, _, err = run(capsys, "loud", "--device", "cpu", "--no-ceilings", option, str(folder))
    assert status == 2 and str(folder) in err and "a line of the target's" not in err


def test_other_devices_are_refused(capsys):
    status, _, err = run(capsys, "loud", "--device", "meta")
    assert status == 2 and "--device must be cpu, cuda or cuda:N, got 'meta'" in err


def test_ceilings_are_measured_for_what_was_recorded(capsys, monkeypatch):
    asked, sizes = [], {1024: 1e9}

    def measure(device, dtypes):
        asked.append((str(device), list(dtypes)))
        return ceilings.Ceilings("cpu", sizes, sizes, {"float32": 1e9}, 1e9, 1e-9)

    monkeypatch.setattr(ceilings, "measure", measure)
    status, out, _ = run(capsys, "loud", "--device", "cpu")
    assert status == 0 and asked == [("cpu", [torch.float32])] and "of ceiling" in out


def test_the_random_state_of_the_process_is_left_alone(capsys):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert run(capsys, "draws", "--device", "cpu", "--no-ceilings")[0] == 0
    assert torch.equal(torch.rand(2), expected)
