"""What the model benchmarks compare is the same: a family and its eager twin agree to rounding, samples and losses."""

import importlib

import pytest
import torch

from genengine.models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_of_every_quick_row_agrees(family):
    rows = importlib.import_module(f"genengine.benchmarks.bench_{family}").benchmarks("cpu")
    with torch.no_grad():
        quick = [row for row in rows if row.quick]
        assert quick
        for row in quick:
            row.check()
            assert {"fused", "eager", "torch.compile"} <= set(row.variants)
