"""What tests and `genengine verify` share: tolerances, the instruction-set switch, and a case set for every op.

A kernel is right if it errs at most twice as much as the same-dtype eager reference errs against float64, plus one
rounding of the result. Ops made of IEEE operations in one written order (noise, sampler_step, diffuse) must agree with
their reference bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genengine.ops import _registry

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[str]:
    """Run the CPU loops of the block in one instruction set; yields the one in use (the CPU may lack `name`)."""
    switch = torch.ops.genengine.cpu_isa.default
    previous = switch(-1)
    try:
        yield ISAS[switch(ISAS.index(name))]
    finally:
        switch(previous)


def current_isa() -> str:
    return ISAS[torch.ops.genengine.cpu_isa.default(-1)]


def tolerance(eager: Tensor, oracle: Tensor) -> float:
    """The error a kernel may make: twice eager's largest against the float64 oracle, plus one rounding of the largest
    value in eager's dtype."""
    if oracle.numel() == 0:
        return 0.0
    finite = torch.isfinite(oracle)
    eager_error = (eager.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    rounding = torch.finfo(eager.dtype).eps * oracle[finite].abs().max().item() if finite.any() else 0.0
    return 2 * eager_error + rounding


def error(value: Tensor, oracle: Tensor) -> float:
    """Largest deviation from the oracle; infinite if a non-finite value stands where the oracle has another."""
    if value.shape != oracle.shape:
        return float("inf")
    if oracle.numel() == 0:
        return 0.0
    same = value.double() == oracle
    both_nan = value.isnan() & oracle.isnan()
    deviation = torch.where(same | both_nan, 0.0, (value.double() - oracle).abs())
    return deviation.nan_to_num(nan=float("inf")).max().item()


def assert_as_good_as_eager(value: Tensor, eager: Tensor, oracle: Tensor, label: str = "result") -> None:
    """Fail unless `value` meets the rule of this module against the float64 `oracle`."""
    assert value.dtype == eager.dtype, f"{label}: dtype {value.dtype}, eager gives {eager.dtype}"
    assert value.shape == eager.shape, f"{label}: shape {tuple(value.shape)}, eager gives {tuple(eager.shape)}"
    allowed, found = tolerance(eager, oracle.double()), error(value, oracle.double())
    assert found <= allowed, f"{label}: error {found:.3g} against float64, allowed {allowed:.3g}"


# ---- cases: odd, fresh inputs that exercise every path of a kernel -------------------------------------------------
#
# Elements per sample: fewer than a vector, and not a multiple of one; whole 16-byte vectors (the vectorised kernels);
# more than one Triton block of 1024, whole and not. D of adaln: every team of the CUDA launcher, in vectors and in
# single elements, and Triton's second loop (D > 4096); tokens: one chunk, and more than a group of chunks.


@dataclass(frozen=True)
class Case:
    """One call of a dispatcher op: `args`, and which of them the op writes; exact: bits must equal the reference's.

    large: slow where kernels are interpreted. dtypes: of the state and of the rest.
    """

    label: str
    args: tuple
    mutated: tuple[int, ...] = ()
    exact: bool = False
    large: bool = False
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)


def cases(op_name: str, device: torch.device, seed: int = 0, *, thin: bool = False) -> list[Case]:
    """The case set of one op on one device.

    thin: for Triton's interpreter, the costly cases (marked `large`) in float32 alone.
    """
    maker = _MAKERS.get(op_name)
    found = maker(torch.Generator().manual_seed(seed), device) if maker else []
    return [case for case in found if not (thin and case.large and set(case.dtypes) != {torch.float32})]


def check_case(op, backend: str, case: Case) -> str | None:
    """Run one case on one backend and on the reference; None if it is right, else what is wrong."""
    got = _outputs(op.overloads[backend], case, case.args)
    eager = _outputs(op.overloads["reference"], case, case.args)
    if case.exact:
        same = _same_up_to_truncation if backend == "triton" and _registry.triton_interpreted() else _same
        wrong = [i for i, (a, b) in enumerate(zip(got, eager, strict=True)) if not same(a, b)]
        return f"{case.label}: output {wrong[0]} differs from the reference" if wrong else None
    oracle = _outputs(op.overloads["reference"], case, tuple(_widen(argument) for argument in case.args))
    for i, (value, plain, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        allowed, found = tolerance(plain, exact.double()), error(value, exact.double())
        if found > allowed:
            return f"{case.label}: output {i} errs by {found:.3g} against float64, {allowed:.3g} allowed"
    return None


def _outputs(overload, case, args):
    args = tuple(_clone(argument) if i in case.mutated else argument for i, argument in enumerate(args))
    result = overload(*args)
    if case.mutated:
        return [args[i] for i in case.mutated if isinstance(args[i], Tensor)]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _clone(argument):
    return argument.clone() if isinstance(argument, Tensor) else argument


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _same_up_to_truncation(a, b):
    """Triton's interpreter truncates to bfloat16 where the hardware rounds to nearest: allow one last place."""
    if a.dtype != torch.bfloat16 or _same(a, b):
        return _same(a, b)
    apart = a.view(torch.int16).int() - b.view(torch.int16).int()
    return bool(((apart.abs() <= 1) | (a == b)).all())


def _widen(argument):
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    if isinstance(argument, (list, tuple)):
        return type(argument)(_widen(entry) for entry in argument)
    return argument


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of one sample: 70 and 4205 elements, odd; 1024 and 1728, whole vectors. The last two do not fit a block of 1024.
_SMALL, _LARGE = ((3, 2, 5, 7), (2, 4, 16, 16)), ((2, 5, 29, 29), (2, 3, 24, 24))


def _noise_cases(generator, device) -> list[Case]:
    found = []
    for shape in ((3, 5), (2, 3, 16, 16), (2, 3, 24, 24), (1, 4099)):
        batch = shape[0]
        ids = torch.randint(0, 2**32, (batch,), generator=generator).to(device)
        seeds = torch.randint(-(2**62), 2**62, (batch,), generator=generator).to(device)
        out = torch.zeros(shape, device=device)
        found.append(Case(f"{shape}, one seed", (out, seeds[0].clone(), None, 7, 1), (0,), True))
        found.append(Case(f"{shape}, seeds and ids", (out, seeds, ids, 2**32 - 1, 3), (0,), True))
    return found


def random_table(generator, rows: int, batch: int, branches: int, registers: int) -> Tensor:
    """Coefficients of every kind: dense, zero, clamped, thresholded, with reads and writes of every register used."""
    table = torch.randn(rows, batch, 16, generator=generator) * (torch.rand(rows, 1, 16, generator=generator) > 0.3)
    table[..., 5] = table[..., 5].abs() + 0.5
    table[..., 12] = table[..., 12].abs()
    table[..., 13] = 0
    table[..., 1] *= branches > 1
    table[..., 2] *= branches > 2
    flags = torch.randint(0, 3, (rows, 1), generator=generator)
    for j in range(3):
        if j < registers:
            flags = flags + torch.randint(0, 3, (rows, 1), generator=generator) * 4 ** (j + 1)
        else:
            table[..., 9 + j] = 0
    table[..., 15] = flags.float()
    return table


_STEP_KINDS = ((1, 0, "none"), (2, 1, "drawn"), (3, 3, "given"), (2, 2, "drawn channels_last"))


def _step_cases(generator, device) -> list[Case]:
    pairs = [(d, d) for d in _DTYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    return [
        _step_case(generator, device, state, model, shape, *kind)
        for state, model in pairs
        for shape in (*_SMALL, *_LARGE)
        for kind in _STEP_KINDS
    ]


def _step_case(generator, device, state, model, shape, branches, registers, noise) -> Case:
    memory = torch.channels_last if "channels_last" in noise else torch.contiguous_format

    def fresh(dtype, batch=shape[0]):
        values = torch.randn(batch, *shape[1:], generator=generator)
        return values.to(device, dtype).contiguous(memory_format=memory)

    history = None
    if registers:
        history = fresh(torch.float32, registers * shape[0]).unflatten(0, (registers, shape[0]))
    table = random_table(generator, 4, shape[0] if noise == "drawn" else 1, branches, registers).to(device)
    step = torch.arange(shape[0], dtype=torch.int32, device=device) + 2  # the last samples are finished
    seed = torch.tensor(12345, device=device) if "drawn" in noise else None
    given = fresh(torch.float32) if noise == "given" else None
    outputs, out = [fresh(model) for _ in range(branches)], torch.zeros_like(fresh(state))
    x_in = torch.zeros_like(fresh(model, 2 * shape[0]))
    args = (fresh(state), outputs, table, step, history, seed, None, given, out, x_in)
    label = f"{state} state, {model} model, {shape}, {branches} branches, noise {noise}"
    return Case(label, args, (4, 8, 9), True, shape in _LARGE, (state, model))


def _advance_cases(generator, device) -> list[Case]:
    table = torch.randn(5, 3, 16, generator=generator).to(device)
    step = torch.tensor([0, 3, 4, 5, 1, 2], dtype=torch.int32, device=device)
    return [
        Case("rows per sample", (step, table, torch.zeros(12, device=device)), (0, 2), True),
        Case("shared rows", (step, table[:, :1].contiguous(), torch.zeros(6, device=device)), (0, 2), True),
    ]


def _diffuse_cases(generator, device) -> list[Case]:
    found = []
    memories = (torch.contiguous_format, torch.channels_last)
    for dtype, shape, memory in itertools.product(_DTYPES, (*_SMALL, *_LARGE), memories):
        x0 = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=memory)
        coefficients = torch.randn(4, shape[0], generator=generator).to(device).unbind(0)
        noise = torch.randn(shape, generator=generator).to(device).contiguous(memory_format=memory)
        seed, ids = torch.tensor(99, device=device), torch.arange(shape[0], device=device) + 2**32 - shape[0]
        label = f"{dtype}, {shape}, {str(memory).removeprefix('torch.')}"
        kind = ((), True, shape in _LARGE, (dtype, dtype))
        found.append(Case(f"{label}, drawn", (x0, *coefficients, seed, ids, 5, None), *kind))
        found.append(Case(f"{label}, given", (x0, *coefficients, None, None, 0, noise), *kind))
    return found


# (tokens, D)
_ADALN_SMALL = ((5, 17), (5, 64), (5, 384), (5, 768), (5, 1152), (5, 3000))
_ADALN_LARGE = ((300, 40), (300, 17), (2, 2501), (17, 8192))


def _adaln_tensors(generator, device, dtype, narrow, batch=2):
    for tokens, width in (*_ADALN_SMALL, *_ADALN_LARGE):
        fresh = lambda *shape, kind: torch.randn(*shape, generator=generator).to(device, kind)  # noqa: E731
        rows = fresh(batch, 6 * width, kind=narrow).chunk(6, dim=1)  # strided views into one modulation table
        x, branch = fresh(batch, tokens, width, kind=dtype), fresh(batch, tokens, width, kind=narrow)
        yield (tokens, width), x, branch, rows, fresh(batch, tokens, width, kind=dtype)


def _adaln_maker(name: str) -> Callable:
    def make(generator, device):
        found = []
        pairs = [(d, d) for d in _DTYPES] + [(torch.float32, torch.bfloat16)]
        for dtype, narrow in pairs:
            for size, x, branch, (gate, scale, shift, *_), grad in _adaln_tensors(generator, device, dtype, narrow):
                grad_h = grad.to(narrow)
                args = {
                    "adaln": (x, scale, shift, 1e-6),
                    "adaln_backward": (grad_h, x, scale, 1e-6),
                    "gated_adaln": (x, branch, gate, scale, shift, 1e-6),
                    "gated_adaln_backward": (grad, grad_h, x, branch, gate, scale, 1e-6),
                }[name]
                label = f"{dtype}/{narrow}, (N, D) = {size}"
                found.append(Case(label, args, large=size in _ADALN_LARGE, dtypes=(dtype, narrow)))
        return found

    return make


_MAKERS: dict[str, Callable] = {
    "normal_out": _noise_cases,
    "uniform_out": _noise_cases,
    "sampler_step_out": _step_cases,
    "advance": _advance_cases,
    "diffuse": _diffuse_cases,
    **{name: _adaln_maker(name) for name in ("adaln", "adaln_backward", "gated_adaln", "gated_adaln_backward")},
}
