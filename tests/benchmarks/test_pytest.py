"""`pytest benchmarks/`: the rows under pytest-benchmark, stored and compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'genengine[bench]'")
ROOT = Path(__file__).resolve().parents[2]


def run(*words, folder):
    command = [
        sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--device", "cpu",
        "--suite", "rescaled guidance, 10 steps", "--budget", "0.01", f"--benchmark-storage=file://{folder}", *words,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_rows_are_stored_with_their_ratios_and_compared(tmp_path):
    done = run("--benchmark-autosave", folder=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (stored,) = tmp_path.glob("*/*.json")
    (benchmark,) = json.loads(stored.read_text())["benchmarks"]
    assert benchmark["stats"]["median"] > 0 and benchmark["extra_info"]["ratios"]["eager"]["ratio"] > 0
    done = run("--benchmark-compare", folder=tmp_path)
    assert done.returncode == 0 and "NOW" in done.stdout and "0001" in done.stdout, done.stdout
