"""Paths between latents: ends, midpoints, lengths, and where the sphere gives no path."""

import math

import pytest
import torch

from genengine.models import latent_paths


def test_lerp_is_the_straight_line():
    a, b = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    points = latent_paths.path("lerp", a, b, 5)
    assert points.shape == (3, 5, 2, 4)
    assert torch.equal(points[:, 0], a) and torch.equal(points[:, -1], b)
    torch.testing.assert_close(points[:, 1], 0.75 * a + 0.25 * b)


def test_slerp_is_the_great_circle():
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    points = latent_paths.path("slerp", a, b, 4)
    angle = torch.tensor([0, 30, 60, 90]) * math.pi / 180
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(points, torch.stack([circle, 2 * circle]), rtol=1e-5, atol=1e-6)


def test_slerp_keeps_unit_length_in_many_dimensions():
    a, b = (torch.nn.functional.normalize(torch.randn(4, 50), dim=1) for _ in range(2))
    points = latent_paths.path("slerp", a, b, 7)
    torch.testing.assert_close(points.norm(dim=2), torch.ones(4, 7), rtol=1e-5, atol=0)
    torch.testing.assert_close(points[:, 0], a)
    torch.testing.assert_close(points[:, -1], b)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, 0.0])
def test_slerp_of_parallel_points_is_lerp(factor):
    a = torch.randn(2, 5)
    expected = latent_paths.path("lerp", a, factor * a, 4)
    torch.testing.assert_close(latent_paths.path("slerp", a, factor * a, 4), expected, rtol=1e-5, atol=1e-6)


def test_bad_paths_are_refused():
    a = torch.zeros(1, 2)
    for arguments, message in (
        (("arc", a, a, 3), "kind must be one of lerp, slerp"),
        (("lerp", a, a, 1), "steps must be an int >= 2"),
        (("lerp", a, torch.zeros(2, 2), 3), r"b must be \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            latent_paths.path(*arguments)
