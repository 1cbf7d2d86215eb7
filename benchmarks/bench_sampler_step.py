"""sampler_step against copy_, preallocated eager PyTorch, eager as people write it, and torch.compile.

Preallocated eager takes the fewest passes torch has: guidance is one lerp. CFG + Euler moves x, two branches and x';
with x_in two more; CFG + DDPM adds a normal per element; a learned variance reads half as many channels again. State
and model output have the dtype of the row, history is float32.
"""

from functools import partial

import torch

from genengine import testing
from genengine.benchmarks import calls
from genengine.benchmarks.registry import Benchmark, faster, register, within
from genengine.ops import normal, sampler_step
from genengine.table import Write, build_rows, pack_flags

STATED = {"SD": (16, *calls.SD), "SD, 2048 px": (64, 4, 256, 256)}  # where the goals were stated
SDXL = {"SDXL": (16, *calls.SDXL)}  # those of the rows with history
SHAPES = STATED | SDXL | {"SD3, Flux": (16, *calls.SD3), "CogVideoX-5B": (2, *calls.VIDEO)}
GUIDANCE, DT, SIGMA, SPREAD = 2.0, -0.02, 0.1, 0.5
Q, WEIGHTS = -0.5, (0.1, 0.2, 0.3)  # of m in y = x + Q m, and of the history
ROW = {"a": 1.0, "b": DT, "g1": GUIDANCE}


class Work:
    """The buffers of one case, and the ways to do its step."""

    def __init__(self, case):
        batch, channels, *rest = case.shape
        self.x, self.output = case.randn(), case.randn(2 * batch, *case.shape[1:])
        self.u, self.c = self.output.chunk(2)
        self.out, self.z, self.scratch = (torch.empty_like(self.x) for _ in range(3))
        self.x_in, self.eager_x_in = torch.empty_like(self.output), torch.empty_like(self.output)
        both = case.randn(2 * batch, 2 * channels, *rest)  # with the variance's channels
        self.mean, self.v = both[:, :channels], both[batch:, channels:]
        self.step = torch.zeros(batch, dtype=torch.int32, device=case.device)
        self.seed, self.device = torch.tensor(3, device=case.device), case.device

    def table(self, **columns):
        return torch.from_numpy(build_rows([ROW | columns])).float().to(self.device)

    def arguments(self, table, *, seed=None, history=None, x_in=None, learned=False):
        """Of the op, as the sampling loop gives them."""
        output, v = (self.mean, self.v) if learned else (self.output, None)
        return self.x, (output,), table, self.step, history, seed, None, None, v, self.out, x_in

    def fused(self, table, **options):
        run, arguments = calls.kernel("sampler_step_out", self.x), self.arguments(table, **options)
        history, x_in = options.get("history"), options.get("x_in")
        results = self.out if x_in is None else (self.out, x_in)
        results = results if history is None else (self.out, history)

        def step():
            run(*arguments)
            return results

        return step

    def copy(self):
        self.out.copy_(self.x)

    def check(self, table, *, seed=None, history=None, x_in=None, learned=False):
        """Against the reference in float64, within twice eager's error."""
        noise = {} if seed is None else {"seed": seed}

        def run(x, u, c, table, kept, variance):
            outputs = [u, c] if variance is None else torch.cat((u, c))
            return sampler_step(
                x, outputs, table, self.step, kept, variance=variance, backend="reference", **noise
            )  # fmt: skip

        u, c = (self.mean if learned else self.output).chunk(2)
        tensors = (self.x, u, c, table, history, self.v if learned else None)
        copied = [t if t is not history or t is None else t.clone() for t in tensors]
        eager, oracle = run(*copied), run(*map(calls.widened, tensors))
        mine = None if history is None else history.clone()
        self.fused(table, seed=seed, history=mine, x_in=x_in, learned=learned)()
        testing.assert_as_good_as_eager(self.out, eager, oracle, "sampler_step")
        if x_in is not None:
            assert torch.equal(x_in, torch.cat((self.out, self.out))), "x_in is not c_in x', for both branches"

    def check_eager(self):
        """Guidance as one lerp errs no more than the written form."""
        exact, plain = written(self.x.double(), self.output.double()), written(self.x, self.output)
        found, allowed = testing.error(self.euler(), exact), testing.tolerance(plain, exact)
        assert found <= allowed, f"eager, preallocated errs by {found}, as written {allowed} is allowed"

    # ---- eager, with every output preallocated: the fewest passes that torch's own ops take

    def euler(self, u=None, c=None):
        """Two passes: u + g (c - u) is one lerp."""
        u, c = (self.u, self.c) if u is None else (u, c)
        torch.lerp(u, c, GUIDANCE, out=self.out)
        return torch.add(self.x, self.out, alpha=DT, out=self.out)

    def euler_x_in(self):
        self.euler()
        self.eager_x_in[: len(self.x)].copy_(self.out)
        self.eager_x_in[len(self.x) :].copy_(self.out)
        return self.out, self.eager_x_in

    def ddpm(self):
        self.euler()
        torch.randn(self.z.shape, out=self.z)
        return self.out.add_(self.z, alpha=SIGMA)

    def learned(self):
        self.euler(*self.mean.chunk(2))
        torch.randn(self.z.shape, out=self.z)
        torch.mul(self.v, SPREAD, out=self.scratch)
        return self.out.addcmul_(self.scratch.exp_(), self.z, value=SIGMA)

    def multistep(self, history):
        """x' and y of one combination m; H_1 is written last, as x' reads it."""
        torch.lerp(self.u, self.c, GUIDANCE, out=self.scratch)
        torch.add(self.x, self.scratch, alpha=DT, out=self.out)
        for weight, kept in zip(WEIGHTS, history, strict=False):
            self.out.add_(kept, alpha=weight)
        torch.add(self.x, self.scratch, alpha=Q, out=history[0])
        return self.out, history


# ---- as people write it ------------------------------------------------------------------------------------------


def written(x, output):
    u, c = output.chunk(2)
    return x + DT * (u + GUIDANCE * (c - u))


def written_x_in(x, output):
    x = written(x, output)
    return x, torch.cat([x, x])


def written_ddpm(x, output):
    return written(x, output) + SIGMA * torch.randn_like(x)


def written_learned(x, mean, v):
    return written(x, mean) + SIGMA * torch.exp(SPREAD * v) * torch.randn_like(x)


def written_multistep(x, output, history):
    u, c = output.chunk(2)
    m = u + GUIDANCE * (c - u)
    total = x + DT * m
    for weight, kept in zip(WEIGHTS, history, strict=False):
        total = total + weight * kept
    history[0] = x + Q * m
    return total.to(x.dtype), history


# ---- rows --------------------------------------------------------------------------------------------------------


def _row(work, table, options, others, goals, **fields):
    variants = {"fused": work.fused(table, **options), "copy_": work.copy, **others}
    spare = {name: value.clone() if name == "history" else value for name, value in options.items()}  # cost runs it

    def check():
        work.check_eager()
        work.check(table, **options)

    return Benchmark(
        variants, check, elements=work.x.numel(), goals=goals,
        cost=calls.cost("sampler_step_out", *work.arguments(table, **spare)), **fields,
    )  # fmt: skip


def guided(name, case):
    """A guided step against eager, preallocated and as written."""
    work, (columns, options, prealloc, function, goals) = Work(case), GUIDED[name]
    options = {option: getattr(work, option) if option in ("seed", "x_in") else True for option in options}
    inputs = (work.x, work.mean, work.v) if "learned" in options else (work.x, work.output)
    others = {"eager, preallocated": getattr(work, prealloc), "eager, as written": lambda: function(*inputs)}
    exact = {} if "seed" in options else {"oracle": function}  # else it draws noise of its own
    stated = case.label in STATED and case.dtype == torch.float32
    return _row(
        work, work.table(**columns), options, others, goals if stated else (), inputs=inputs,
        compiles=(function, inputs), **exact,
    )  # fmt: skip


GUIDED = {  # row -> columns of its table beside ROW, options, eager with preallocation, eager as written, goals
    "CFG + Euler row": ({}, (), "euler", written, (within(2.0, "copy_"), faster("eager, preallocated", 1.7))),
    "CFG + Euler row with x_in": (
        {}, ("x_in",), "euler_x_in", written_x_in, (within(3.5, "copy_"), faster("eager, preallocated", 1.7)),
    ),
    "CFG + DDPM row with noise": (
        {"s": SIGMA}, ("seed",), "ddpm", written_ddpm, (faster("eager, preallocated", 3.8),),
    ),
    "CFG + DDPM row with a learned variance": (
        {"s": SIGMA, "l": SPREAD}, ("seed", "learned"), "learned", written_learned,
        (faster("eager, preallocated", 3.0),),
    ),
}  # fmt: skip


def multistep(registers, bound, case):
    """A row of a multistep solver, which reads its history and writes y into the first register."""
    work = Work(case)
    columns = {f"h{j + 1}": weight for j, weight in enumerate(WEIGHTS[:registers])}
    table = work.table(p=1.0, q=Q, flags=pack_flags(writes=(Write.Y,)), **columns)
    history, plain, written_to = (
        torch.randn(registers, *case.shape, device=case.device).repeat(3, *[1] * len(case.shape)).chunk(3)
    )
    stated = case.label in SDXL and case.dtype == torch.float32
    inputs = (work.x, work.output, written_to)
    others = {
        "eager, preallocated": lambda: work.multistep(plain),
        "eager, as written": lambda: written_multistep(*inputs),
    }
    goals = (within(bound, "copy_"),) if stated else ()
    return _row(work, table, {"history": history}, others, goals, inputs=inputs, compiles=(written_multistep, inputs))


def by_parts(case):
    """A stochastic row against its parts: the step alone, then a draw of as many normals."""
    work = Work(case)
    step, drawn = work.fused(work.table()), torch.empty(case.shape, device=case.device)
    inputs = (work.x, work.output)
    parts = {
        "fused, then normal": lambda: (step(), normal(case.shape, seed=work.seed, out=drawn)),
        "eager, preallocated": work.ddpm,
        "eager, as written": lambda: written_ddpm(*inputs),
    }
    stated = case.label in SDXL and case.dtype == torch.float32
    goals = (within(1.3, "fused, then normal"),) if stated else ()
    options, compiles = {"seed": work.seed}, (written_ddpm, inputs)
    return _row(work, work.table(s=SIGMA), options, parts, goals, inputs=inputs, compiles=compiles)


_common = {"dtypes": ("float32", "bfloat16"), "group": "sampler_step", "axes": {"batch": 0, "channels": 1}}
_common |= {"cuda_shapes": calls.MANY}
for _name in GUIDED:
    _quick = None if _name in ("CFG + Euler row", "CFG + DDPM row with noise") else ()
    _gate = _name == "CFG + DDPM row with noise"
    register(_name, shapes=SHAPES, **_common, quick=_quick, gate=_gate)(partial(guided, _name))
for _registers, _bound in ((1, 4.0), (3, 6.0)):
    register(f"CFG + multistep row, {_registers} of history", shapes=SDXL | SHAPES, **_common, quick=())(
        partial(multistep, _registers, _bound)
    )
register("CFG + DDPM row", shapes=SDXL | SHAPES, **_common, quick=())(by_parts)
