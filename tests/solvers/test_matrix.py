"""Any solver on any path with any prediction and any grid: a table that runs, or an error that says why not."""

import re

import numpy as np
import pytest
from solver_support import ALL, PREDICTIONS, RF, VP, run_table

from genengine import schedules, solvers
from genengine.paths import (
    EDM,
    VE,
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMSigmoid,
    ScaledLinear,
    Sigmoid,
    Trigonometric,
    VPLinear,
    ZeroTerminalSNR,
)

PATHS = [
    RF, VP, Cosine(), Trigonometric(), Sigmoid(), EDM(), VE(), DDPMLinear(), ScaledLinear(), DDPMCosine(),
    DDPMSigmoid(), ZeroTerminalSNR(ScaledLinear()),
]  # fmt: skip
GRIDS = {
    "uniform": lambda path: schedules.uniform(4),
    "linspace": lambda path: schedules.linspace(4),
    "leading": lambda path: schedules.leading(4),
    "trailing": lambda path: schedules.trailing(4),
    "karras": lambda path: schedules.karras(4, 0.1, 10.0, path=path),
    "exponential": lambda path: schedules.exponential(4, 0.1, 10.0, path=path),
    "beta": lambda path: schedules.beta(4),
    "log_snr": lambda path: schedules.log_snr(4, path, 0.9, 0.01),
    "shifted": lambda path: schedules.shifted(4),
    "shifted_dynamic": lambda path: schedules.shifted_dynamic(4, schedules.shift_mu(1024)),
    "logit_normal": lambda path: schedules.logit_normal(4),
}
# what an error about the end of a path must name
REASON = r"alpha = 0|sigma = 0|alpha > 0|finite derivatives|finite number"


def run(name, path, grid, prediction):
    """The table, run on a bounded network; every number of the result must be finite."""
    grid = grid[::-1] if name in solvers.INVERSE_SOLVERS else grid
    table = ALL[name](path, grid, prediction=prediction)
    x, noise = np.linspace(-1, 1, 5)[None], np.full((table.num_rows, 1, 5), 0.1)
    with np.errstate(all="raise", under="ignore"):
        out = run_table(table, lambda x_in, t: [0.1 * np.tanh(x_in + t)], x, noise)
    assert np.isfinite(out).all()
    return table


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", ALL)
def test_inside_a_path_everything_works(name, path):
    for prediction in PREDICTIONS:
        table = run(name, path, schedules.uniform(4, 0.9, 0.1), prediction)
        assert table.num_rows >= 4 and table.num_history <= 3


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", ALL)
def test_over_a_whole_path_it_works_or_says_why_not(name, path):
    works = set()
    for prediction in PREDICTIONS:
        try:
            run(name, path, schedules.uniform(4), prediction)
            works.add(prediction)
        except ValueError as error:
            assert re.search(REASON, str(error)) and re.search("t = |t_model", str(error)), str(error)
    if name in solvers.SOLVERS and path.alpha(1.0) > 0:
        assert works == set(PREDICTIONS)  # nothing is singular before the data end, where no falling solver looks
    elif not getattr(ALL[name], "needs_signal", False) and path.alpha(1.0) == 0 and path != Sigmoid():
        assert "v" in works  # determined everywhere


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_grid_serves_every_solver(name, grid):
    path = VPLinear()
    run(name, path, GRIDS[grid](path), "eps")
