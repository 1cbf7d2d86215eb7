"""`profile` on a CUDA device: kernels by correlation, gaps, waits with their lines, and NVTX ranges that are taken."""

import pytest
import torch

from genengine import ops, profiling
from genengine.profiling import targets

pytestmark = pytest.mark.gpu


def test_kernels_have_device_times_and_item_is_a_wait():
    x = torch.randn(2048, 2048, device="cuda")

    def work():
        y = x @ x
        return (y / y.norm().item()).sin()

    found = profiling.profile(work, device="cuda", repeats=3)
    times = {kernel.name: kernel.seconds for kernel in found.kernels}
    assert times["aten::mm"] > times["aten::sin"] > 0 and found.missing == 0
    assert found.busy <= found.profiled
    (sync,) = [sync for sync in found.syncs if "item" in sync.call]
    assert sync.count == 1 and sync.seconds > 0 and "test_profiling.py" in sync.line
    assert "launch gaps" in found.table()


def test_our_kernel_is_seen_and_its_bandwidth_is_plausible():
    x, rows = torch.randn(16, 256, 1152, device="cuda"), torch.randn(16, 2304, device="cuda")
    found = profiling.profile(lambda: ops.adaln(x, rows[:, :1152], rows[:, 1152:]), device="cuda", repeats=5)
    (kernel,) = [kernel for kernel in found.kernels if "adaln" in kernel.name]
    assert 1e10 < kernel.bandwidth < 1e14


def test_a_captured_loop_is_reported_by_the_kernels_own_names():
    target = targets.resolve("flow.sample", targets.Request(torch.device("cuda"), num=4, steps=4))
    found = profiling.profile(target.function, device="cuda", repeats=2)
    assert any(kernel.bytes is None and kernel.seconds > 0 for kernel in found.kernels)
    assert any("CUDA graph" in note for note in found.notes)
    assert all(kernel.seconds > 0 for kernel in found.kernels)
    assert found.bytes == sum(kernel.bytes or 0 for kernel in found.kernels)


def test_the_device_is_that_of_the_tensors():
    on_cpu, on_gpu = torch.randn(64), torch.randn(64, device="cuda")
    assert profiling.profile(lambda: on_cpu.sin(), repeats=1).device == "cpu"
    assert profiling.profile(lambda: on_gpu.sin(), repeats=1).device == "cuda"
    with pytest.raises(ValueError, match="device is cpu, but the function's tensors are on cuda"):
        profiling.profile(lambda: on_gpu.sin(), device="cpu")


def test_the_first_pass_holds_no_kernel_of_the_warm_up():
    """One pass, whose kernels outlast the host by far: each must be there once."""
    x = torch.randn(8192, 8192, device="cuda")
    found = profiling.profile(lambda: x @ x, device="cuda", repeats=1)
    assert found.busy <= found.profiled and [kernel.calls for kernel in found.kernels] == [1]


def test_nvtx_ranges_are_taken_by_the_driver(monkeypatch):
    opened, real = [], torch.cuda.nvtx.range_push
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda label: opened.append((label, real(label))))
    with profiling.nvtx():
        ops.normal((2, 8), seed=0, device="cuda")
    labels = [label for label, _ in opened]
    assert any(label.startswith("genengine::normal [") for label in labels)
    assert all(depth >= 0 for _, depth in opened)  # negative: the call failed
