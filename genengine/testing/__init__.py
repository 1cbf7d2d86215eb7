"""What tests and `genengine verify` share: tolerances, the instruction-set switch, and a case set for every op.

A kernel is right if it errs at most twice as much as the same-dtype eager reference errs against float64, plus one
rounding of the result. Ops made of IEEE operations in one written order (noise, sampler_step, diffuse) must agree with
their reference bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genengine.ops import _registry
from genengine.testing._case import Case

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


@dataclass(frozen=True)
class Error:
    """What one comparison found: the largest deviation from the float64 oracle, and what was allowed."""

    label: str
    error: float
    allowed: float


_recorders: list[list[Error]] = []


@contextlib.contextmanager
def recorded_errors() -> Iterator[list[Error]]:
    """The list that fills with the `Error` of every `assert_as_good_as_eager` made inside the block."""
    errors: list[Error] = []
    _recorders.append(errors)
    try:
        yield errors
    finally:
        _recorders.pop()


def assert_as_good_as_eager(value: Tensor, eager: Tensor, oracle: Tensor, label: str = "result") -> None:
    """Fail unless `value` meets the rule of this module against the float64 `oracle`."""
    assert value.dtype == eager.dtype, f"{label}: dtype {value.dtype}, eager gives {eager.dtype}"
    assert value.shape == eager.shape, f"{label}: shape {tuple(value.shape)}, eager gives {tuple(eager.shape)}"
    assert_within(error(value, oracle.double()), tolerance(eager, oracle.double()), label)


def assert_within(found: float, allowed: float, label: str = "result") -> None:
    """Fail unless the deviation from the float64 oracle is allowed; inside `recorded_errors`, note both."""
    for errors in _recorders:
        errors.append(Error(label, found, allowed))
    assert found <= allowed, f"{label}: error {found:.3g} against float64, allowed {allowed:.3g}"


# ---- cases: odd, fresh inputs that exercise every path of a kernel; those of an op stand in testing/<op>.py ---------


def cases(op_name: str, device: torch.device, seed: int = 0, *, thin: bool = False) -> list[Case]:
    """The case set of one op on one device.

    thin: for Triton's interpreter, the costly cases (marked `large`) in float32 alone.
    """
    module = importlib.import_module(f"genengine.testing.{_registry.OPS[op_name].module}")
    found = module.CASES[op_name](torch.Generator().manual_seed(seed), device)
    return [case for case in found if not (thin and case.large and set(case.dtypes) != {torch.float32})]


def check_case(op, backend: str, case: Case) -> str | None:
    """Run one case on one backend and on the reference; None if it is right, else what is wrong."""
    got = _outputs(op.overloads[backend], case, case.args)
    eager = _outputs(op.overloads["reference"], case, case.args)
    if case.exact:
        same = _same_up_to_truncation if backend == "triton" and _registry.triton_interpreted() else _same
        wrong = [i for i, (a, b) in enumerate(zip(got, eager, strict=True)) if not same(a, b)]
        return f"{case.label}: output {wrong[0]} differs from the reference" if wrong else None
    wide = case.oracle or tuple(_widen(argument) for argument in case.args)
    oracle = _outputs(op.overloads["reference"], case, wide)
    for i, (value, plain, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        if not value.is_floating_point():
            if not (_same(value, exact) and _same(plain, exact)):
                return f"{case.label}: output {i} differs from the reference"
            continue
        allowed = tolerance(plain, exact.double()) + case.slack.get(i, 0.0)
        found = error(value, exact.double())
        if found > allowed:
            return f"{case.label}: output {i} errs by {found:.3g} against float64, {allowed:.3g} allowed"
    return None


def _outputs(overload, case, args):
    args = tuple(_clone(argument) if i in case.mutated else argument for i, argument in enumerate(args))
    result = overload(*args)
    if case.mutated:
        written = (args[i] if isinstance(args[i], list) else [args[i]] for i in case.mutated)
        return [tensor for tensors in written for tensor in tensors if isinstance(tensor, Tensor)]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _clone(argument):
    if isinstance(argument, list):
        return [_clone(entry) for entry in argument]
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
