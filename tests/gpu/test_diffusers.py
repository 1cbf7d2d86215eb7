"""Fused diffusers schedulers on a GPU: the CPU's results, and no host sync while they step."""

import pytest
import torch

pytestmark = pytest.mark.gpu
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install genengine[interop])")

from genengine.integrations.diffusers import fused_class  # noqa: E402
from genengine.integrations.diffusers._guidance import Branches  # noqa: E402

CLASSES = (
    "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep",
    "FlowMatchEulerDiscrete", "LMSDiscrete", "LCM",
)  # fmt: skip


def run(scheduler, device, sync_mode="default"):
    """Eight steps; after the first, which compiles and allocates, under a sync mode."""
    scheduler.set_timesteps(8, device=device)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 4, 16, 16, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(device)
    stacked = torch.randn(4, 4, 16, 16, generator=generator).to(device)
    arguments = {"generator": torch.Generator(device).manual_seed(3)} if scheduler.genengine_noise == "philox" else {}
    try:
        for k, t in enumerate(scheduler.timesteps):
            if device != "cpu" and k == 1:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode(sync_mode)
            x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            uncond, cond = Branches(stacked * x_in.mean()).chunk(2)
            options = arguments if "generator" in scheduler.step.__wrapped__.__code__.co_varnames else {}
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x, **options, return_dict=False)[0]
    finally:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
    return x.cpu()


@pytest.mark.parametrize("name", CLASSES)
def test_a_fused_scheduler_steps_without_a_sync_and_as_on_the_cpu(name):
    cls = fused_class(getattr(diffusers, f"{name}Scheduler"), "philox")
    torch.testing.assert_close(run(cls(), "cuda", "error"), run(cls(), "cpu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DDPM", "EulerAncestralDiscrete"])
def test_torch_noise_is_drawn_without_a_sync(name):
    cls = fused_class(getattr(diffusers, f"{name}Scheduler"))
    assert torch.isfinite(run(cls(), "cuda", "error")).all()
