"""The benchmark harness on a GPU: graphs, cold and hot, ceilings. Marked gpu: `make gpu` runs it."""

import pytest
import torch

from genengine.benchmarks import ceilings, harness, registry, timers
from genengine.benchmarks.registry import Benchmark, Case

pytestmark = pytest.mark.gpu


def test_a_row_is_timed_cold_and_hot_in_graphs():
    row = harness.run(registry.find("adaln"), Case((4, 256, 384), torch.float32, "cuda"), budget=0.05, compile_modes=())
    assert "error" not in row, row
    for timings in (row["variants"], row["hot"]["variants"]):
        assert timings["fused"]["clock"] == "events around a graph" and timings["fused"]["median"] > 0
    assert set(row["ratios"]) == set(row["hot"]["ratios"])


def test_cold_inputs_exceed_the_cache_three_times():
    entry, case = registry.find("adaln"), Case((16, 256, 1152), torch.float32, "cuda")
    sets = [entry.make(case), *harness._further_sets(entry, case, entry.make(case))]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert sum(work.cost.bytes for work in sets) >= 3 * cache or len(sets) == harness.MAX_SETS
    assert len({work.inputs[0].data_ptr() for work in sets}) == len(sets)


def test_what_cannot_be_captured_is_timed_by_plain_calls():
    x = torch.ones(8, device="cuda")
    sample = timers.sampler([lambda: x.sum().item()], "cuda")
    assert sample.clock == "events around plain calls" and sample(2)[0] > 0
    assert timers.sampler([lambda: x.add_(0)], "cuda")(2)[0] > 0  # the failed capture has broken nothing


def test_more_work_takes_longer():
    small, large = (torch.zeros(n, device="cuda") for n in (2**20, 2**28))
    times = harness.time_variants({"small": [small.zero_], "large": [large.zero_]}, device="cuda", budget=0.2)
    assert times["large"].median > 10 * times["small"].median


def test_ceilings_of_a_gpu():
    found = ceilings.measure("cuda", [torch.float32, torch.bfloat16])
    assert found.matmul["bfloat16"] > found.matmul["float32"] > 1e12 and found.bandwidth(1 << 30) > 1e11


def test_a_failing_variant_leaves_the_device_usable():
    def fail():
        raise RuntimeError("not here")

    x = torch.ones(8, device="cuda")
    registry.register("made up", shapes={"small": (8,)})(
        lambda case: Benchmark({"fused": lambda: x.add_(0), "peer": fail}, lambda: None)
    )
    entry = registry.ENTRIES.pop("made up")
    row = harness.run(entry, Case((8,), torch.float32, "cuda"), budget=0.02)
    assert row["skipped"] == {"peer": "RuntimeError: not here"} and row["variants"]["fused"]["median"] > 0
