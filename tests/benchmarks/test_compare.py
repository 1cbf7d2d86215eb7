"""The regression gate: a slowed kernel is caught, honest runs pass, and nothing is compared in silence."""

import numpy as np
import pytest
from bench_support import case, entry, report, row

from genengine.benchmarks import compare, harness, results
from genengine.benchmarks.registry import Benchmark


def test_a_loss_beyond_threshold_and_interval_fails():
    verdict = compare.compare(report(row(ratio=3.0)), report(row(ratio=2.0)))
    assert (
        not verdict.passed
        and "adaln small 4x8 float32: eager / fused was 3.00, is 2.00 (-33%" in verdict.describe()
        and "FAILED" in verdict.describe()
    )


@pytest.mark.parametrize(("ratio", "width"), [(2.8, 0.01), (3.5, 0.01), (2.6, 0.10), (2.71, 0.001)])
def test_within_threshold_or_noise_passes(ratio, width):
    assert compare.compare(report(row(ratio=3.0, width=width)), report(row(ratio=ratio, width=width))).passed


def test_a_wide_interval_does_not_hide_a_halved_ratio():
    assert not compare.compare(report(row(ratio=3.0, width=0.1)), report(row(ratio=1.5, width=0.1))).passed


def test_a_loss_must_repeat():
    asked = []

    def again(key):
        asked.append(key)
        return row(ratio=3.0)

    assert compare.compare(report(row(ratio=3.0)), report(row(ratio=2.0)), again=again).passed and len(asked) == 1
    verdict = compare.compare(report(row(ratio=3.0)), report(row(ratio=2.0)), again=lambda key: row(ratio=2.1))
    assert not verdict.passed and 2 < verdict.losses[0].new < 2.1


def test_the_strongest_eager_of_the_old_report_counts():
    old = row(ratios={n: {"ratio": r, "low": r, "high": r} for n, r in (("eager, a", 4.0), ("eager, b", 2.0))})
    new = row(ratios={n: {"ratio": r, "low": r, "high": r} for n, r in (("eager, a", 1.0), ("eager, b", 2.0))})
    assert compare.compare(report(old), report(new)).passed


def test_failed_missing_and_nothing_shared():
    failed = {**row(), "error": "AssertionError: wrong"}
    assert (
        "failed: adaln small 4x8 float32: AssertionError: wrong"
        in compare.compare(report(row()), report(failed)).describe()
    )
    verdict = compare.compare(report(row(), row("glu")), report(row()))
    assert verdict.passed and "not run now: glu" in verdict.describe()
    verdict = compare.compare(report(row("glu")), report(row()))
    assert not verdict.passed and "nothing was compared" in verdict.describe()
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 10"):
        compare.compare(report(row()), report(row()), threshold=10)


def noisy(clock, seconds, draws):
    """Work that takes about as long as it should: 10 % up or down, and a bad moment now and then."""

    def run():
        clock.now += seconds * float(np.exp(draws.normal(0, 0.1)) * (3 if draws.random() < 0.02 else 1))

    return run


def test_a_kernel_slowed_by_a_quarter_is_caught_and_honest_noise_is_not(clock):
    draws = np.random.default_rng(0)

    def measured(slowdown=1.0):
        make = lambda case: Benchmark(  # noqa: E731
            {"fused": noisy(clock, 1e-3 * slowdown, draws), "eager": noisy(clock, 3e-3, draws)}, lambda: None
        )
        return harness.run(entry(make), case(), budget=0.5)

    old = report(measured())
    for _ in range(20):
        assert compare.compare(old, report(measured()), again=lambda key: measured()).passed
        slowed = compare.compare(old, report(measured(1.25)), again=lambda key: measured(1.25))
        assert not slowed.passed and "made up" in slowed.describe()


def at(time, **extra):
    made = report(row(ratio=float(time[8:10])))
    return made | {"environment": made["environment"] | {"time": time}} | extra


def test_a_folder_gives_the_newest_result_of_this_device_and_suite(tmp_path):
    for made in (at("2026-01-02T08"), at("2026-01-02T09"), at("2026-01-05T00", suite="all"),
                 at("2026-01-06T00", options={"shape": [1, 2]})):  # fmt: skip
        made["environment"]["commit"] = f"abc{made['environment']['time'][-2:]}"
        results.save(made, results.path_of(made, tmp_path))
    elsewhere = at("2026-01-09T00")
    elsewhere["environment"]["device"] = "other"
    results.save(elsewhere, results.path_of(elsewhere, tmp_path))
    (tmp_path / "made-up-cpu" / "2026-03-01-abc-quick.json").write_text('{"schema_version": 1}')
    found, same = compare.find_old(str(tmp_path), {"device": "made-up CPU"}, "quick")
    assert same and found["environment"]["time"] == "2026-01-02T09"
    found, same = compare.find_old(str(tmp_path), {"device": "unheard of"}, "quick")
    assert not same and found["environment"]["time"] == "2026-01-09T00"
    with pytest.raises(ValueError, match="no result of the suite 'ops' .*of an older version: 2026-03-01-abc-quick"):
        compare.find_old(str(tmp_path), {"device": "made-up CPU"}, "ops")


def test_rows_of_one_shape_and_another_label_are_two(tmp_path):
    old = report(row(label="DiT-S/2"), row(label="DiT-XL/2"))
    new = report(row(label="DiT-S/2", ratio=1.5), row(label="DiT-XL/2"))
    asked = []
    verdict = compare.compare(old, new, again=lambda key: asked.append(key) or row(label="DiT-S/2", ratio=1.5))
    assert not verdict.passed and len(verdict.changes) == 2 and {key[1] for key in asked} == {"DiT-S/2"}


def test_a_baseline_that_is_gone_fails_and_rows_without_one_are_named():
    gone = row(ratios={}, skipped={"eager": "RuntimeError: no"})
    verdict = compare.compare(report(row()), report(gone))
    assert not verdict.passed and "'eager' is gone: RuntimeError: no" in verdict.describe()
    bare = row("trace", ratios={})
    verdict = compare.compare(report(row(), bare), report(row(), bare))
    assert verdict.passed and "without a PyTorch variant: trace" in verdict.describe()


def test_a_repetition_that_fails_is_no_vote():
    with pytest.raises(RuntimeError, match="could be timed once, and then not again: ValueError: no"):
        compare.compare(
            report(row(ratio=3.0)), report(row(ratio=2.0)), again=lambda key: {**row(), "error": "ValueError: no"}
        )


def test_another_machine_or_other_vector_instructions_are_allowed_more(tmp_path):
    path = results.save(report(row()), tmp_path / "x.json")
    assert compare.find_old(str(path), {"device": "made-up CPU"}, "quick")[1]
    assert not compare.find_old(str(path), {"device": "made-up CPU", "isa": "avx2"}, "quick")[1]
    assert (compare.allowed(None, True), compare.allowed(0.25, True)) == (compare.THRESHOLD, 0.25)
    assert (compare.allowed(None, False), compare.allowed(0.7, False)) == (compare.ELSEWHERE, 0.7)
