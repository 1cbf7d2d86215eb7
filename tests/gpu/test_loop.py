"""The loop on a GPU: captured equals uncaptured equals the CPU's noise, with no host synchronisation."""

import pytest
import torch

import genengine
from genengine import paths, schedules, solvers
from genengine.nets.dit import DiT
from genengine.ops import normal

pytestmark = pytest.mark.gpu
SHAPE = (4, 1, 8, 8)
GRID = schedules.uniform(5, t_max=0.99, t_min=0.01)


def denoiser(x, t, y):
    column = lambda v: v.reshape(-1, 1, 1, 1).to(x.dtype)  # noqa: E731
    return torch.tanh(0.3 * x + column(t) + 0.1 * column(y))


def run(model, table, capture, **options):
    y = torch.arange(4, device="cuda")
    return genengine.sample(
        model, table, SHAPE, cond={"y": y}, uncond={"y": torch.zeros_like(y)}, guidance=2.0, seed=5, capture=capture,
        device="cuda", **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["euler", "heun", "ddpm", "dpmpp_2m", "dpmpp_2m_sde"])
def test_captured_equals_uncaptured(name):
    table = solvers.SOLVERS[name](paths.VPLinear(), GRID, prediction="eps")
    plain = run(denoiser, table, "never")
    for capture in ("auto", "loop", "step"):
        assert torch.equal(run(denoiser, table, capture), plain), capture
    seen = []
    assert torch.equal(run(denoiser, table, "auto", callback=lambda info: seen.append(info.row)), plain)
    assert seen == list(range(table.num_rows))


def test_captured_dit_equals_uncaptured():
    net = DiT.from_config("tiny").cuda().eval()
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(6), prediction="velocity")
    assert torch.allclose(run(net, table, "auto"), run(net, table, "never"), atol=1e-5)


def test_no_host_sync_in_the_loop():
    table = solvers.ddpm(paths.VPLinear(), GRID, prediction="eps")
    run(denoiser, table, "never")  # verification and compilation happen here
    started = []

    def model(x, t, y):
        if not started:
            started.append(torch.cuda.set_sync_debug_mode("error"))
        return denoiser(x, t, y)

    try:
        run(model, table, "never")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_the_gpu_draws_the_cpu_s_bits(backend):
    shape = (3, 5, 7, 11)
    assert torch.equal(
        normal(shape, seed=2**63 + 1, step=4, device="cuda", backend=backend).cpu(),
        normal(shape, seed=2**63 + 1, step=4),
    )


def test_wrong_device_is_an_error():
    y = torch.arange(4)
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(2), prediction="velocity")
    with pytest.raises(ValueError, match="must be on cuda"):
        genengine.sample(denoiser, table, SHAPE, cond={"y": y}, device="cuda")
