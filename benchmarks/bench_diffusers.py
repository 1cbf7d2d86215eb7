"""Fused diffusers schedulers against diffusers: guidance and step of a whole run, with a model that does nothing.

The model's output is one fixed tensor, so that what is timed is what surrounds the model: the chunk and combine of
classifier-free guidance, as pipelines write them, and `step`. "fused" has the guidance folded into the row, as `fuse`
does; "combined" computes it as written and fuses the step alone; "own loop" is `genengine.sample` with the traced
table, which also writes the model's next input, as "diffusers with model input" does. Everything but Philox draws the
noise that diffusers draws. `set_timesteps` is outside the timing.
"""

from functools import partial

import torch

import genengine
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.integrations.diffusers import fused_class
from genengine.integrations.diffusers._guidance import Branches
from genengine.trace import trace

STEPS, GUIDANCE = 20, 5.0
SHAPES = {"SD": (1, 4, 64, 64), "SDXL, batch 16": (16, 4, 128, 128)}
SCHEDULERS = ("FlowMatchEulerDiscrete", "DPMSolverMultistep", "DDPM", "DDIM", "EulerDiscrete", "UniPCMultistep")
GOALS = {
    ("FlowMatchEulerDiscrete", 1): (faster("diffusers", 3.0), faster("diffusers with model input", 5.0, "own loop")),
    ("DPMSolverMultistep", 1): (faster("diffusers", 15.0),),
    ("FlowMatchEulerDiscrete", 16): (faster("diffusers", 5.0),),
    ("DPMSolverMultistep", 16): (faster("diffusers", 11.0),),
    ("DDPM", 16): (faster("diffusers", 2.2), faster("diffusers", 12.0, "philox")),
}


class Prepared:
    """A scheduler whose timesteps are set, and which can be set back to that state."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        scheduler.set_timesteps(STEPS)
        self.timesteps = list(scheduler.timesteps)
        self.state = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}

    def rewind(self):
        lists = {name: list(value) for name, value in self.state.items() if isinstance(value, list)}
        self.scheduler.__dict__.clear()
        self.scheduler.__dict__.update(self.state | lists)


class Work:
    """One class of schedulers at one shape."""

    def __init__(self, cls, shape):
        self.x = torch.randn(shape)
        self.output = torch.randn(2 * shape[0], *shape[1:])
        self.out = torch.empty_like(self.x)
        kinds = {"diffusers": cls, "torch": fused_class(cls), "philox": fused_class(cls, "philox")}
        self.prepared = {name: Prepared(kind()) for name, kind in kinds.items()}
        self.table = trace(cls(), STEPS).with_guidance(GUIDANCE)

    def run(self, name, output):
        prepared, x = self.prepared[name], self.x
        prepared.rewind()
        step = prepared.scheduler.step
        for t in prepared.timesteps:
            uncond, cond = output.chunk(2)
            guided = uncond + GUIDANCE * (cond - uncond)
            x = step(guided, t, x, return_dict=False)[0]
        return x

    def with_model_input(self):
        """What pipelines do around the model, before it as well: the latents twice, and scaled."""
        prepared, x = self.prepared["diffusers"], self.x
        prepared.rewind()
        scheduler = prepared.scheduler
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        for t in prepared.timesteps:
            scale(torch.cat([x] * 2), t)
            uncond, cond = self.output.chunk(2)
            guided = uncond + GUIDANCE * (cond - uncond)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
        return x

    def variants(self):
        found = {
            "fused": lambda: self.run("torch", Branches(self.output)),
            "diffusers": lambda: self.run("diffusers", self.output),
            "combined": lambda: self.run("torch", self.output),
            "own loop": self.own_loop,
            "diffusers with model input": self.with_model_input,
            "copy_": self.copies,
        }
        if self.table.needs_noise:
            found["philox"] = lambda: self.run("philox", Branches(self.output))
        return found

    def own_loop(self):
        branch = {"y": None}
        return genengine.sample(lambda x, t, y: self.output, self.table, x=self.x, cond=branch, uncond=branch)

    def copies(self):
        for _ in range(STEPS):
            self.out.copy_(self.x)

    def check(self):
        """Within 2e-6 of diffusers' own result, with its noise, relative to the largest entry met on the way."""
        torch.manual_seed(0)
        expected = self.run("diffusers", self.output)
        uncond, cond = self.output.chunk(2)
        largest = max(expected.abs().max(), (uncond + GUIDANCE * (cond - uncond)).abs().max())
        for output in (self.output, Branches(self.output)):
            torch.manual_seed(0)
            error = (self.run("torch", output) - expected).abs().max()
            assert error <= 2e-6 * largest, f"differs from diffusers by {error}, of {largest}"


def scheduler_class(name, case):
    """The class of diffusers. Raises where it is missing, or for a GPU: these figures are of the host."""
    if case.device != "cpu":
        raise RuntimeError("its figures are of the host; run it with --device cpu")
    try:
        import diffusers
    except ImportError as error:
        raise RuntimeError(f"{error}; pip install 'genengine[interop]'") from None
    return getattr(diffusers, f"{name}Scheduler")


def build(name, case):
    work = Work(scheduler_class(name, case), case.shape)
    goals = GOALS.get((name, case.shape[0]), ())
    return Benchmark(work.variants(), work.check, elements=STEPS * work.x.numel(), goals=goals)


for _name in SCHEDULERS:
    register(
        f"diffusers {_name}, CFG + step", shapes=SHAPES, group="diffusers", kind="peers", axes={"batch": 0},
        quick=None if _name == "DPMSolverMultistep" else (),
    )(partial(build, _name))  # fmt: skip
