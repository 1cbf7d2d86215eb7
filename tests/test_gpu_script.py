"""tools/gpu.sh, with a Python that only notes how it is called: stages, limits, what is done again after a stop."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Notes its arguments; fails or hangs where FAIL or HANG says so; `bench SUITE --list` names two ops.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *has_cuda_kernels*) exit 0 ;;
  *"pip install"*) mkdir -p "$work/site/genengine"; exit 0 ;;
  *--list*) printf 'adaln  (ops)\\n    adaln: shapes\\nglu  (ops)\\n'; exit 0 ;;
esac
[ -n "${FAIL:-}" ] && [[ "$*" == *$FAIL* ]] && exit 3
[ -n "${HANG:-}" ] && [[ "$*" == *$HANG* ]] && exec sleep 60
echo "ran $*"
"""


@pytest.fixture
def script(tmp_path):
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "tmp").mkdir()

    def run(stage="all", **settings):
        calls.write_text("")
        environment = os.environ | {
            "CALLS": str(calls), "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path / "tmp"),
            "GENENGINE_COMMIT": "abc", "GENENGINE_CACHE": str(tmp_path / "cache"),
        } | settings  # fmt: skip
        done = subprocess.run(
            ["bash", str(ROOT / "tools" / "gpu.sh"), str(stub), stage], env=environment, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        return done, [line for line in calls.read_text().splitlines() if line.startswith("-m")], tmp_path / "out"

    return run


def test_everything_runs_in_order_and_ends_in_one_archive(script):
    done, calls, out = script()
    assert done.returncode == 0, done.stdout + done.stderr
    firsts = [next(i for i, call in enumerate(calls) if text in call) for text in (
        "pip install", "genengine verify", "-m pytest", "bench ceilings", "bench adaln", "profile adaln", "report",
    )]  # fmt: skip
    assert firsts == sorted(firsts)
    assert "--no-deps --no-build-isolation --no-index" in calls[firsts[0]]
    with tarfile.open(out / "gpu.tar.gz") as archive:
        names = archive.getnames()
    assert {"./state.txt", "./verify.log", "./bench-adaln.log"} <= set(names)


def test_a_failure_costs_its_part_and_only_that_is_done_again(script):
    done, calls, out = script(FAIL="genengine verify")
    assert done.returncode == 1 and "verify abc 3" in (out / "state.txt").read_text()
    assert any("-m pytest" in call for call in calls)
    done, calls, _ = script()
    assert done.returncode == 0 and "test: done before" in done.stdout
    assert any("genengine verify" in call for call in calls) and not any("-m pytest" in call for call in calls)
    _, calls, _ = script(GENENGINE_COMMIT="def")
    assert any("-m pytest" in call for call in calls)  # another commit: nothing has been shown of it


def test_a_hang_costs_one_op(script):
    quick = (ROOT / "tools" / "gpu.sh").read_text()
    assert 'part "bench-$group" "$2"' in quick  # the limit is per op
    done, calls, out = script("ops", HANG="bench adaln", OPS_LIMIT="1")
    assert done.returncode == 1 and "stopped after 1 s" in done.stdout
    assert "bench-adaln abc 124" in (out / "state.txt").read_text()
    assert "bench-glu abc 0" in (out / "state.txt").read_text()


def test_one_stage_alone(script):
    _, calls, _ = script("ceilings")
    assert any("bench ceilings" in call for call in calls) and not any("verify" in call for call in calls)
    done, calls, _ = script("everything")
    assert done.returncode == 2 and "STAGE must be one of" in done.stderr and not calls
