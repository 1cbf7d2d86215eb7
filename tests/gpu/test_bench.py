"""The benchmark harness on a GPU: graphs, cold and hot, ceilings. Marked gpu: `make gpu` runs it."""

import pytest
import torch

from genengine import _capture, paths, sample, schedules, solvers
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


def test_one_variant_that_cannot_be_captured_puts_the_row_on_plain_calls_and_breaks_nothing():
    x = torch.ones(8, device="cuda")
    stream = torch.cuda.current_stream()
    variants = {"waits": [lambda: x.sum().item()], "fused": [lambda: x.add_(0)], "draws": [lambda: torch.randn_like(x)]}
    found, failures = timers.samplers(variants, "cuda")
    assert failures == {} and {sample.clock for sample in found.values()} == {"events around plain calls"}
    assert all(sample.reason.startswith("waits cannot be captured") and sample(2)[0] > 0 for sample in found.values())
    assert torch.cuda.current_stream() == stream and torch.randn(8, device="cuda").isfinite().all()
    del variants["waits"]
    found, _ = timers.samplers(variants, "cuda")  # a later capture, of the generator too
    assert {sample.clock for sample in found.values()} == {"events around a graph"}
    assert all(sample(2)[0] > 0 for sample in found.values())


def test_random_numbers_go_on_after_a_failed_capture():
    torch.manual_seed(3)
    torch.randn(4, device="cuda")
    expected = torch.randn(4, device="cuda")
    torch.manual_seed(3)
    torch.randn(4, device="cuda")
    graph, x = torch.cuda.CUDAGraph(), torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError), _capture.capturing(graph, torch.cuda.Stream()):
        x.sum().item()
    assert torch.equal(torch.randn(4, device="cuda"), expected)


def test_a_backward_pass_is_captured():
    with timers.stream_of("cuda"):
        x = torch.randn(64, 64, device="cuda", requires_grad=True)
        y, upstream = (x @ x).tanh(), torch.ones(64, 64, device="cuda")

        def backward():
            return torch.autograd.grad(y, x, upstream, retain_graph=True)

        sample = timers.sampler([backward], "cuda")
        assert (sample.clock, sample.reason) == ("events around a graph", None) and sample(2)[0] > 0


def test_slow_functions_are_captured_once():
    x = torch.zeros(2**28, device="cuda")

    def slow():
        for _ in range(8):
            x.add_(1)

    assert timers.sampler([slow], "cuda").calls == 1 and timers.sampler([slow] * 3, "cuda").calls == 3
    assert timers.sampler([x[:64].zero_], "cuda").calls == timers.GRAPH_CALLS


def test_sampling_inside_a_capture_does_not_capture_and_fails_as_torch_does():
    """The coefficients are copied from the host, which no capture allows; what follows must work all the same."""
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(2), prediction="velocity")

    def run():
        return sample(lambda x, t: x, table, (1, 4), device="cuda")

    clock = timers.sampler([run], "cuda")
    assert clock.clock == "events around plain calls" and clock(1)[0] > 0 and run().isfinite().all()


def test_more_work_takes_longer():
    small, large = (torch.zeros(n, device="cuda") for n in (2**20, 2**28))
    times = harness.time_variants({"small": [small.zero_], "large": [large.zero_]}, device="cuda", budget=0.2)
    assert times["large"].median > 10 * times["small"].median


def test_ceilings_of_a_gpu():
    found = ceilings.measure("cuda", [torch.float32, torch.bfloat16])
    assert found.matmul["bfloat16"] > found.matmul["float32"] > 1e12 and found.bandwidth(1 << 30) > 1e11
    assert found.missing == {}
    assert found.exps > 2 * found.bandwidth(1 << 30) / 8  # what memory allows where each is read and written


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
