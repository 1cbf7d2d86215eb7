"""Extensions on a GPU: captured equals uncaptured, the kernels equal the reference, and nothing waits for the host."""

import pytest
import torch

import genengine
from genengine import extensions as ext
from genengine import paths, schedules, solvers

pytestmark = pytest.mark.gpu
SHAPE = (4, 3, 8, 8)
VP, FLOW = paths.VPLinear(), paths.RectifiedFlow()
GRID, FLOW_GRID = schedules.uniform(5, t_max=0.99, t_min=0.01), schedules.uniform(5)
MASK, KNOWN = (torch.arange(64).reshape(8, 8) % 3 > 0).float(), torch.linspace(-1, 1, 192).reshape(SHAPE[1:])
CLIPPED = {"prediction": "eps", "clip": 1.0}
CASES = {
    "rescale": (solvers.ddim(VP, GRID, prediction="eps"), (ext.Rescale(),)),
    "zero star": (solvers.euler(FLOW, FLOW_GRID, prediction="velocity"), (ext.CFGZeroStar(),)),
    "projected": (solvers.euler(FLOW, FLOW_GRID, prediction="velocity"), (ext.Projected(0.2, 3.0),)),
    "per channel": (solvers.euler(FLOW, FLOW_GRID, prediction="velocity"), (ext.PerChannelGuidance([3.0, 2.0, 1.0]),)),
    "threshold": (solvers.ddim(VP, GRID, **CLIPPED), (ext.DynamicThreshold(0.9),)),
    "median": (solvers.ddim(VP, GRID, **CLIPPED), (ext.DynamicThreshold(0.5),)),
    "inpaint": (solvers.heun(FLOW, FLOW_GRID, prediction="velocity"), (ext.Inpaint(MASK, KNOWN, FLOW),)),
    "inpaint by row": (solvers.ddpm(VP, GRID, **CLIPPED), (ext.Inpaint(MASK, KNOWN, VP, "row"),)),
    "langevin": (solvers.ddpm(VP, GRID, prediction="eps"), (ext.Langevin(VP, "eps"),)),
    "several": (
        solvers.ddpm(VP, GRID, **CLIPPED),
        (ext.Rescale(), ext.DynamicThreshold(0.9), ext.Langevin(VP, "eps"), ext.Inpaint(MASK, KNOWN, VP)),
    ),
}


def denoiser(x, t, y):
    column = lambda v: v.reshape(-1, 1, 1, 1).to(x.dtype)  # noqa: E731
    return torch.tanh(0.8 * x + column(t) + 0.3 * column(y) * x)


def run(name, capture="never", model=denoiser, ids=(0, 1, 2, 3), device="cuda"):
    table, extensions = CASES[name]
    y, ids = torch.arange(1.0, 5.0, device=device)[list(ids)], torch.tensor(ids, device=device)
    return genengine.sample(
        model, table, (len(ids), *SHAPE[1:]), cond={"y": y}, uncond={"y": 0 * y}, guidance=3.0, seed=5,
        sample_ids=ids, capture=capture, device=device, extensions=extensions,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_captured_equals_uncaptured_and_the_cpu(name):
    plain = run(name)
    for capture in ("auto", "loop", "step"):
        assert torch.equal(run(name, capture), plain), capture
    assert (plain.cpu() - run(name, device="cpu")).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_sample_does_not_depend_on_its_batch(name):
    assert torch.equal(torch.cat([run(name, ids=(0,)), run(name, ids=(1, 2, 3))]), run(name))


@pytest.mark.parametrize("name", CASES)
def test_no_host_sync_in_the_loop(name):
    run(name)  # verification and compilation happen here
    started = []

    def model(x, t, y):
        if not started:
            started.append(torch.cuda.set_sync_debug_mode("error"))
        return denoiser(x, t, y)

    try:
        run(name, model=model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started


def test_a_learned_variance_is_captured():
    rows = genengine.table.build_rows(
        [{"t_model": t, "a": 0.9, "b": 0.1, "s": 0.3, "l": scale} for t, scale in ((1.0, 0.7), (0.6, -0.4), (0.3, 0.0))]
    )
    table = genengine.CoefficientTable(rows)
    model = lambda x, t: torch.cat([torch.tanh(x), torch.sin(3 * x)], 1)  # noqa: E731
    sample = lambda capture, device="cuda": genengine.sample(  # noqa: E731
        model, table, SHAPE, seed=5, capture=capture, device=device
    )
    plain = sample("never")
    assert torch.equal(sample("loop"), plain) and torch.equal(sample("step"), plain)
    assert (plain.cpu() - sample("never", "cpu")).abs().max() < 1e-5
