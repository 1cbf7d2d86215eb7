"""The k-diffusion drop-in against the package: a whole run of a sampler with a model that does nothing.

The model returns one fixed tensor, so that what is timed is the sampler: its arithmetic, its noise, its Python. Both
draw the same noise from torch's generator; "philox" draws in the kernel instead, and "copy_" is one copy of x per step.
"""

from functools import partial

import torch

from genengine.benchmarks import k_diffusion_package
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.integrations import k_diffusion

STEPS = 20
SHAPES = {"SD": (1, 4, 64, 64), "SD, batch 16": (16, 4, 64, 64)}
SAMPLERS = ("euler", "heun", "euler_ancestral", "dpmpp_2m", "lms", "dpmpp_2s_ancestral", "dpm_fast")
DRAWS_NOTHING = ("dpmpp_2m", "lms")


class Work:
    """One sampler at one shape, by us and by the package."""

    def __init__(self, sampling, name, shape, device):
        self.ours, self.theirs = getattr(k_diffusion, f"sample_{name}"), getattr(sampling, f"sample_{name}")
        self.x = 14.6 * torch.randn(shape, device=device)
        self.out = torch.empty_like(self.x)
        self.denoised = torch.randn(shape, device=device)
        sigmas = k_diffusion.get_sigmas_karras(STEPS, 0.03, 14.6, device=device)
        self.levels = (0.03, 14.6, STEPS) if name == "dpm_fast" else (sigmas,)

    def model(self, x, sigma):
        return self.denoised

    def fused(self, **options):
        return self.ours(self.model, self.x, *self.levels, disable=True, **options)

    def package(self):
        return self.theirs(self.model, self.x, *self.levels, disable=True)

    def copies(self):
        for _ in range(STEPS):
            self.out.copy_(self.x)

    def check(self):
        """Within 2e-6 of the largest entry, with a model that does something; the noise is the same."""
        found = []
        for sampler in (self.ours, self.theirs):
            torch.manual_seed(0)
            model = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)  # noqa: E731
            found.append(sampler(model, self.x, *self.levels, disable=True))
        error, largest = (found[0] - found[1]).abs().max(), self.x.abs().max()
        assert error <= 2e-6 * largest, f"differs from the package by {error}, of {largest}"


def build(name, case):
    work = Work(k_diffusion_package.load().sampling, name, case.shape, case.device)
    variants = {"fused": work.fused, "package": work.package, "copy_": work.copies}
    if name not in DRAWS_NOTHING:
        variants["philox"] = lambda: work.fused(noise_sampler="philox")
    return Benchmark(variants, work.check, elements=STEPS * work.x.numel(), goals=(faster("package", 1.0),))


for _name in SAMPLERS:
    register(
        f"k-diffusion {_name}, {STEPS} steps", shapes=SHAPES, group="k_diffusion", kind="peers", axes={"batch": 0},
        quick=None if _name == "dpmpp_2m" else (),
    )(partial(build, _name))  # fmt: skip
