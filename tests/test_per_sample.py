"""One batch whose samples have solvers, guidance, steps, seeds and prediction grids of their own.

Each sample must equal the same sample alone, bit for bit.
"""

import pytest
import torch

import genengine
from genengine import CoefficientTable, paths, schedules, solvers

SHAPE = (2, 5, 3)
GUIDANCE = (1.0, 3.0, 0.0, 7.5, 1.5)


def denoiser(x, t, y):
    """Elementwise, with one multiply and one add at most on each element: no sum whose order a batch changes."""
    return 0.5 * x + (y + 0.1 * t)[:, None, None, None]


def tables(path, **options):
    """Every solver, with numbers of steps that repeat for none of its neighbours."""
    made = []
    for index, solver in enumerate(solvers.SOLVERS.values()):
        grid = schedules.uniform(3 + index % 5, 0.9, 0.1)
        made.append(solver(path, grid, prediction="v", **(options if getattr(solver, "clips", False) else {})))
    return made


def run(table, ids, **arguments):
    samples = torch.tensor(ids)
    cond, uncond = {"y": 0.01 * samples.float()}, {"y": torch.zeros(len(ids))}
    guidance = torch.tensor([GUIDANCE[i % len(GUIDANCE)] for i in ids])
    return genengine.sample(
        denoiser, table, (len(ids), *SHAPE), cond=cond, uncond=uncond, guidance=guidance, seed=1000 + samples // 2,
        sample_ids=samples, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("path", [paths.VPLinear(), paths.RectifiedFlow(), paths.Cosine()], ids=repr)
@pytest.mark.parametrize("options", [{}, {"clip": 1.0}], ids=["", "clipped"])
def test_each_sample_of_a_stack_of_all_solvers_is_the_sample_alone(path, options):
    each = tables(path, **options)
    together = run(CoefficientTable.stack(each), range(len(each)))
    assert together.isfinite().all()
    for i, table in enumerate(each):
        assert torch.equal(together[i : i + 1], run(table, [i])), table.name


@pytest.mark.parametrize(
    "extension",
    [
        genengine.extensions.Rescale(0.7),
        genengine.extensions.CFGZeroStar(),
        genengine.extensions.Projected(norm_threshold=2.0),
        genengine.extensions.GuidanceInterval(0.2, 0.7),
        genengine.extensions.DynamicThreshold(0.9),
    ],
    ids=lambda extension: type(extension).__name__,
)
def test_extensions_leave_the_samples_of_a_stack_to_themselves(extension):
    path = paths.VPLinear()
    each = [table for table in tables(path, clip=1.0) if (table.column("r") > 0).any()]
    together = run(CoefficientTable.stack(each), range(len(each)), extensions=(extension,))
    assert together.isfinite().all()
    for i, table in enumerate(each):
        assert torch.equal(together[i : i + 1], run(table, [i], extensions=(extension,))), table.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_for_models_of_16_bits(dtype):
    each = tables(paths.VPLinear())
    arguments = {"model_dtype": dtype}
    model = lambda x, t, y: denoiser(x.float(), t, y).to(dtype)  # noqa: E731
    samples = torch.arange(len(each))
    together = genengine.sample(
        model, CoefficientTable.stack(each), (len(each), *SHAPE), cond={"y": samples.float()}, seed=3, **arguments
    )
    for i, table in enumerate(each):
        alone = genengine.sample(
            model, table, (1, *SHAPE), cond={"y": samples[i : i + 1].float()}, seed=3, sample_ids=samples[i : i + 1],
            **arguments,
        )  # fmt: skip
        assert torch.equal(together[i : i + 1], alone), table.name
