"""Ranges that profilers show: named after op, backend and row, nothing when off, and clear where NVTX is missing."""

import pytest
import torch

import genengine
from genengine import ops, paths, schedules, solvers
from genengine.ops import _ranges
from genengine.profiling import nvtx


@pytest.fixture
def stub(monkeypatch):
    """NVTX's push and pop, as a list of what is opened and closed."""
    log = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", log.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append("pop"))
    return log


def call():
    x, rows = torch.randn(2, 3, 8), torch.randn(2, 16)
    return ops.adaln(x, rows[:, :8], rows[:, 8:])


def test_a_kernel_is_named_after_op_and_backend(stub):
    with nvtx():
        call()
        ops.adaln(torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8), backend="reference")
        ops.attention(*torch.randn(3, 1, 4, 2, 8).unbind(0))
    names = [entry for entry in stub if entry != "pop"]
    best = genengine.ops._registry.automatic(genengine.ops._registry.OPS["adaln"], torch.device("cpu"), torch.float32)
    assert names[1:] == [f"genengine::adaln [{best}]", "genengine::adaln [reference]", "genengine::attention [torch]"]
    assert stub.count("pop") == len(names)


def test_the_backward_has_a_range(stub):
    x = torch.randn(2, 3, 8, requires_grad=True)
    with nvtx():
        ops.adaln(x, torch.randn(2, 8), torch.randn(2, 8)).sum().backward()
    assert "genengine::adaln backward" in stub


def test_rows_of_the_sampling_loop_are_numbered_and_hold_the_kernels(stub):
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(3), prediction="velocity")
    with nvtx():
        genengine.sample(lambda x, t: -x, table, (2, 4))
    rows = [entry for entry in stub if entry.startswith("genengine::row")]
    assert rows == ["genengine::row 0", "genengine::row 1", "genengine::row 2"]
    inside = stub[stub.index("genengine::row 1") : stub.index("genengine::row 2")]
    assert any(entry.startswith("genengine::sampler_step") for entry in inside)
    assert stub.count("pop") == len(stub) / 2


def test_off_nothing_is_wrapped(stub):
    op = genengine.ops._registry.OPS["adaln"]
    assert genengine.ops._registry.overload(op, "reference") is op.overloads["reference"]
    call()
    with nvtx():
        pass
    call()
    assert _ranges.kernels is None and _ranges.rows is None
    assert stub == ["genengine", "pop"]  # the look whether there is NVTX


def test_a_range_is_closed_when_the_kernel_raises(stub):
    def fail():
        raise ValueError("no")

    with nvtx(), pytest.raises(ValueError, match="no"):
        _ranges.around(_ranges.kernels, "genengine::x [cpu]", fail)()
    assert stub[-2:] == ["genengine::x [cpu]", "pop"]


def test_compiled_code_stays_one_graph(stub):
    x, rows = torch.randn(2, 3, 8), torch.randn(2, 16)
    function = lambda: ops.adaln(x, rows[:, :8], rows[:, 8:]) * 2  # noqa: E731
    expected = function()
    with nvtx():
        got = torch.compile(function, fullgraph=True, backend="aot_eager")()
    assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_without_nvtx_the_context_raises_and_the_variable_warns(monkeypatch):
    def missing(*_):
        raise RuntimeError("NVTX functions not installed. Are you sure you have a CUDA build?")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", missing)
    with pytest.raises(RuntimeError, match="need a CUDA build of PyTorch"), nvtx():
        pass
    monkeypatch.setenv("GENENGINE_NVTX", "1")
    with pytest.warns(RuntimeWarning, match="GENENGINE_NVTX=1 does nothing"):
        _ranges.from_environment()
    assert _ranges.kernels is None


def test_the_variable_turns_them_on(stub, monkeypatch):
    monkeypatch.setattr(_ranges, "kernels", None)  # restored afterwards
    monkeypatch.setattr(_ranges, "rows", None)
    monkeypatch.setenv("GENENGINE_NVTX", "1")
    _ranges.from_environment()
    call()
    assert any(entry.startswith("genengine::adaln [") for entry in stub)
