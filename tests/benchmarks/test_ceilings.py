"""Ceilings: which one binds, and that measuring gives what a report and the profiler can use."""

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
