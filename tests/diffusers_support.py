"""Schedulers of the installed diffusers, plain and fused, and a loop to run both in."""

import inspect
import os
from contextlib import nullcontext as nothing  # noqa: F401

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install genengine[interop])")

from genengine.integrations.diffusers import fused_class  # noqa: E402

SHAPE = (2, 3, 8, 8)
# a step that is not fused warns, which fails a test that does not expect it
STRICT = pytest.mark.filterwarnings("error:genengine", "ignore:Should have t", "ignore:.*deprecated")
AFFINE = (
    "CMStochasticIterative", "CogVideoXDDIM", "CosineDPMSolverMultistep", "DDIMInverse", "DDIMParallel", "DDIM",
    "DDPMParallel", "DDPM", "DDPMWuerstchen", "DEISMultistep", "DPMSolverMultistepInverse", "DPMSolverMultistep",
    "DPMSolverSDE", "DPMSolverSinglestep", "EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete",
    "EulerDiscrete", "FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM",
    "HeunDiscrete", "IPNDM", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "LTXEulerAncestralRF",
    "MiniMaxH3", "SASolver", "TCD", "UnCLIP", "UniPCMultistep",
)  # fmt: skip


def make(name, config):
    return getattr(diffusers, f"{name}Scheduler")(**config)


def fused(name, config, noise="torch"):
    return fused_class(getattr(diffusers, f"{name}Scheduler"), noise)(**config)


def sample(scheduler, steps, step=None, schedule=None, dtype=torch.float32, start=0, edit=None, shape=SHAPE):
    """What a pipeline does, with a model that is a function of its input.

    Returns x, the results of all steps, and the next number of the generator.
    """
    scheduler.set_timesteps(**schedule) if schedule else scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    x, other, results = x.to(dtype), torch.Generator().manual_seed(8), []
    arguments = dict(step or {})
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    doubled = 2 if str(scheduler.config.get("variance_type")).startswith("learned") else 1
    timesteps = scheduler.timesteps[start:]
    for k, t in enumerate(timesteps):
        if k + 1 == len(timesteps) and type(scheduler).__name__.startswith(("SCM", "MiniMax", "DDPMWuerstchen")):
            break  # their last timestep is an end
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        noise = torch.randn(shape[0], doubled * shape[1], *shape[2:], generator=other)
        output = (0.5 * torch.tanh(x_in.float()).repeat(1, doubled, 1, 1) + 0.1 * noise).to(dtype)
        t = t.expand(shape[0]) if "Wuerstchen" in type(scheduler).__name__ else t
        results.append(scheduler.step(output, t, x, **arguments))
        x = results[-1][0] if edit is None else edit(k, results[-1][0])
    return x, results, torch.rand(1, generator=generator).item()


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())
