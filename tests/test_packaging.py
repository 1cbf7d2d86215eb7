"""A wheel built without a compiler: everything is in it, it works away from the checkout, and says what is missing."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"GENENGINE_NO_EXT": "1"},
    )
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_serves_every_python_and_holds_everything(wheel):
    assert "-py3-none-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = ["genengine/py.typed", "genengine/kernels/normal.py", "genengine/benchmarks/harness.py",
              "genengine/benchmarks/page.css", "genengine/benchmarks/page.js", "genengine/benchmarks/schema.json",
              "genengine/nets/dit.py", "genengine/models/flow.py", "genengine/assets/digits.npz",
              "genengine/pretrained/flow_digits.safetensors", "genengine/_build.json"]  # fmt: skip
    wanted += [str(path.relative_to(ROOT)) for path in (ROOT / "genengine").rglob("*.py")]
    assert [name for name in wanted if name not in names] == []
    assert not any(name.startswith(("tests/", "kernels/", "benchmarks/")) for name in names)


def test_installed_without_compiled_kernels_it_works_and_says_why(wheel, tmp_path):
    """Unpacked into a folder of its own and run from elsewhere, so that the checkout is not what is imported."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "TRITON_INTERPRET": "0"}
    run = lambda *code: subprocess.run(  # noqa: E731
        [sys.executable, *code], capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    done = run("-m", "genengine", "env", "--json")
    assert done.returncode == 0, done.stderr
    extension = json.loads(done.stdout)["extension"]
    assert Path(extension["path"]).is_relative_to(site) and not extension["loaded"]
    assert extension["reason"] == "GENENGINE_NO_EXT=1 was set at installation"
    done = run(
        "-c",
        "import genengine.kernels as k; from genengine.ops import normal; print(k.__file__, normal((1, 3), seed=1))",
    )
    assert done.returncode == 0 and str(site) in done.stdout, done.stderr
