"""The registered benchmarks under pytest-benchmark: its storage, comparison and tables, our accuracy and ratios.

    pytest benchmarks/ --benchmark-autosave                      then, later:  --benchmark-compare
    pytest benchmarks/ --suite adaln --benchmark-json out.json

pytest-benchmark times "fused" alone. The interleaved ratios to every other variant, the error against float64, and the
share of the ceiling are in `extra_info`.
"""

import time

import pytest
import torch

from genengine.benchmarks import suite

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'genengine[bench]'")


def test_row(work, device, ceilings, benchmark, pytestconfig):
    entry, case = work
    row = suite.time_one(entry, case, suite.Options(budget=pytestconfig.getoption("--budget")), ceilings)
    if "error" in row:
        pytest.fail(row["error"], pytrace=False)
    benchmark.group = entry.group
    kept = (
        "label",
        "shape",
        "dtype",
        "device",
        "ratios",
        "accuracy",
        "cost",
        "ceiling",
        "GB_per_s",
        "TFLOP_per_s",
        "skipped",
    )
    benchmark.extra_info.update({key: row[key] for key in kept if key in row})
    benchmark._timer = time.process_time if device == "cpu" else time.perf_counter
    with torch.no_grad():
        benchmark.pedantic(_timed(entry.make(case), device), **_effort(row, pytestconfig))


def _timed(work, device):
    if device == "cpu":
        return work.variants["fused"]

    def run():
        work.variants["fused"]()
        torch.cuda.synchronize()

    return run


def _effort(row, config):
    """Rounds of a few milliseconds, within the budget."""
    once = row["variants"]["fused"]["median"]
    iterations = max(1, round(2e-3 / once))
    return {
        "iterations": iterations,
        "rounds": int(min(50, max(5, config.getoption("--budget") / (once * iterations)))),
    }
