"""The integrals of exponential integrators against their recursion in 80-digit arithmetic."""

from decimal import Decimal, getcontext

import numpy as np
import pytest

from genengine.solvers._exponential import moments, usable


@pytest.mark.parametrize("h", [1e-9, 1e-4, 0.03, 1.0, 7.5, 40.0, -1e-6, -0.2, -3.0, -40.0])
def test_moments(h):
    """J_0 = 1 - exp(-h), J_k = 1 - k J_(k-1)/h, by parts."""
    getcontext().prec = 80
    exact = [1 - (-Decimal(h)).exp()]
    for k in range(1, 4):
        exact.append(1 - k * exact[-1] / Decimal(h))
    np.testing.assert_allclose(moments(h, 4), [float(j) for j in exact], rtol=2e-13)


def test_infinite_steps_take_no_history():
    lam = [-np.inf, -1.0, 0.0, 2.0, np.inf]
    assert [usable(lam, i, 3) for i in range(4)] == [[0], [1], [2, 1], [3]]
    assert usable([-1.0, 0.0, 2.0, 3.0], 2, 2) == [2, 1]
