"""sampler_step against copy_, preallocated eager PyTorch, and eager as people write it.

CFG + Euler moves x, two branches and x'; with x_in two more; CFG + DDPM adds a normal per element; a learned variance
reads half as many channels again.
"""

import torch

from genengine import testing
from genengine.benchmarks.harness import Benchmark, faster, within
from genengine.ops import normal, sampler_step
from genengine.ops.sampler_step import SAMPLER_STEP
from genengine.table import Write, build_rows, pack_flags

SHAPES = ((16, 4, 64, 64), (64, 4, 256, 256))
GUIDANCE, DT, SIGMA, SPREAD = 2.0, -0.02, 0.1, 0.5


class Work:
    """The buffers of one shape, and the ways to do its step."""

    def __init__(self, shape, device):
        batch = shape[0]
        self.x = torch.randn(shape, device=device)
        self.output = torch.randn(2 * batch, *shape[1:], device=device)
        self.u, self.c = self.output.chunk(2)
        self.out, self.z, self.naive_out = (torch.empty_like(self.x) for _ in range(3))
        self.x_in, self.eager_x_in = torch.empty_like(self.output), torch.empty_like(self.output)
        table = torch.zeros(1, 1, 16)
        table[..., 6], table[..., 7], table[..., 1], table[..., 14] = 1.0, DT, GUIDANCE, 1.0
        self.euler = table.to(device)
        table[..., 12] = SIGMA
        self.ddpm = table.clone().to(device)
        table[..., 13] = SPREAD
        self.learned = table.to(device)
        self.both = torch.randn(2 * batch, 2 * shape[1], *shape[2:], device=device)  # with the variance's channels
        self.mean, self.v = self.both[:, : shape[1]], self.both[batch:, shape[1] :]
        self.step = torch.zeros(batch, dtype=torch.int32, device=device)
        self.seed = torch.tensor(3, device=device)
        from genengine.ops import _registry

        self.kernel = _registry.resolve(SAMPLER_STEP, self.x.device, self.x.dtype)

    def fused(self, table, x_in=None, seed=None, history=None):
        """As the sampling loop calls it."""
        self.kernel(self.x, (self.output,), table, self.step, history, seed, None, None, None, self.out, x_in)

    def fused_learned(self):
        arguments = (self.x, (self.mean,), self.learned, self.step, None, self.seed, None, None, self.v, self.out, None)
        self.kernel(*arguments)

    def eager(self):
        """Every output preallocated: four passes."""
        torch.sub(self.c, self.u, out=self.out)
        self.out.mul_(GUIDANCE).add_(self.u)
        torch.add(self.x, self.out, alpha=DT, out=self.out)

    def eager_x_in_(self):
        self.eager()
        self.eager_x_in[: len(self.x)].copy_(self.out)
        self.eager_x_in[len(self.x) :].copy_(self.out)

    def eager_ddpm(self):
        self.eager()
        torch.randn(self.z.shape, out=self.z)
        self.out.add_(self.z, alpha=SIGMA)

    def eager_learned(self):
        u, c = self.mean.chunk(2)
        torch.sub(c, u, out=self.out)
        self.out.mul_(GUIDANCE).add_(u)
        torch.add(self.x, self.out, alpha=DT, out=self.out)
        torch.randn(self.z.shape, out=self.z)
        torch.mul(self.v, SPREAD, out=self.naive_out)
        self.out.addcmul_(self.naive_out.exp_(), self.z, value=SIGMA)

    def as_written_learned(self):
        (u, c), v = self.mean.chunk(2), self.v
        return self.x + DT * (u + GUIDANCE * (c - u)) + SIGMA * torch.exp(SPREAD * v) * torch.randn_like(self.x)

    def as_written(self):
        u, c = self.output.chunk(2)
        return self.x + DT * (u + GUIDANCE * (c - u))

    def as_written_x_in(self):
        return torch.cat([self.as_written()] * 2)

    def as_written_ddpm(self):
        return self.as_written() + SIGMA * torch.randn_like(self.x)

    def check(self, table, seed=None, history=None):
        """Against the reference in float64, within twice eager's error."""
        draw = {} if seed is None else {"seed": seed}

        def run(x, u, c, t):
            kept = None if history is None else history.clone()
            return sampler_step(x, [u, c], t, self.step, kept, backend="reference", **draw)

        eager = run(self.x, self.u, self.c, table)
        oracle = run(self.x.double(), self.u.double(), self.c.double(), table.double())
        self.fused(table, seed=seed, history=None if history is None else history.clone())
        testing.assert_as_good_as_eager(self.out, eager, oracle)

    def check_learned(self):
        run = lambda x, mean, v, t: sampler_step(  # noqa: E731
            x, mean, t, self.step, variance=v, seed=self.seed, backend="reference"
        )
        eager = run(self.x, self.mean, self.v, self.learned)
        oracle = run(self.x.double(), self.mean.double(), self.v.double(), self.learned.double())
        self.fused_learned()
        testing.assert_as_good_as_eager(self.out, eager, oracle)


def benchmarks(device):
    for shape in SHAPES:
        work = Work(shape, device)
        n = work.x.numel()
        copy = lambda work=work: work.out.copy_(work.x)  # noqa: E731
        yield Benchmark(
            "CFG + Euler row", str(shape), "float32",
            {"fused": lambda work=work: work.fused(work.euler), "copy_": copy, "eager, preallocated": work.eager,
             "eager, as written": work.as_written},
            lambda work=work: work.check(work.euler), n, 16 * n,
            (within(2.0, "copy_"), faster("eager, preallocated", 1.7)), device=device,
        )  # fmt: skip
        yield Benchmark(
            "CFG + Euler row with x_in", str(shape), "float32",
            {"fused": lambda work=work: work.fused(work.euler, work.x_in), "copy_": copy,
             "eager, preallocated": work.eager_x_in_, "eager, as written": work.as_written_x_in},
            lambda work=work: work.check(work.euler), n, 24 * n,
            (within(3.5, "copy_"), faster("eager, preallocated", 1.7)), device=device,
        )  # fmt: skip
        yield Benchmark(
            "CFG + DDPM row with noise", str(shape), "float32",
            {"fused": lambda work=work: work.fused(work.ddpm, seed=work.seed), "copy_": copy,
             "eager, preallocated": work.eager_ddpm, "eager, as written": work.as_written_ddpm},
            lambda work=work: work.check(work.ddpm, work.seed), n, 16 * n, (faster("eager, preallocated", 3.8),),
            device=device,
        )  # fmt: skip
        yield Benchmark(
            "CFG + DDPM row with a learned variance", str(shape), "float32",
            {"fused": work.fused_learned, "copy_": copy, "eager, preallocated": work.eager_learned,
             "eager, as written": work.as_written_learned},
            work.check_learned, n, 20 * n, (faster("eager, preallocated", 3.0),), device=device,
        )  # fmt: skip
    yield from _history_rows(device)


LATENTS = (16, 4, 128, 128)


def _history_rows(device):
    """Rows of multistep and of stochastic solvers: by copies of the state, and by their parts."""
    work = Work(LATENTS, device)
    n = work.x.numel()
    copy = lambda: work.out.copy_(work.x)  # noqa: E731
    for registers, bound in ((1, 4.0), (3, 6.0)):
        history = torch.randn(registers, *LATENTS, device=device)
        columns = {"a": 1.0, "b": DT, "g1": GUIDANCE, "p": 1.0, "q": -0.5, "flags": pack_flags(writes=(Write.Y,))}
        columns |= {f"h{j + 1}": 0.1 * (j + 1) for j in range(registers)}
        table = torch.from_numpy(build_rows([columns])).float().to(device)
        yield Benchmark(
            f"CFG + multistep row, {registers} of history", str(LATENTS), "float32",
            {"fused": lambda table=table, history=history: work.fused(table, history=history), "copy_": copy},
            lambda table=table, history=history: work.check(table, history=history), n, (20 + 4 * registers) * n,
            (within(bound, "copy_"),), device=device,
        )  # fmt: skip
    yield Benchmark(
        "CFG + DDPM row", str(LATENTS), "float32",
        {"fused": lambda: work.fused(work.ddpm, seed=work.seed), "copy_": copy,
         "row, then normal": lambda: (work.fused(work.euler), normal(LATENTS, seed=3, device=device))},
        lambda: work.check(work.ddpm, work.seed), n, 16 * n, (within(1.3, "row, then normal"),), device=device,
    )  # fmt: skip
