"""Whole sampling loops with a model that does nothing: what a sampler costs beside the network.

"eager" is the textbook loop as people write it: guidance by chunk and combine, the update by hand, both branches' next
input by cat. Its step, compiled, is the torch.compile variant. "eager, preallocated" folds a step's scalars on the host
into x' = a x + b m + s z, and allocates nothing.
"""

from functools import partial

import numpy as np
import torch

import genengine
from genengine import paths, schedules, solvers
from genengine.benchmarks.registry import Benchmark, Goal, faster, register
from genengine.ops import normal

GUIDANCE, STEPS = 5.0, 20
FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
GRID = schedules.uniform(STEPS, t_max=0.99, t_min=0.01)


def guided(output):
    u, c = output.chunk(2)
    return u + GUIDANCE * (c - u)


# ---- textbook steps: (x, output, row, state) -> x'; state is what the last step left -------------------------------


def euler_step(x, output, row):
    """x' = x + dt v (Lipman et al. 2023)."""
    return x + row["dt"] * guided(output)


def ddim_step(x, output, row):
    """Song et al. 2021, eq. 12, eta = 0."""
    eps = guided(output)
    x0 = (x - row["sigma"] * eps) / row["alpha"]
    return row["alpha_next"] * x0 + row["sigma_next"] * eps


def ancestral_step(x, output, row):
    """DDPM's posterior mean and noise (Ho et al. 2020), as an SDE step of DDIM with eta = 1."""
    eps, z = guided(output), row["z"] if "z" in row else torch.randn_like(x)
    x0 = (x - row["sigma"] * eps) / row["alpha"]
    return row["alpha_next"] * x0 + row["direction"] * eps + row["noise"] * z


def textbook_rows(grid, path, device):
    """The scalars of every step as tensors on the device, as a sampler keeps them."""
    for t, end in zip(grid[:-1], grid[1:], strict=True):
        alpha, sigma, alpha_end, sigma_end = (float(f(s)) for s in (t, end) for f in (path.alpha, path.sigma))
        ratio = alpha / alpha_end
        noise = sigma_end / sigma * np.sqrt(max(0.0, 1 - ratio**2)) if sigma_end else 0.0
        row = {
            "dt": end - t, "alpha": alpha, "sigma": sigma, "alpha_next": alpha_end, "sigma_next": sigma_end,
            "noise": noise, "direction": np.sqrt(max(0.0, sigma_end**2 - noise**2)),
        }  # fmt: skip
        yield {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in row.items()}


def folded(row, name):
    """a, b and the noise's factor of x' = a x + b m + s z, of a textbook row's scalars."""
    dt, alpha, sigma, alpha_next, sigma_next, noise, direction = (float(value) for value in row.values())
    if name == "Euler, flow":
        return 1.0, dt, 0.0
    kept = alpha_next / alpha
    return (kept, sigma_next - kept * sigma, 0.0) if name == "DDIM" else (kept, direction - kept * sigma, noise)


def preallocated(x, output, scalars, buffers):
    """The loop without allocating: one lerp for guidance, the update, the draw, the next input."""
    m, z, state, model_in = buffers
    u, c = output.chunk(2)
    state.copy_(x)
    for a, b, s in scalars:
        torch.lerp(u, c, GUIDANCE, out=m)
        (state if a == 1.0 else state.mul_(a)).add_(m, alpha=b)
        if s:
            torch.randn(z.shape, out=z)
            state.add_(z, alpha=s)
        model_in[: len(x)].copy_(state)
        model_in[len(x) :].copy_(state)
    return state, model_in


# name -> (solver, path, prediction, textbook step)
LOOPS = {
    "Euler, flow": (solvers.euler, FLOW, "velocity", euler_step),
    "DDIM": (solvers.ddim, VP, "eps", ddim_step),
    "DDPM": (partial(solvers.ddim, eta=1.0), VP, "eps", ancestral_step),
}


def build(name, case):
    solver, path, prediction, step = LOOPS[name]
    table = solver(path, GRID, prediction=prediction, guidance_scale=GUIDANCE)
    output, y = case.randn(2 * case.shape[0], *case.shape[1:]), torch.zeros(case.shape[0], device=case.device)
    rows = list(textbook_rows(GRID, path, case.device))
    x = normal(case.shape, seed=0, device=case.device)

    def fused():
        return genengine.sample(
            lambda x, t, y: output, table, x=x, cond={"y": y}, uncond={"y": y}, seed=0, device=case.device
        )

    compiled = torch.compile(step)
    scalars = [folded(row, name) for row in rows]
    buffers = (*(torch.empty_like(x) for _ in range(3)), torch.empty_like(output))

    def by_hand(step, rows=rows):
        state = x
        for row in rows:
            state = step(state, output, row)
            model_in = torch.cat([state, state])
        return state, model_in

    def check():
        draws = [normal(case.shape, seed=0, step=i, stream="step", device=case.device) for i in range(STEPS)]
        expected = by_hand(step, [row | {"z": z} for row, z in zip(rows, draws, strict=True)])[0]
        gap, largest = (fused() - expected).abs().max().item(), expected.abs().max().item()
        assert gap <= 1e-4 * largest, f"differs from the textbook loop by {gap}, of {largest}"

    variants = {
        "fused": fused,
        "eager": lambda: by_hand(step),
        "eager, preallocated": lambda: preallocated(x, output, scalars, buffers),
        "torch.compile": lambda: by_hand(compiled),
    }
    return Benchmark(
        variants, check,
        elements=STEPS * x.numel(), goals=(faster("eager", 2.0), faster("torch.compile", 1.0)),
    )  # fmt: skip


for _name in LOOPS:
    register(
        f"loop {_name}, {STEPS} steps, CFG", group="loop", kind="samplers", axes={"batch": 0},
        shapes={"SD": (1, 4, 64, 64), "SDXL, batch 4": (4, 4, 128, 128), "Flux": (1, 16, 128, 128)},
        cuda_shapes={"CogVideoX-5B": (1, 16, 13, 60, 90)}, quick=None if _name == "DDIM" else (),
    )(partial(build, _name))  # fmt: skip


@register("loop overhead per step", shapes={"1,000 steps": (2, 1, 4, 4)}, group="loop", kind="samplers")
def overhead(case, steps=1000):
    """Tiny tensors: nanoseconds per element are nanoseconds per step."""
    output, y = torch.zeros(2 * case.shape[0], *case.shape[1:], device=case.device), torch.zeros(case.shape[0])
    y = y.to(case.device)
    table, setup = (
        solvers.euler(FLOW, schedules.uniform(n), prediction="velocity", guidance_scale=2.0) for n in (steps, 1)
    )

    def run(table):
        return genengine.sample(
            lambda x, t, y: output, table, case.shape, cond={"y": y}, uncond={"y": y}, seed=0, device=case.device
        )

    def eager():
        """The loop as people write it, with the same model."""
        x = torch.randn(case.shape, device=case.device)
        grid = torch.linspace(1, 0, steps + 1, device=case.device)
        for i in range(steps):
            model_in, t = torch.cat([x, x]), grid[i].expand(len(output))
            u, c = output.chunk(2)
            x = x + (grid[i + 1] - grid[i]) * (u + 2.0 * (c - u))
        return x, model_in, t

    def check():
        assert torch.equal(run(table), normal(case.shape, seed=0, device=case.device))

    return Benchmark(
        {"fused": lambda: run(table), "setup alone": lambda: run(setup), "eager, as written": eager}, check,
        elements=steps, goals=(Goal("ns", "fused", "", 10_000, False),),
    )  # fmt: skip
