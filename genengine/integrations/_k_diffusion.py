"""How a call of `integrations.k_diffusion` becomes a table, and how its model, callback and noise meet the loop."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genengine import solvers
from genengine.ops import _check, normal
from genengine.paths import EDM
from genengine.sampler import sample
from genengine.solvers.churn import gammas
from genengine.solvers.stochastic import ancestral_split
from genengine.table import CoefficientTable

STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """A table for noise levels sigma, and which step each of its rows begins and ends (None: none)."""

    table: CoefficientTable
    begins: tuple[int | None, ...]
    ends: tuple[int | None, ...]
    gammas: tuple[float, ...]
    start_noise: float  # what the first step's churn adds before row 0


@functools.lru_cache(maxsize=128)
def plan(solver: str, sigmas: tuple[float, ...], s_noise: float, draws: tuple[bool, ...], options: tuple) -> Plan:
    """The plan of a solver of `genengine.solvers` over falling noise levels.

    Args:
        solver: its name; "edm" takes the method among its options.
        sigmas: (num_steps + 1,) strictly falling, >= 0.
        s_noise: the factor on all noise.
        draws: per step whether it adds noise; () means that its coefficients decide.
        options: the solver's own, as (name, value) pairs.
    """
    # twice the largest sigma leaves room for churn, and a power of 2 makes sigma/sigma_max and back exact
    path = EDM(2.0 ** (math.frexp(sigmas[0])[1] + 1))
    grid = np.array(sigmas) / path.sigma_max
    own = dict(options)
    table = solvers.SOLVERS[solver](path, grid, prediction="x0", model_time=path.sigma, **own)
    begins, ends = [], []
    for step, count in enumerate(rows_per_step(solver, sigmas, own)):
        begins += [step] + [None] * (count - 1)
        ends += [None] * (count - 1) + [step]
    silent = [end is not None and bool(draws) and not draws[end] for end in ends]
    table = table.with_noise_scale(np.where(silent, 0.0, s_noise))
    increase = churn(sigmas, own) if solver == "edm" else [0.0] * (len(sigmas) - 1)
    start_noise = s_noise * sigmas[0] * math.sqrt(increase[0] * (2 + increase[0]))
    return Plan(table, tuple(begins), tuple(ends), tuple(increase), start_noise)


def churn(sigmas: Sequence[float], options: dict) -> list[float]:
    """gamma of each step, from the options of `solvers.edm`."""
    return gammas(sigmas[:-1], *(options[name] for name in ("s_churn", "s_tmin", "s_tmax")))


def rows_per_step(solver: str, sigmas: Sequence[float], options: dict) -> list[int]:
    """How many model evaluations each step takes."""
    steps = list(zip(sigmas[:-1], sigmas[1:], strict=True))
    if solver == "dpm_fast":
        return list(options["orders"])
    if solver in ("dpm_2_ancestral", "dpmpp_2s_ancestral"):
        return [2 if ancestral_split(*step, options["eta"])[0] > 0 else 1 for step in steps]
    if solver == "dpmpp_sde" or options.get("method") in ("heun", "dpm_2"):
        return [2 if sigma_next > 0 else 1 for _, sigma_next in steps]
    return [1] * len(steps)


@dataclass
class Call:
    """The arguments that all `sample_<name>` share, and the run itself."""

    name: str
    model: Callable[..., Tensor]
    x: Tensor
    extra_args: dict | None
    callback: Callable[[dict], Any] | None
    disable: bool | None
    seed: int | Tensor | None = None
    sample_ids: Tensor | None = None
    capture: str = "never"

    def __post_init__(self):
        if not isinstance(self.x, Tensor) or self.x.dtype not in STATE_DTYPES or self.x.dim() == 0:
            got = f"{self.x.dtype} {tuple(self.x.shape)}" if isinstance(self.x, Tensor) else type(self.x).__name__
            raise TypeError(
                f"{self.name}: x must be a float32, float16 or bfloat16 tensor (B, ...), got {got}; "
                "the state is computed in float32: pass x.float()"
            )
        if self.capture != "never" and self.callback is not None:
            raise ValueError(
                f"{self.name}: capture={self.capture!r} leaves the host no part in a step, but a callback was given; "
                "leave capture at 'never'"
            )
        self.x = self.x.detach()
        self.inference = torch.is_inference_mode_enabled()
        self.extra_args = {} if self.extra_args is None else self.extra_args

    def sampler(self, noise_sampler, default: Callable[[], Callable]) -> Callable | None:
        """noise_sampler as a function of two noise levels; None means in-kernel noise."""
        philox = isinstance(noise_sampler, str) and noise_sampler == "philox"
        if not philox and (self.seed is not None or self.sample_ids is not None):
            raise ValueError(
                f"{self.name}: seed and sample_ids choose in-kernel noise, got noise_sampler={noise_sampler!r}; "
                "pass noise_sampler='philox', or leave them out"
            )
        if philox:
            return None
        if noise_sampler is None:
            return default()
        if not callable(noise_sampler):
            raise TypeError(
                f"{self.name}: noise_sampler must be None, 'philox' or a function of (sigma, sigma_next), "
                f"got {noise_sampler!r}"
            )
        return noise_sampler

    def start(self, plan: Plan, draw: Callable[[], Tensor] | None) -> Tensor:
        """x in float32, with the noise that the first step's churn adds; what `draw` gives is drawn in any case."""
        noise = None if draw is None else draw()
        if noise is not None:
            _check.dtype(self.name, "noise_sampler's result", noise)
            _check.shape(self.name, "noise_sampler's result", noise, "x's shape", self.x.shape)
        if plan.start_noise == 0:
            return self.x.float()
        if draw is None:  # step num_rows: a place in the noise that no row uses
            noise = normal(
                self.x.shape, seed=0 if self.seed is None else self.seed, sample_ids=self.sample_ids,
                step=plan.table.num_rows, stream="step", device=self.x.device,
            )  # fmt: skip
        return self.x.float() + plan.start_noise * noise.float()

    def run(self, plan: Plan, x: Tensor, levels: Sequence[dict], noise: Callable[[int], Tensor] | None) -> Tensor:
        """Run the table from x; levels: what the callback sees of each step beside x, i and denoised."""
        steps = iter(plan.begins)

        def denoiser(x_in, t):
            with self.as_called():
                denoised = self.denoised(x_in, t)
                step = next(steps) if self.callback is not None else None
                if step is not None:  # copies: the loop overwrites x_in, and the model may reuse its output
                    shown = {"x": x_in.clone(), "i": step, **levels[step], "denoised": denoised.clone()}
                    self.callback(shown)
            return denoised

        progress = self.disable is False or (self.disable is None and self.capture != "loop" and sys.stderr.isatty())
        x = sample(
            denoiser, plan.table, x=x, noise=noise, seed=0 if self.seed is None else self.seed,
            sample_ids=self.sample_ids, progress=self.name if progress else False, capture=self.capture,
            model_dtype=self.x.dtype,
        )  # fmt: skip
        return x.to(self.x.dtype)

    @contextlib.contextmanager
    def as_called(self):
        """The caller's inference mode, without gradients: in the loop's, a model could not take any of its own."""
        with torch.inference_mode(self.inference), torch.no_grad():
            yield

    def denoised(self, x_in, t):
        denoised = self.model(x_in, t.to(x_in.dtype), **self.extra_args)
        if not isinstance(denoised, Tensor) or denoised.shape != x_in.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ValueError(f"{self.name}: model must return denoised {tuple(x_in.shape)} like its input, got {got}")
        if denoised.dtype.itemsize > x_in.dtype.itemsize:
            raise TypeError(
                f"{self.name}: model must return {x_in.dtype} like its input, got {denoised.dtype}; "
                "pass x in that dtype, float32 at most, or convert in the model"
            )
        return denoised

    def given(self, sampler: Callable | None, pairs: Sequence[tuple | None]) -> Callable[[int], Tensor] | None:
        """noise(row) for the loop: `sampler` is called for the rows that have a pair of noise levels."""
        if sampler is None:
            return None

        def noise(row):
            if pairs[row] is None:
                return self.x  # not read, as the row's coefficient is 0; it has the shape that the loop checks
            with self.as_called():
                return sampler(*pairs[row])

        return noise


def host_sigmas(name: str, sigmas: Tensor) -> tuple[float, ...]:
    """The noise levels as floats: the one wait for the device of a call."""
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or not sigmas.is_floating_point() or len(sigmas) == 0:
        got = f"{sigmas.dtype} {tuple(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise TypeError(f"{name}: sigmas must be a floating-point tensor (num_steps + 1,), got {got}")
    values = tuple(sigmas.detach().double().cpu().tolist())
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"{name}: sigmas must be finite numbers >= 0, got {list(values)}")
    for i, (sigma, sigma_next) in enumerate(zip(values[:-1], values[1:], strict=True)):
        if not sigma > sigma_next:
            what = "equal" if sigma == sigma_next else "rising"
            raise ValueError(
                f"{name}: sigmas must fall strictly, got {what} sigmas[{i}] = {sigma!r}, sigmas[{i + 1}] = "
                f"{sigma_next!r}; " + ("drop the repeated level" if what == "equal" else "use sigmas.flip(0)")
            )
    return values


def as_number(name: str, option: str, value, *, least: float = -math.inf) -> float:
    """An option as a float; nan and what lies below `least` is refused."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number >= least or (least > -math.inf and number == math.inf):
        expected = f"a finite number >= {least:g}" if least > -math.inf else "a number"
        raise ValueError(f"{name}: {option} must be {expected}, got {value!r}")
    return number
