"""Ceilings: which one binds, and that measuring gives what a report and the profiler can use."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_support import CEILINGS

from genengine.benchmarks import ceilings
from genengine.benchmarks.ceilings import Ceilings
from genengine.ops._cost import Cost


def test_bandwidth_is_the_better_stream_and_falls_with_the_working_set():
    assert CEILINGS.bandwidth(1 << 20) == pytest.approx(2e10)
    assert CEILINGS.bandwidth(1) == pytest.approx(4e10) and CEILINGS.bandwidth(1 << 40) == pytest.approx(1e10)
    assert 1e10 < CEILINGS.bandwidth(1 << 22) < 2e10


@pytest.mark.parametrize(
    ("cost", "seconds", "name"),
    [
        (Cost(1 << 25), (1 << 25) / 1e10, "bandwidth"),
        (Cost(1000, flops=10**9), 1e-2, "matrix products"),
        (Cost(1000, flops=10**6, exps=10**6), 1e-3, "exponentials"),
        (Cost(16), 1e-6, "launch"),
    ],
)
def test_the_ceiling_that_binds(cost, seconds, name):
    floor, found = CEILINGS.floor(cost, torch.float32)
    assert found == name and floor == pytest.approx(seconds)


def test_rotated_inputs_are_held_to_the_bandwidth_of_all_of_them():
    cost = Cost(1 << 20)
    assert CEILINGS.floor(cost, torch.float32)[0] == pytest.approx((1 << 20) / 2e10)
    assert CEILINGS.floor(cost, torch.float32, footprint=1 << 25) == pytest.approx(((1 << 20) / 1e10, "bandwidth"))
    assert CEILINGS.floor(cost, torch.float32, footprint=1 << 15) == CEILINGS.floor(cost, torch.float32)


def test_exponentials_that_were_not_measured_bind_nothing_and_say_why():
    without = replace(CEILINGS, exps=None, missing={"exps": "RuntimeError: no compiler"})
    assert without.floor(Cost(1000, flops=10**6, exps=10**9), torch.float32)[1] == "matrix products"
    assert Ceilings.from_json(without.to_json()) == without
    assert "no exps: RuntimeError: no compiler" in ceilings.describe(without)
    assert "exponentials" not in ceilings.describe(without)


class Device:
    """A tensor library that takes the place of torch: tensors of a GPU, and its run-time compiler."""

    float32 = torch.float32

    def __init__(self, create):
        self.cuda = SimpleNamespace(jiterator=SimpleNamespace(_create_jit_fn=create))

    def full(self, shape, value, device):
        assert device == "cuda"
        return torch.full(shape, value)


def test_a_gpu_computes_many_exponentials_of_every_element(monkeypatch):
    sources = []
    monkeypatch.setattr(ceilings, "torch", Device(lambda source: sources.append(source) or torch.neg))
    monkeypatch.setattr(ceilings, "_best", lambda function, kind: 0.5 if function().numel() == 2**22 else 1.0)
    assert ceilings._exponentials("cuda") == (256 * 2**22 / 0.5, {})
    assert "i < 256;" in sources[0] and torch.cuda.jiterator._create_jit_fn(sources[0]).kernel_name == "exponentials"


def test_a_gpu_without_a_compiler_has_no_exponentials(monkeypatch):
    def create(source):
        raise RuntimeError("no nvrtc\nin this build")

    monkeypatch.setattr(ceilings, "torch", Device(create))
    assert ceilings._exponentials("cuda") == (None, {"exps": "RuntimeError: no nvrtc"})


def test_a_dtype_without_a_measured_product_takes_the_fastest():
    assert CEILINGS.floor(Cost(1, flops=10**9), torch.float16) == CEILINGS.floor(Cost(1, flops=10**9), torch.float32)


def test_measured_ceilings_are_positive_and_survive_a_file(monkeypatch):
    monkeypatch.setattr(ceilings, "WORKING_SETS", {"cpu": [2**15, 2**18]})
    monkeypatch.setattr(ceilings, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "ROUNDS", 2)
    lines = []
    found = ceilings.measure("cpu", [torch.float32, torch.bfloat16], report=lines.append)
    assert set(found.copy) == set(found.triad) == {2**15, 2**18} and set(found.matmul) == {"float32", "bfloat16"}
    assert min(*found.copy.values(), *found.triad.values(), *found.matmul.values(), found.exps, found.launch) > 0
    as_text = {key: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
               for key, value in found.to_json().items()}  # fmt: skip
    assert Ceilings.from_json(as_text) == found
    assert "GB/s" in lines[0] and "exponentials" in lines[0]


def test_a_slower_product_in_the_kernels_own_dtype_bounds_nothing():
    found = replace(CEILINGS, matmul={"float32": 1e11, "bfloat16": 5e10, "float64": 3e10})
    assert found.floor(Cost(1, flops=10**9), torch.bfloat16)[0] == pytest.approx(1e-2)
    assert found.floor(Cost(1, flops=10**9), torch.float64)[0] == pytest.approx(1e-2)
    faster = replace(CEILINGS, matmul={"float32": 1e11, "bfloat16": 8e11})
    assert faster.floor(Cost(1, flops=8 * 10**9), torch.bfloat16)[0] == pytest.approx(1e-2)
    assert faster.floor(Cost(1, flops=10**9), torch.float32)[0] == pytest.approx(1e-2)
