"""What the benchmarks time is right: every quick row is built and passes its own check, baselines included."""

import pytest
import torch

from genengine.benchmarks import registry
from genengine.models import FAMILIES

QUICK = [pytest.param(entry, next(entry.cases("cpu", quick=True)), id=entry.name) for entry in registry.select("quick")]


@pytest.mark.parametrize(("entry", "case"), QUICK)
def test_a_quick_row_is_right_and_every_variant_runs(entry, case):
    with torch.no_grad():
        work = entry.make(case)
        work.check()
        assert "fused" in work.variants and all(callable(run) for run in work.variants.values())
        if work.cost is not None:
            assert work.cost.bytes > 0 and work.cost.flops >= work.cost.exps >= 0
        if work.oracle is not None:
            work.oracle(*work.inputs)
        for goal in work.goals:
            named = {goal.over, goal.under} - {""}
            assert named <= set(work.variants) | {"torch.compile"}, f"{goal.describe()} names no variant"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_compared_with_its_eager_twin_and_with_torch_compile(family):
    for entry in registry.groups()[family]:
        if entry.quick:
            work = entry.make(next(entry.cases("cpu", quick=True)))
            assert {"fused", "eager"} <= set(work.variants)
            assert "torch.compile" in work.variants or work.compiles is not None
