"""The timing protocol: what it computes from known durations, what a row says, and that a row fails alone."""

import numpy as np
import pytest
import torch
from bench_support import CEILINGS, case, entry, of_durations, report

from genengine import testing
from genengine.benchmarks import harness, registry, results, suite, table
from genengine.benchmarks.registry import Benchmark, Goal, Published, faster, faster_on_the_wall, within
from genengine.ops._cost import Cost


def test_ratios_of_known_durations(clock):
    found = harness.run(entry(of_durations(clock, fused=1e-3, eager=3e-3, copy_=5e-4)), case(), budget=1)
    assert found["variants"]["fused"]["median"] == pytest.approx(1e-3)
    assert {name: entry["ratio"] for name, entry in found["ratios"].items()} == pytest.approx(
        {"eager": 3, "copy_": 0.5}
    )
    assert found["ratios"]["eager"]["low"] == pytest.approx(3) == found["ratios"]["eager"]["high"]
    results.validate(report(suite._plain(found)))


def test_the_ratio_is_paired_and_its_interval_holds_it():
    drift = np.linspace(1, 3, 101)  # the machine slows down: both variants with it
    noise = np.random.default_rng(0).normal(1, 0.05, 101)
    low_and_high = harness.ratio(harness.Timing(list(2 * drift * noise)), harness.Timing(list(drift)))
    value, low, high = low_and_high
    assert low <= value <= high and value == pytest.approx(2, rel=0.03) and high - low < 0.1


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draws, covered = np.random.default_rng(1), 0
    for _ in range(200):
        paired = 2 * np.exp(draws.normal(0, 0.1, 41))
        _, low, high = harness.ratio(harness.Timing(list(paired)), harness.Timing([1.0] * 41))
        covered += low <= 2 <= high
    assert 180 <= covered <= 199  # 95 % of 200, within three standard deviations and a half


def test_variants_take_turns_and_none_always_follows_the_same(clock):
    order = []

    def noting(name):
        run = clock.work(3e-3)  # longer than a sample: one call each
        return lambda: (order.append(name), run())

    harness.time_variants({name: [noting(name)] for name in "abc"}, budget=0.1)
    timed = order[len(order) % 3 :][6:]
    rounds = {tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)}
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len(rounds) >= 4


def test_the_budget_bounds_the_time(clock):
    harness.time_variants({"a": [clock.work(1e-3)], "b": [clock.work(2e-3)]}, budget=2.0)
    assert 1.0 < clock.now < 2.5
    clock.now = 0.0
    timings = harness.time_variants({"a": [clock.work(10.0)]}, budget=2.0)
    assert len(timings["a"].samples) == harness.MIN_ROUNDS  # never fewer, however long they take


def test_rotated_inputs_each_get_their_turn(clock):
    counts = [0, 0, 0]

    def noting(i):
        run = clock.work(1e-4)

        def call():
            counts[i] += 1
            run()

        return call

    timing = harness.time_variants({"a": [noting(i) for i in range(3)]}, budget=0.1)["a"]
    assert len(set(counts)) == 1 and timing.median == pytest.approx(1e-4)


def test_goals_are_judged(clock):
    goals = (faster("eager", 2.0), faster("eager", 4.0), within(1.5, "copy_"), Goal("ns", "fused", "", 2e3, False))
    goals += (faster("absent", 1.0),)
    make = of_durations(clock, fused=1e-3, eager=3e-3, copy_=5e-4)
    found = harness.run(
        entry(lambda case: Benchmark(make(case).variants, lambda: None, elements=1000, goals=goals)), case(), budget=0.1
    )
    assert [goal["reached"] for goal in found["goals"]] == [True, False, False, True]


def test_threads_are_judged_by_the_clock_on_the_wall(clock, monkeypatch):
    """Two threads take as much process time as one, in half the time."""
    spare = [0.0]
    monkeypatch.setattr(clock, "perf_counter", lambda: clock.now - spare[0], raising=False)

    def two_threads():
        clock.now += 2e-3
        spare[0] += 1e-3

    variants = {"fused": clock.work(2e-3), "fused, 2 threads": two_threads}
    goals = tuple(goal("fused", 1.8, "fused, 2 threads") for goal in (faster, faster_on_the_wall))
    made = entry(lambda case: Benchmark(variants, lambda: None, goals=goals))
    by_process, on_the_wall = harness.run(made, case(), budget=0.1)["goals"]
    assert not by_process["reached"] and by_process["value"] == pytest.approx(1)
    assert on_the_wall["reached"] and on_the_wall["value"] == pytest.approx(2)
    assert on_the_wall["goal"] == "fused / fused, 2 threads on the wall >= 1.8"


def test_a_variant_of_which_a_part_is_timed_counts_as_the_whole(clock):
    published = (Published("a paper", "batch", "eager, naive", {1: 2, 4: 3.5}),)
    make = of_durations(clock, **{"fused": 1e-3, "eager, naive": 4e-3})
    whole = {"repeats": {"eager, naive": 100, "absent": 3}, "published": published}
    whole |= {"goals": (faster("eager, naive", 300),)}
    made = entry(lambda case: Benchmark(make(case).variants, lambda: None, **whole))
    found = harness.run(made, case(), budget=0.1)
    assert found["repeats"] == {"eager, naive": 100} and found["goals"][0]["reached"]
    naive = found["variants"]["eager, naive"]
    assert [naive[name] for name in ("min", "median", "wall")] == pytest.approx([0.4] * 3)
    assert found["variants"]["fused"]["median"] == pytest.approx(1e-3)
    assert found["ratios"]["eager, naive"]["ratio"] == pytest.approx(400)
    assert found["published"][0]["speedups"] == {"1": 2.0, "4": 3.5}
    assert "eager, naive: 100 passes, one timed" in table.lines(found)
    assert "eager, naive 400 (100 passes, one timed)" in table.markdown_row(found)
    results.validate(report(suite._plain(found)))


def test_accuracy_comes_first_and_a_wrong_kernel_is_never_timed():
    calls = []

    def make(case):
        def check():
            testing.assert_within(3.0, 2.0, "adaln")

        return Benchmark({"fused": lambda: calls.append(1)}, check)

    found = harness.run(entry(make), case())
    assert "error 3 against float64, allowed 2" in found["error"] and not calls


def test_the_row_names_the_largest_error_and_what_was_allowed():
    def check():
        testing.assert_within(1.0, 8.0, "x'")
        testing.assert_within(3.0, 4.0, "h")

    found = harness.run(entry(lambda case: Benchmark({"fused": lambda: None}, check)), case(), budget=0.01)
    assert found["accuracy"] == {"error": 3.0, "allowed": 4.0, "of": "h"}


@pytest.mark.parametrize("where", ["make", "check", "fused"])
def test_what_raises_is_a_row_that_says_so(where):
    def fail(*_):
        raise RuntimeError("no such kernel")

    def make(case):
        if where == "make":
            fail()
        return Benchmark(
            {"fused": fail if where == "fused" else lambda: None}, fail if where == "check" else lambda: None
        )

    assert harness.run(entry(make), case())["error"] == "RuntimeError: no such kernel"


def test_a_variant_that_raises_is_skipped_with_the_reason_and_the_rest_is_timed():
    def fail():
        raise NotImplementedError("needs a GPU")

    make = lambda case: Benchmark({"fused": lambda: None, "peer": fail, "eager": lambda: None}, lambda: None)  # noqa: E731
    found = harness.run(entry(make), case(), budget=0.01)
    assert found["skipped"] == {"peer": "NotImplementedError: needs a GPU"} and set(found["ratios"]) == {"eager"}


def test_a_baseline_is_held_to_the_oracle_and_a_missing_one_says_what_to_install():
    x = torch.randn(64)
    made = entry(lambda case: Benchmark({"fused": lambda: x.exp()}, lambda: None, inputs=(x,), oracle=torch.exp))
    made.baselines.extend(
        [
            registry.Baseline("right", torch.exp),
            registry.Baseline("wrong", lambda x: x.exp() + 1e-3),
            registry.Baseline("elsewhere", torch.exp, "no_such_module"),
        ]
    )
    found = harness.run(made, case(), budget=0.01)
    assert set(found["ratios"]) == {"right"}
    assert "against float64" in found["skipped"]["wrong"]
    assert found["skipped"]["elsewhere"] == "no_such_module is not installed"


def test_throughput_is_cost_over_time_and_a_share_of_the_ceiling(clock):
    cost = Cost(bytes=10**6, flops=10**6, exps=10**3)
    make = lambda case: Benchmark({"fused": clock.work(1e-3)}, lambda: None, cost=cost)  # noqa: E731
    found = harness.run(entry(make), case(), budget=0.1, ceilings=CEILINGS)
    assert found["GB_per_s"] == pytest.approx(1) and found["TFLOP_per_s"] == pytest.approx(1e-3)
    assert found["ceiling"]["name"] == "bandwidth" and found["ceiling"]["percent"] == pytest.approx(
        1e9 / CEILINGS.bandwidth(10**6) * 100
    )


def test_compile_modes_are_chosen():
    x = torch.randn(16)
    make = lambda case: Benchmark(  # noqa: E731
        {"fused": lambda: x + 1, "torch.compile": lambda: x + 1}, lambda: None, compiles=(lambda x: x + 1, (x,))
    )
    assert set(harness.run(entry(make), case(), budget=0.01, compile_modes=())["ratios"]) == set()
    found = harness.run(entry(make), case(), budget=0.01, compile_modes=("default", "max-autotune"))
    assert set(found["ratios"]) == {"torch.compile", "torch.compile, max-autotune"}, found


def test_a_ratio_that_moves_between_passes_has_an_interval_that_says_so():
    ours = harness.Timing([1.0] * 20) + harness.Timing([1.0] * 20) + harness.Timing([1.0] * 20)
    theirs = harness.Timing([2.0] * 20) + harness.Timing([2.4] * 20) + harness.Timing([2.2] * 20)
    value, low, high = harness.ratio(theirs, ours)
    assert value == pytest.approx(2.2) and low == pytest.approx(2.0) and high == pytest.approx(2.4)


def test_ops_are_timed_over_fresh_inputs_and_models_over_one_set(clock):
    made = []

    def make(case):
        made.append(case)
        return Benchmark({"fused": clock.work(1e-3), "eager": clock.work(2e-3)}, lambda: None)

    found = harness.run(entry(make), case(), budget=0.5)
    assert len(made) == harness.PASSES and found["samples"] >= harness.MIN_ROUNDS and found["sets"] == 1
    made.clear()
    harness.run(entry(make, kind="models"), case(), budget=0.5)
    assert len(made) == 1


def test_inputs_are_drawn_alike_in_every_run_of_a_row():
    drawn = []

    def make(case):
        drawn.append(torch.randn(4))
        return Benchmark({"fused": lambda: None}, lambda: None)

    for _ in range(2):
        harness.run(entry(make, kind="models"), case(), budget=0.01)
        torch.randn(7)
    assert torch.equal(*drawn)


def test_baselines_without_an_oracle_are_said_to_be_unchecked_and_first_calls_are_the_rivals():
    made = entry(lambda case: Benchmark({"fused": lambda: 1, "eager": lambda: 1}, lambda: None, inputs=(1,)))
    made.baselines.append(registry.Baseline("theirs", lambda x: x))
    found = harness.run(made, case(), budget=0.01)
    assert found["unchecked"] == ["theirs"] and set(found["first_call"]) == {"eager", "theirs"}


def test_a_row_that_compiles_in_one_mode_says_so():
    make = lambda case: Benchmark({"fused": lambda: None, "torch.compile": lambda: None}, lambda: None)  # noqa: E731
    found = harness.run(entry(make), case(), budget=0.01, compile_modes=("max-autotune",))
    assert "default mode alone" in found["skipped"]["torch.compile, max-autotune"] and not found["ratios"]


def test_backends_are_timed_beside_the_choice_and_held_to_the_check():
    """As on a GPU, where "cuda" and "triton" are: what cannot run or is wrong is named."""
    one = registry.find("adaln")
    small = registry.Case((2, 3, 8), torch.float32)
    skipped = {}
    found = harness.on_backends(("reference", "cuda"), one, small, 2, skipped)
    assert list(found) == ["fused, reference"] and len(found["fused, reference"]) == 2
    assert "backend 'cuda' cannot run here" in skipped["fused, cuda"]
    assert all(run().shape == (2, 3, 8) for run in found["fused, reference"])


def test_a_backend_that_is_wrong_is_not_timed():
    def make(case):
        def check():
            raise AssertionError("fused errs by 3")

        return Benchmark({"fused": lambda: None}, check)

    skipped = {}
    assert harness.on_backends(("reference",), entry(make), case(), 1, skipped) == {}
    assert skipped == {"fused, reference": "AssertionError: fused errs by 3"}
