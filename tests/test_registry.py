"""Backends: chosen, named, refused with reasons; verdicts remembered; missing pieces named and harmless."""

import json
import subprocess
import sys

import pytest
import torch

import genengine
from genengine.ops import EXTENSION, _registry, _verify, adaln, normal

CPU = torch.device("cpu")


def test_named_backends_never_fall_back():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: it runs on cuda tensors, these are on cpu"):
        normal((1, 4), seed=0, backend="cuda")
    with genengine.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
        adaln(torch.zeros(1, 2, 3), torch.zeros(1, 3), torch.zeros(1, 3))


def test_the_context_restores_and_nests():
    assert _registry._forced is None
    with genengine.backend("reference"):
        with genengine.backend(None):
            assert _registry._forced is None
        assert _registry._forced == "reference"
    assert _registry._forced is None
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda or None, got 'gpu'"):
        genengine.backend("gpu").__enter__()


def test_float64_runs_on_the_reference():
    op = _registry.OPS["adaln"]
    assert _registry.automatic(op, CPU, torch.float64) == "reference"
    assert _registry.automatic(op, CPU, torch.float32) == ("cpu" if EXTENSION.loaded else "reference")


def test_every_kernel_has_a_case_set():
    from genengine import testing

    for name, op in _registry.OPS.items():
        if op.kernels:
            assert testing.cases(name, CPU), f"`genengine verify` has no cases for {name}"


def test_a_wrong_kernel_is_found_out(monkeypatch):
    """A verdict is only worth something if a broken kernel gets a bad one."""
    op = _registry.OPS["normal_out"]
    right = op.overloads["reference"]

    def slightly_wrong(out, seed, ids, step, stream):
        right(out, seed, ids, step, stream)
        out.view(-1)[-1].add_(1e-6)

    monkeypatch.setitem(op.overloads, "triton", slightly_wrong)
    assert any("differs from the reference" in problem for problem in _verify.run(op, "triton", CPU))
    tolerant = _registry.OPS["adaln"]
    monkeypatch.setitem(tolerant.overloads, "triton", lambda *a: tolerant.overloads["reference"](*a) * (1 + 1e-2))
    assert any("errs by" in problem for problem in _verify.run(tolerant, "triton", CPU))


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(_verify, "_verdicts", None)
    return tmp_path / "verified.json"


def test_verdicts_are_remembered(private_cache):
    _verify.record("some GPU", {"adaln/cuda": True, "adaln/triton": False})
    assert json.loads(private_cache.read_text()) == {"some GPU": {"adaln/cuda": True, "adaln/triton": False}}
    assert _verify.verdicts()["some GPU"]["adaln/cuda"] is True


def test_a_broken_cache_is_ignored_aloud(private_cache, capsys):
    private_cache.write_text("{not json")
    assert "some GPU" not in _verify.verdicts()
    assert f"ignoring {private_cache}" in capsys.readouterr().err
    _verify.record("some GPU", {"x/cuda": True})
    assert json.loads(private_cache.read_text())["some GPU"] == {"x/cuda": True}


def run_python(code, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_extension_everything_still_works(tmp_path):
    """No shared object: the import works, results are right, and the reason is given."""
    code = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: False if self.name == "_C.abi.so" else exists(self)
import torch, genengine
from genengine import random
from genengine.ops import EXTENSION, normal, sampler_step
assert not EXTENSION.loaded and "_C.abi.so was not built" in EXTENSION.reason, EXTENSION
assert (normal((1, 9), seed=3)[0].numpy() == random.normal(9, seed=3)).all()
table = genengine.solvers.euler(genengine.paths.RectifiedFlow(), genengine.schedules.uniform(4), prediction="velocity")
x = genengine.sample(lambda x, t: -x, table, (2, 1, 4, 4), seed=1)
assert x.isfinite().all()
try:
    normal((1, 9), seed=3, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    assert "backend 'cpu' cannot run here" in run_python(code)


def test_without_triton_everything_still_works():
    code = """
import sys
sys.modules["triton"] = None
import torch, genengine
from genengine.ops import normal
assert normal((1, 4), seed=0).isfinite().all()
try:
    normal((1, 4), seed=0, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "Triton is not installed (pip install 'genengine[triton]')" in run_python(code)


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
def test_the_instruction_set_can_be_chosen_by_the_environment():
    code = "import genengine.ops; from genengine import testing; print(testing.current_isa())"
    assert run_python(code, GENENGINE_ISA="baseline").strip() == "baseline"
