"""The baselines of pixelcnn_sample: both draw our images, and the naive one is the loop that it is taken for."""

import numpy as np
import pytest
import torch

from genengine import ops
from genengine.benchmarks import bench_pixelcnn_sample as rows
from genengine.benchmarks.registry import Case

SHAPES = [(3, 2, 6), (1, 1, 5), (2, 4, 3), (20, 3, 2)]  # images, layers, height = width


def work_of(shape):
    return rows.Sampling(Case(shape, torch.float32, "cpu", ""))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cached_baseline_draws_our_images_again_and_again(shape):
    work = work_of(shape)
    first = work.cached().clone()
    assert rows.images_that_part(work.draw(), first, 256) <= 1
    assert torch.equal(work.cached(), first)
    assert len(first.unique()) > first.numel() // 4  # images that do not vary would hide what is wrong


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_as_many_naive_passes_as_the_row_says_are_the_whole_loop(shape):
    work = work_of(shape)
    passes = work.repeats["eager, naive"]
    assert passes == shape[2] ** 2
    for _ in range(passes):
        x = work.naive()
    assert rows.images_that_part(work.draw(), x.clone(), 256) <= 1
    by_reference = ops.pixelcnn_sample(work.weights[torch.float32], shape[0], seed=0, order="naive").x
    assert rows.images_that_part(by_reference, x, 256) <= 1
    x = x.clone()
    for _ in range(passes):  # the loop begins anew, and what the last one left changes nothing
        again = work.naive()
    assert torch.equal(again, x)


def test_many_images_are_passes_over_parts_of_them():
    work = work_of((20, 3, 2))
    assert len(work.naive.x) == 10 and work.repeats == {"eager, naive": 2 * 4}
    work = work_of((68, 1, 2))
    assert len(work.cached.x) == 34 and work.repeats == {"eager, naive": 17 * 4, "eager, cached": 2}
    work.check()


def test_images_may_part_at_an_edge_alone():
    x = torch.full((3, 1, 2, 2), -1.0)
    edge, wrong = x.clone(), x.clone()
    edge[1].view(-1)[1:] = torch.tensor([-1 + 2 / 255, 0.3, 0.9])
    wrong[1].view(-1)[2] = -1 + 4 / 255
    assert rows.images_that_part(x, x, 256) == 0 and rows.images_that_part(x, edge, 256) == 1
    with pytest.raises(AssertionError, match="part at pixel 2 by 2 levels"):
        rows.images_that_part(x, wrong, 256)


def test_what_is_published_is_what_the_paper_says():
    sizes, speedups = map(list, zip(*rows.FAST_PIXELCNN.speedups.items(), strict=True))
    assert sizes == list(2 ** np.arange(9)) and speedups == [2, 4, 6, 10, 18, 33, 61, 109, 183]


def test_a_sweep_scales_one_axis_of_the_first_row():
    from genengine.benchmarks import registry

    entry = registry.find("pixelcnn_sample")
    shapes = {axis: [case.shape for case in entry.cases("cpu", sweep=axis)] for axis in entry.axes}
    assert shapes["depth"] == [(16, 4, 28), (16, 7, 28), (16, 14, 28)]
    assert shapes["size"] == [(16, 7, 14), (16, 7, 28), (16, 7, 56)]
    assert [batch for batch, *_ in shapes["batch"]] == [1, 2, 4, 8, 16, 32, 64]
