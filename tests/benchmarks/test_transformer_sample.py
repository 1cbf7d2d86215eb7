"""The baselines of transformer_sample: the cached one draws what its step as one writes it does, call after call."""

import pytest
import torch

from genengine.benchmarks import bench_transformer_sample as rows
from genengine.benchmarks.registry import Case

SHAPES = [(3, 7, 16, 2, 5), (1, 9, 24, 1, 2), (17, 5, 64, 3, 33)]  # sequences, tokens, D, blocks, values of a token


def work_of(shape, dtype):
    return rows.Sampling(Case(shape, dtype, "cpu", ""))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cached_baseline_draws_what_the_step_as_written_draws(shape, dtype):
    work = work_of(shape, dtype)
    first = work.cached()
    assert torch.equal(first, work.plain.written()) and torch.equal(work.cached(), first)
    assert len(first.unique()) > 1
    work.check()


def test_bfloat16_stands_beside_eager_in_float32_too():
    names = {dtype: set(rows.sampling(Case(SHAPES[0], dtype, "cpu", "")).variants) for dtype in rows.NATS}
    assert names[torch.bfloat16] - names[torch.float32] == {"eager, cached, float32"}
