"""Rotary tables against their formula, on one axis and more."""

import math

import pytest
import torch

from genengine.rotary import grid_positions, rope_table


def test_one_axis_by_the_formula():
    cos, sin = rope_table(torch.tensor([0, 1, 7, 100000]), 6, theta=500.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (4, 3)
    for n, position in enumerate((0, 1, 7, 100000)):
        for j in range(3):
            angle = position * 500.0 ** (-2 * j / 6)
            assert cos[n, j].item() == pytest.approx(math.cos(angle), abs=1e-7)  # float32 angles would err by 1e-3
            assert sin[n, j].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_axes_stand_side_by_side():
    positions = grid_positions(2, 3, 4)
    assert positions.tolist() == [[a, b, c] for a in range(2) for b in range(3) for c in range(4)]
    cos, sin = rope_table(positions, 16, axes=(4, 6, 6))
    for axis, (first, last, part) in enumerate(((0, 2, 4), (2, 5, 6), (5, 8, 6))):
        alone = rope_table(positions[:, axis], part)
        assert torch.equal(cos[:, first:last], alone[0]) and torch.equal(sin[:, first:last], alone[1])


@pytest.mark.parametrize(
    ("dim", "count", "axes"), [(64, 3, (22, 22, 20)), (72, 2, (36, 36)), (8, 1, (8,)), (2, 2, (2, 0))]
)
def test_the_default_split(dim, count, axes):
    positions = torch.rand(5, count) * 10
    given = rope_table(positions, dim, axes=axes)
    assert all(torch.equal(a, b) for a, b in zip(rope_table(positions, dim), given, strict=True))


def test_no_positions():
    assert rope_table(torch.zeros(0), 4)[0].shape == rope_table(torch.zeros(0, 2), 4)[0].shape == (0, 2)
    assert grid_positions(0, 3).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rope_table([0, 1], 4), TypeError, "positions must be a tensor of integers or floats, got list"),
        (lambda: rope_table(torch.zeros(2, 2, 2), 4), ValueError, "positions must be \\(N,\\) or \\(N, A\\)"),
        (lambda: rope_table(torch.zeros(2), 3), ValueError, "dim must be even and at least 2, got 3"),
        (lambda: rope_table(torch.zeros(2), 4, theta=0), ValueError, "theta must be positive, got 0"),
        (lambda: rope_table(torch.zeros(2, 2), 8, axes=(3, 5)), ValueError, "axes must be 2 even sizes that sum to 8"),
        (lambda: rope_table(torch.zeros(2, 2), 8, axes=(8,)), ValueError, "axes must be 2 even sizes"),
        (lambda: grid_positions(), ValueError, "at least one size"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
