"""What holds of every solver: lean tables, the common arguments, errors that say what to do."""

import inspect

import numpy as np
import pytest
from solver_support import ALL, MEAN, RF, STD, VP, run_table, sampled_moments

from genengine import schedules, solvers
from genengine.paths import EDM, VE, Cosine
from genengine.table import CoefficientTable, unpack_flags

STOCHASTIC = (
    "ddpm", "euler_ancestral", "dpmpp_2m_sde", "euler_maruyama", "consistency", "lcm", "dpm_2_ancestral",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde",
)  # fmt: skip
DETERMINISTIC = tuple(name for name in solvers.SOLVERS if name not in STOCHASTIC)
IN_TIME = ("euler", "heun", "midpoint", "rk4")
# of four steps, the last one to sigma = 0; where not given, 4 rows and 0 registers
ROWS = {
    "heun": 7, "dpm_2": 7, "midpoint": 8, "rk4": 14, "plms": 5, "dpmpp_singlestep": 7, "edm": 7, "dpm_2_ancestral": 7,
    "dpmpp_2s_ancestral": 7, "dpmpp_sde": 7, "dpm_fast": 9,
}  # fmt: skip
HISTORY = {
    "heun": 2, "dpm_2": 1, "midpoint": 1, "rk4": 3, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m": 2, "lms": 3,
    "deis": 2, "plms": 3, "ipndm": 3, "dpmpp_singlestep": 1, "unipc": 2, "edm": 2,
    "dpm_2_ancestral": 1, "dpmpp_2s_ancestral": 1, "dpmpp_sde": 1, "dpmpp_3m_sde": 2, "dpm_fast": 2,
}  # fmt: skip


def test_relations_between_solvers():
    grid = schedules.uniform(6)
    rows = lambda name, path, **options: solvers.SOLVERS[name](path, grid, prediction="v", **options).rows  # noqa: E731
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)  # noqa: E731
    same(rows("ddim", VP, eta=1.0), rows("ddpm", VP))
    same(rows("ddim", VP, eta=0.3), rows("euler_ancestral", VP, eta=0.3))
    same(rows("ddim", RF), rows("euler", RF))
    same(rows("dpmpp_2m", VP), rows("dpmpp_2m_sde", VP, eta=0.0))


def test_deterministic_solvers_reach_the_mean_and_variance():
    for name in DETERMINISTIC:
        table = solvers.SOLVERS[name](VP, schedules.uniform(400, 0.99, 0.0), prediction="v")
        assert not table.needs_noise
        assert sampled_moments(table, VP, "v", 0.99) == pytest.approx((MEAN, STD**2), abs=0.01)


# euler_maruyama and lcm are exact only in the limit; the solvers in t where t is the noise level, or the path straight
EXACT = [
    pytest.param(name, path, prediction, id=f"{name}-{path}")
    for path, prediction in [(VP, "eps"), (Cosine(), "v"), (RF, "velocity"), (EDM(5.0), "x0"), (VE(), "score")]
    for name in solvers.SOLVERS
    if name not in ("euler_maruyama", "lcm") and (name not in IN_TIME or path in (RF, EDM(5.0)))
]


@pytest.mark.parametrize("name, path, prediction", EXACT)
def test_a_point_mass_is_sampled_exactly_on_any_grid(name, path, prediction):
    """Data all at MEAN: eps is constant along the flow, so x stays N(alpha MEAN, sigma^2), however uneven the steps."""
    rng = np.random.default_rng(11)
    for _ in range(5):
        steps = 0.1 + rng.random(6)
        grid = 0.97 - 0.93 * np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
        table = ALL[name](path, grid, prediction=prediction)
        unit = np.eye(table.num_rows + 2)

        def network(x, t):
            alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
            x0 = MEAN * unit[0]  # noqa: B023
            eps = (x - alpha * x0) / sigma
            outputs = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
            return [outputs.get(prediction, d_alpha * x0 + d_sigma * eps)]

        x = path.alpha(grid[0]) * MEAN * unit[0] + path.sigma(grid[0]) * unit[1]
        x = run_table(table, network, x, unit[2:])
        level = 0.0 if name == "consistency" else path.sigma(grid[-1])  # consistency ends at its network's x0
        assert x[0] == pytest.approx(path.alpha(grid[-1]) * MEAN, rel=1e-9)
        assert np.sqrt(np.sum(x[1:] ** 2)) == pytest.approx(level, rel=1e-9, abs=1e-12)


def test_solvers_say_whether_they_clip_and_need_signal():
    for name, solver in ALL.items():
        assert solver.clips == ("clip" in inspect.signature(solver).parameters)
        start = schedules.uniform(4, 1.0, 0.1)
        start = start[::-1] if name in solvers.INVERSE_SOLVERS else start
        if solver.needs_signal:
            with pytest.raises(ValueError, match=f"{name}: grid must start where alpha > 0"):
                solver(RF, start, prediction="velocity")
        else:
            assert solver(RF, start, prediction="velocity").num_rows >= 4
    assert not solvers.lms.clips and solvers.euler.clips and solvers.dpm_2.needs_signal


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_tables_are_lean(name):
    grid = schedules.uniform(4, 0.9)
    table = solvers.SOLVERS[name](VP, grid, prediction="eps", guidance_scale=3.0)
    assert table.num_rows == ROWS.get(name, 4)
    assert table.num_history == HISTORY.get(name, 0)
    assert table.needs_noise == (name in STOCHASTIC)
    assert np.all(table.column("c") == 0), "without clipping y is folded into a and b"
    assert np.all(table.column("g1") == 3.0) and np.all(table.column("c_in") == 1.0)
    assert table.column("s")[-1] == 0 and unpack_flags(table.column("flags")[-1, 0])[1] == (0, 0, 0)
    assert table.name == name == solvers.SOLVERS[name].__name__ and table.init_scale == 1.0
    assert f"{name}: nfe {table.num_rows}, guidance 3" in table.describe()


def test_per_sample_guidance_and_stacking():
    table = solvers.ddim(VP, schedules.uniform(4), prediction="v", guidance_scale=np.array([1.0, 5.0]))
    assert table.rows.shape == (4, 2, 16)
    stacked = CoefficientTable.stack([table, solvers.heun(RF, schedules.uniform(3), prediction="velocity")])
    assert stacked.validate().rows.shape == (6, 3, 16)


@pytest.mark.parametrize("name", solvers.SOLVERS)
@pytest.mark.parametrize(
    "grid",
    [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.0], [1.0, -0.1], [[1.0, 0.0]], [1.0, np.nan, 0.0]],
    ids=str,
)
def test_bad_grids_are_refused(name, grid):
    with pytest.raises(ValueError, match="strictly falling times"):
        solvers.SOLVERS[name](VP, grid, prediction="eps")


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_singular_ends_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"alpha > 0, got alpha = 0 at t = 1.0; start the grid"):
        solvers.SOLVERS[name](RF, schedules.uniform(4), prediction="eps")
    with pytest.raises(ValueError, match="prediction must be one of"):
        solvers.SOLVERS[name](RF, schedules.uniform(4, 0.9), prediction="epsilon")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("euler", {"clip": 0.0}, "clip must be None or a finite radius"),
        ("euler", {"clip": -1.0}, "clip must be None or a finite radius"),
        ("ddim", {"eta": 1.1}, r"eta must be in \[0, 1\], got 1.1"),
        ("ddim", {"eta": -0.1}, r"eta must be in \[0, 1\]"),
        ("ddim", {"eps": "raw"}, "eps must be 'x0' or 'model', got 'raw'"),
        ("euler_ancestral", {"eta": -0.1}, "eta must be a finite number >= 0"),
        ("dpmpp_2m_sde", {"eta": np.nan}, "eta must be a finite number >= 0"),
        ("ddpm", {"variance": "learned"}, "variance must be 'small', 'large' or 'learned_range', got 'learned'"),
        ("dpmpp_2m", {"form": "simpson"}, "form must be 'midpoint' or 'heun', got 'simpson'"),
        ("dpmpp_2m_sde", {"form": "simpson"}, "form must be 'midpoint' or 'heun', got 'simpson'"),
        ("dpmpp_3m", {"form": "half"}, "form must be 'published' or 'exact', got 'half'"),
        ("dpmpp_singlestep", {"order": 1}, "order must be 2 or 3, got 1"),
        ("unipc", {"order": 4}, "order must be 1, 2 or 3, got 4"),
        ("unipc", {"form": "bh3"}, "form must be 'bh1' or 'bh2', got 'bh3'"),
        ("deis", {"order": 4}, "order must be 1, 2 or 3, got 4"),
        ("ipndm", {"order": 0}, "order must be 1, 2, 3 or 4, got 0"),
        ("lms", {"order": 5}, "order must be 1, 2, 3 or 4, got 5"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"{message}"):
        solvers.SOLVERS[name](VP, schedules.uniform(4), prediction="eps", **options)
