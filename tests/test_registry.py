"""Backends: chosen, named, refused with reasons; verdicts remembered; missing pieces named and harmless."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

import genengine
from genengine import environment, ops, testing
from genengine.ops import EXTENSION, _registry, _verify, adaln, attention, diffuse, gated_adaln, normal
from genengine.testing.pixelcnn_sample import packed

CPU = torch.device("cpu")
GPU = torch.device("cuda")  # named only: nothing here runs on it


def test_named_backends_never_fall_back():
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: it runs on cuda tensors, these are on cpu"):
        normal((1, 4), seed=0, backend="cuda")
    with genengine.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run here"):
        adaln(torch.zeros(1, 2, 3), torch.zeros(1, 3), torch.zeros(1, 3))


def test_the_context_passes_over_kernels_that_are_not_meant_to_exist():
    """pixelcnn_sample has no Triton kernel: automatic in the context, refused where it is named in the call."""
    weights = packed("plain")
    with genengine.backend("triton"):
        images = ops.pixelcnn_sample(weights, 1, seed=3)[0]
        assert torch.equal(images, ops.pixelcnn_sample(weights, 1, seed=3)[0])
        with pytest.raises(RuntimeError, match="cannot run here: pixelcnn_sample has no triton kernel"):
            ops.pixelcnn_sample(weights, 1, seed=3, backend="triton")
    q = torch.randn(1, 3, 2, 4)
    with genengine.backend("reference"):
        assert torch.equal(attention(q, q, q), attention(q, q, q, backend="reference"))
    with genengine.backend("cpu"), pytest.raises(RuntimeError, match="its kernels take"):
        attention(*[q.double()] * 3)


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
def test_a_dit_runs_on_a_named_backend():
    from genengine.nets.dit import DiT, DiTConfig

    config = DiTConfig(image_size=8, patch_size=2, in_channels=1, dim=32, depth=1, num_heads=2, num_classes=3)
    net, x = DiT(config), torch.randn(2, 1, 8, 8)
    with torch.no_grad(), genengine.backend("cpu"):
        assert net(x, torch.rand(2), torch.tensor([0, 2])).isfinite().all()


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
    for name, op in _registry.OPS.items():
        if op.kernels:
            assert testing.cases(name, CPU), f"`genengine verify` has no cases for {name}"


PAIRS = [(d, d) for d in (torch.float32, torch.float16, torch.bfloat16)]
MIXED = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "pairs"), [("sampler_step_out", PAIRS + MIXED), ("diffuse", PAIRS)])
def test_case_sets_hold_odd_aligned_and_long_samples(name, pairs):
    """In C order, for every pair of dtypes: what the scattered, the vectorised and the many-block kernels take."""
    found = {pair: set() for pair in pairs}
    for case in testing.cases(name, CPU):
        if case.args[0].is_contiguous():
            found[case.dtypes].add(case.args[0][0].numel())
    for pair, sizes in found.items():
        assert any(size % 4 and size < 1024 for size in sizes), pair
        assert any(size % 8 == 0 and size <= 1024 for size in sizes), pair
        assert any(size % 8 == 0 and size > 1024 for size in sizes), pair
        assert any(size % 4 and size > 4100 for size in sizes), pair


@pytest.mark.parametrize("name", ["adaln", "adaln_backward", "gated_adaln", "gated_adaln_backward"])
def test_case_sets_of_adaln_hold_every_team_and_many_chunks(name):
    pairs = [*PAIRS, (torch.float32, torch.bfloat16)]
    found = {pair: set() for pair in pairs}
    for case in testing.cases(name, CPU):
        found[case.dtypes].add(tuple(case.args[0].shape[1:]))
    for pair, sizes in found.items():
        wide = [dim for _, dim in sizes if dim % 8 == 0]
        for low, high in ((1, 256), (257, 512), (513, 1024), (1025, 2048), (2049, 4096), (4097, 8192)):
            assert any(low <= dim <= high for dim in wide), (pair, low, high)
        assert any(dim % 4 and dim > 2048 for _, dim in sizes), pair
        for multiple in (True, False):  # 16 chunks of 16 tokens are one group of partial sums
            assert any(tokens > 256 and (dim % 8 == 0) == multiple for tokens, dim in sizes), pair


def test_a_thin_case_set_keeps_a_long_sample():
    for name in ("adaln_backward", "sampler_step_out", "diffuse"):
        every, thin = testing.cases(name, CPU), testing.cases(name, CPU, thin=True)
        assert len(thin) < len(every) and any(case.large for case in thin)
        assert sum(not case.large for case in every) == sum(not case.large for case in thin)


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
@pytest.mark.parametrize("name", ["sampler_step_out", "diffuse"])
def test_an_error_beyond_the_first_block_is_found_out(name, monkeypatch):
    op = _registry.OPS[name]

    def short(*args):
        result = op.overloads["reference"](*args)
        for tensor in result or (args[9],):
            if tensor[0].numel() > 1024:
                tensor[-1].view(-1)[1024:].zero_() if tensor[-1].is_contiguous() else tensor[-1].zero_()
        return result

    monkeypatch.setitem(op.overloads, "cpu", short)
    assert _verify.run(op, "cpu", CPU)


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


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 01:54:17 UTC 2025\n"
        "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (user@host)  "
        "Wed Feb 26 01:54:17 UTC 2025\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
    ],
)
def test_the_driver_version_is_read(text):
    assert _verify.driver_version(text) == "570.124.06"
    assert _verify.driver_version("something else") == "unknown"


def test_a_rebuild_loses_the_verdicts(tmp_path):
    files = [tmp_path / name for name in ("_C.abi.so", "adaln.py")]
    for file in files:
        file.write_bytes(b"one")
    before = _verify._hash(files)
    assert _verify._hash(files) == before and len(before) == 8
    for file in files:
        file.write_bytes(b"two")
        changed = _verify._hash(files)
        assert changed != before
        before = changed
    assert _verify.device_key(CPU) == f"{_verify.release_key(CPU)}, build {_verify.build_hash()}"
    assert f"genengine {_verify._version('genengine')}" in _verify.release_key(CPU)


def test_own_verdicts_go_before_shipped_ones(private_cache, monkeypatch):
    release = _verify.release_key(CPU)
    monkeypatch.setattr(_verify, "_shipped", lambda: {release: {"adaln/cuda": True, "diffuse/cuda": True}})
    _verify.record(_verify.device_key(CPU), {"adaln/cuda": False})
    _verify.record(release, {"diffuse/cuda": False})  # a cache's key without a build is an older version's: not read
    assert _verify.known(CPU) == {"adaln/cuda": False, "diffuse/cuda": True}


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Every kernel there, and these verdicts."""
    verdicts = {}
    monkeypatch.setattr(_verify, "known", lambda device: verdicts)
    monkeypatch.setattr(_registry, "why_not", lambda op, name, *where: "not on a GPU" if name == "cpu" else None)
    monkeypatch.setattr(_verify, "run", lambda op, backend, device: ["never seen right"])
    monkeypatch.setattr(_verify, "device_key", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return verdicts


def test_a_kernel_is_no_default_before_its_backward_is_right(pretended_gpu, private_cache):
    op = _registry.OPS["adaln"]
    chosen = lambda: _registry.automatic(op, GPU, torch.float32)  # noqa: E731
    pretended_gpu |= {f"{name}/{kind}": True for name in ("adaln", "adaln_backward") for kind in ("cuda", "triton")}
    assert chosen() == environment._choices(op, GPU)["default"] == "cuda"
    pretended_gpu["adaln_backward/cuda"] = False
    assert chosen() == "triton"
    choices = environment._choices(op, GPU)
    assert choices["default"] == "triton" and choices["unavailable"]["cuda"] == "its backward: found wrong here"
    del pretended_gpu["adaln_backward/triton"]
    assert "its backward: not yet verified here" in environment._choices(op, GPU)["unavailable"]["triton"]
    assert chosen() == environment._choices(op, GPU)["default"] == "reference"


def test_the_choice_traces(pretended_gpu):
    pretended_gpu |= {"adaln/cuda": True, "adaln_backward/cuda": False, "adaln/triton": True}
    pretended_gpu["adaln_backward/triton"] = True
    op, place = _registry.OPS["adaln"], {"triton": 1, "cuda": 2, "reference": 3}
    compiled = torch.compile(
        lambda x: x + place[_registry.automatic(op, GPU, torch.float32)], fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(())) == 1


def test_a_kernel_with_limits_is_passed_over_and_that_is_told_once(pretended_gpu, monkeypatch):
    """attention's CUDA kernel is Hopper's, for 16 bits and five head dims: else the next runs, with one warning."""
    names = ("attention", "attention_backward")
    pretended_gpu |= {f"{name}/{kind}": True for name in names for kind in ("cuda", "triton")}
    monkeypatch.undo()  # the real `why_not`, on a pretended Hopper
    monkeypatch.setattr(_verify, "known", lambda device: pretended_gpu)
    monkeypatch.setattr(_registry, "_why_no_backend", lambda op, name, device_type: None)
    monkeypatch.setattr(_registry, "missing_kernel", lambda op_name, name: None)
    monkeypatch.setattr(_registry, "_told", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    op, capability = _registry.OPS["attention"], (9, 0)

    def chosen(dim, dtype=torch.bfloat16):
        return _registry.automatic(op, GPU, dtype, (torch.empty(1, 2, 3, dim, dtype=dtype),) * 3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen(dim) for dim in (64, 72, 80, 96, 128)] == ["cuda"] * 5
    with pytest.warns(UserWarning, match="attention: its cuda kernel cannot run: .* not 40; triton runs instead"):
        assert chosen(40) == "triton"
    with pytest.warns(UserWarning, match="float16 and bfloat16, not torch.float32; triton runs instead"):
        assert chosen(64, torch.float32) == "triton"
    capability = (8, 6)
    with pytest.warns(UserWarning, match="compute capability 9.0.*, this one has 8.6; triton"):
        assert chosen(64) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(64) == chosen(72) == "triton"
    with pytest.raises(RuntimeError, match="attention: backend 'cuda' cannot run here: it is written for Hopper"):
        _registry.choose(op, GPU, torch.bfloat16, "cuda", (torch.empty(1, 2, 3, 64),) * 3)


def test_a_kernel_that_takes_the_gpu_down_is_wrong_and_the_rest_is_not_checked(
    pretended_gpu, private_cache, monkeypatch
):
    broken, recorded = [], {}

    def run(op, backend, device):
        if broken:
            raise AssertionError("checked on a GPU that was lost")
        if (op.public, backend) == ("attention", "cuda"):
            broken.append("CUDA error: an illegal memory access was encountered")
            return broken
        return []

    def synchronize(device):
        if broken:
            raise RuntimeError(broken[0] + "\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(_verify, "run", run)
    monkeypatch.setattr(_verify, "record", lambda key, entries: recorded.update(entries))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    lines = []
    rows = environment.verify(GPU, lines.append)
    verdicts = {(row["op"], row["backend"]): row["verdict"] for row in rows}
    assert verdicts["adaln", "cuda"] == "right" and verdicts["attention", "cuda"] == "wrong"
    assert verdicts["attention_backward", "triton"] == verdicts["normal", "cuda"] == "not checked"
    assert recorded["adaln/cuda"] and not recorded["attention/cuda"] and "normal/cuda" not in recorded
    assert any("not checked: attention on cuda took the GPU down" in line for line in lines), lines
    broken.clear()
    rows = environment.verify(GPU, skip=["attention"])
    assert {row["verdict"] for row in rows} == {"right", "not available"}  # the CPU's kernels, here
    assert not any("attention" in row["op"] for row in rows)
    assert {row["op"] for row in environment.verify(GPU, only=["adaln"])} == {"adaln", "adaln_backward"}
    with pytest.raises(ValueError, match="there is no op 'atention'; ops are .*attention"):
        environment.verify(GPU, only=["atention"])


def test_reports_use_public_names(private_cache, monkeypatch):
    assert {"normal", "uniform", "sampler_step"} <= set(environment.report()["ops"])
    few = {name: _registry.OPS[name] for name in ("normal_out", "advance")}
    monkeypatch.setattr(_registry, "OPS", few)
    lines = []
    assert {row["op"] for row in environment.verify(CPU, lines.append)} == {"normal", "advance"}
    assert not any("_out" in line for line in lines)
    if EXTENSION.loaded:
        assert _verify.known(CPU)["normal/cpu"] and _verify.known(CPU)["advance/cpu"]


# ---- forward-mode AD: refused, for the dispatcher would drop the tangents ------------------------------------------

ONE = torch.ones(2)
DIFFERENTIABLE = {
    "adaln": lambda x: adaln(x, x[:, 0], x[:, 0]),
    "gated_adaln": lambda x: gated_adaln(x, x, x[:, 0], x[:, 0], x[:, 0])[1],
    "diffuse": lambda x: diffuse(x, ONE, ONE, ONE, ONE, seed=1)[0],
    "attention": lambda x: attention(x[..., None], x[..., None], x[..., None]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_tangents_are_refused(name):
    run, x = DIFFERENTIABLE[name], torch.randn(2, 3, 4)
    tangent, refused = torch.ones_like(x), f"^{name}: has no forward-mode derivative; use reverse mode"
    with pytest.raises(RuntimeError, match=refused):
        torch.func.jvp(run, (x,), (tangent,))
    with pytest.raises(RuntimeError, match=refused):
        torch.func.jacfwd(run)(x)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(run(x), run(x.clone()))  # no tangent, no error
        with pytest.raises(RuntimeError, match=refused):
            run(torch.autograd.forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_tangents_of_gradients_are_refused(name):
    x = torch.randn(2, 3, 4, requires_grad=True)
    out = DIFFERENTIABLE[name](x)
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        refused = f"^{name}_backward: has no forward-mode derivative"
        if name == "attention":  # on the CPU it is torch's own op, with torch's words
            refused = "Trying to use forward AD with .*that does not support it"
        with pytest.raises(RuntimeError, match=refused):
            torch.autograd.grad(out, x, grad)


def test_tangents_are_refused_by_compiled_code():
    torch._dynamo.reset()
    x = torch.randn(2, 3, 4)
    compiled = torch.compile(DIFFERENTIABLE["adaln"], backend="eager")
    assert torch.equal(compiled(x), DIFFERENTIABLE["adaln"](x))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        compiled(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


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
from genengine.ops import EXTENSION, attention, normal, sampler_step
assert not EXTENSION.loaded and "_C.abi.so was not built" in EXTENSION.reason, EXTENSION
assert (normal((1, 9), seed=3)[0].numpy() == random.normal(9, seed=3)).all()
q = torch.zeros(1, 3, 2, 4)
assert attention(q, q, q, backend="cpu").isfinite().all()  # torch's own kernel: it needs no extension
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
