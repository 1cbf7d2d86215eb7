"""Reads any affine third-party sampler into a coefficient table: a scheduler object, a sampling loop, a step function.

Basis tensors are pushed through the sampler and its coefficients read off; then the table is run against the sampler on
random tensors, in float64. What no row can express is refused with the reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genengine._loop_fit import loop_rows
from genengine._probe import Draws
from genengine._recording import Recording, record_loop, record_scheduler
from genengine._registers import NotAffine, realise
from genengine.ops.sampler_step import sampler_step
from genengine.table import CoefficientTable, Phi, build_rows

TOLERANCE = 1e-5  # relative; a sampler's own coefficients are often float32
_SHAPE = (2, 3, 5, 7)


def trace(
    sampler: Any,
    num_steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    begin: int = 0,
    name: str | None = None,
) -> CoefficientTable:
    """Read a third-party sampler into a table, quirks included, and verify the table against it.

    Three kinds of sampler are understood:

        scheduler      an object with `timesteps` and step(model_output, timestep, sample, **options), as in diffusers;
                       num_steps calls its set_timesteps, on a copy; without it the timesteps already set are used
        loop           a function (model, x, sigmas, **options) -> x, as in k-diffusion, with `sigmas` given; it calls
                       model(x, sigma) at the noise levels it likes
        step function  (x, output, row) -> x', with num_steps given: one call for each row

    Args:
        sampler: one of these; it is copied, or called on small tensors of its own, and left as it was.
        num_steps: see above; for a step function the number of rows.
        sigmas: (N,) falling noise levels of a loop.
        options: keyword arguments of every step, or of the loop.
        begin: the index of the timestep to start from (schedulers).
        name: of the table; by default the sampler's.

    Returns:
        A table whose model times are the scheduler's timesteps, the loop's noise levels or the row numbers; guidance
        1. A clamp (clip_sample, say) becomes phi; with `thresholding` its rows are DYNAMIC_THRESHOLD, whose r
        `extensions.DynamicThreshold` writes.

    Raises:
        NotAffine: a ValueError that names the row and what is not an affine row, or where the table and the sampler
        differ.
        TypeError: where the sampler is none of the three.
    """
    name = name or getattr(sampler, "__name__", type(sampler).__name__)
    options = dict(options or {})
    try:
        if hasattr(sampler, "step") and (hasattr(sampler, "timesteps") or hasattr(sampler, "set_timesteps")):
            return _trace_scheduler(sampler, num_steps, options, begin, name)
        if callable(sampler) and sigmas is not None:
            return _trace_loop(sampler, sigmas, options, name)
        if callable(sampler) and num_steps is not None:
            return _trace_scheduler(_Stepper(sampler, num_steps), None, options, 0, name)
    except NotAffine as error:
        raise NotAffine(f"trace: {name}: {error}") from None
    raise TypeError(
        "trace: sampler must be a scheduler (timesteps, step), a loop with sigmas=, or a step function with "
        f"num_steps=, got {name}"
    )


class _Stepper:
    """A step function as a scheduler."""

    def __init__(self, function, num_steps):
        self.function, self.timesteps = function, torch.arange(num_steps)

    def step(self, model_output, timestep, sample, **options):
        return (self.function(sample, model_output, int(timestep), **options),)


# ---- schedulers --------------------------------------------------------------------------------------------------


def _trace_scheduler(scheduler, num_steps, options, begin, name):
    if num_steps is not None:
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_steps)
    traced = scheduler_table(scheduler, begin=begin, options=options, name=name)
    verify_scheduler(traced, scheduler, begin=begin, options=options)
    return traced.table


@dataclass
class TracedScheduler:
    """A scheduler's table, and the recording it was read from; chained: rows that rely on x being the last x'."""

    table: CoefficientTable
    recording: Recording
    chained: list[bool]


def scheduler_table(scheduler: Any, *, begin: int, options: Mapping[str, Any], name: str) -> TracedScheduler:
    """The table of a scheduler whose timesteps are set, not yet verified."""
    config = getattr(scheduler, "config", {})
    _require_fresh(scheduler)
    dynamic = bool(config.get("thresholding"))
    if dynamic:  # a threshold of at most 1 is a clamp, which the probe shows
        scheduler = copy.deepcopy(scheduler)
        scheduler.register_to_config(sample_max_value=1.0)
    learned = config.get("variance_type") in ("learned", "learned_range")
    record = lambda variance: record_scheduler(scheduler, begin=begin, options=options, variance=variance)  # noqa: E731
    recording = record(0.0 if learned else None)
    phi = Phi.DYNAMIC_THRESHOLD if dynamic else Phi.CLAMP
    rows, chained = realise(recording.outputs, recording.probe, phi)
    if learned:
        _learn(rows, record(1.0), phi)
    scales = [*recording.c_in[1:], 1.0]
    for row, t, c_in in zip(rows, recording.times, scales, strict=True):
        row |= {"t_model": t, "c_in": c_in, "g1": 1.0}
    init_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    table = CoefficientTable(build_rows(rows), init_scale, recording.c_in[0], name)
    return TracedScheduler(table, recording, chained)


def _require_fresh(scheduler):
    if getattr(scheduler, "_step_index", None) is not None or getattr(scheduler, "counter", 0):
        raise NotAffine("the scheduler has stepped already; call set_timesteps again, or pass num_steps")
    if getattr(scheduler, "timesteps", None) is None or len(scheduler.timesteps) == 0:
        raise NotAffine("no timesteps are set; call set_timesteps first, or pass num_steps")


def _learn(rows, other, phi):
    """The l column: how the noise of each row grows with the learned variance, s exp(l v)."""
    for row, more in zip(rows, realise(other.outputs, other.probe, phi)[0], strict=True):
        if row["s"] != more["s"]:
            if row["s"] <= 0.0:
                raise NotAffine("the standard deviation of the noise is not the exponential of the learned variance")
            row["l"] = float(np.log(more["s"] / row["s"]))


def verify_scheduler(traced: TracedScheduler, scheduler: Any, *, begin: int, options: Mapping[str, Any]) -> None:
    """Run scheduler and table side by side on random tensors, float64 throughout.

    Raises:
        NotAffine: at the first row where they differ by more than `TOLERANCE`.
    """
    table, scheduler = traced.table, copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.empty(shape, dtype=torch.float64).normal_(generator=generator)  # noqa: E731
    drawn = []
    draws = Draws(lambda index, shape: drawn.append(normal(*shape)) or drawn[-1], _SHAPE[-1])
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: torch.randn(_SHAPE)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    threshold = _Threshold(scheduler.config) if getattr(scheduler, "config", {}).get("thresholding") else None
    runner = _TableRunner(table, normal(*_SHAPE) * float(np.max(np.abs(table.init_scale))), threshold)
    x = runner.x
    for row in range(table.num_rows):
        drawn.clear()
        draws.next_row()
        learned = (table.column("l") != 0).any()
        output = normal(_SHAPE[0], _SHAPE[1] * (2 if learned else 1), *_SHAPE[2:])
        x = x.clone()  # a step may write to its sample
        with torch.no_grad(), draws:
            t = scheduler.timesteps[begin + row]
            t = t.expand(_SHAPE[0]) if traced.recording.per_sample_time else t
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            result = scheduler.step(output, t, x, **options)
        x = result[0]
        if x.shape != _SHAPE:
            raise NotAffine(f"row {row}: the step of a sample of shape {_SHAPE} returned {tuple(x.shape)}")
        used = traced.recording.probe.draw_used(traced.recording.outputs[row], row)
        ours = runner.step(row, output, None if used is None else drawn[used])
        error = float((ours - x).abs().max() / x.abs().max().clamp(min=1e-30))
        if not error <= TOLERANCE:
            raise NotAffine(
                f"row {row} (t = {traced.recording.times[row]:g}) differs from its table by {error:.1e} on random "
                "tensors: the step is not affine in (sample, model_output, noise), does not act on elements alone, or "
                "draws from somewhere else than torch.randn"
            )


class _Threshold:
    """r of dynamic thresholding: a quantile of |x0| per sample, from 1 to a largest value (Saharia 2022).

    The row's y is x0 times a factor; its r, where x0 is 1, is that factor.
    """

    def __init__(self, config):
        self.quantile, self.max_value = config["dynamic_thresholding_ratio"], config["sample_max_value"]

    def __call__(self, u: Tensor, r: float) -> Tensor:
        x0 = (u / r).abs().flatten(1)
        return r * torch.quantile(x0, self.quantile, dim=1).clamp(min=1.0, max=self.max_value)


class _TableRunner:
    """A table run in float64 on given outputs and noise."""

    def __init__(self, table: CoefficientTable, x: Tensor, threshold: _Threshold | None = None):
        self.rows = torch.from_numpy(table.rows.copy())
        self.x, self.history = x, torch.zeros(3, *x.shape, dtype=torch.float64)
        self._threshold = threshold

    def step(self, row: int, output: Tensor, z: Tensor | None) -> Tensor:
        m, v = (output, None) if output.shape == self.x.shape else output.chunk(2, dim=1)
        table = self.rows[row : row + 1].repeat(1, self.x.shape[0], 1)
        if self._threshold is not None:
            _, _, _, p, q, r = table[0, 0, :6].tolist()
            table[0, :, 5] = self._threshold(p * self.x + q * m, r)
        step = torch.zeros(self.x.shape[0], dtype=torch.int32)
        self.x = sampler_step(self.x, (m.contiguous(),), table, step, self.history, noise=z, variance=v)
        return self.x


# ---- loops -------------------------------------------------------------------------------------------------------


def _trace_loop(loop, sigmas, options, name):
    options = dict(options)
    if "disable" in inspect.signature(loop).parameters:
        options.setdefault("disable", True)
    if "noise_sampler" in inspect.signature(loop).parameters:
        options.setdefault("noise_sampler", lambda *_: torch.randn(1))
    recording = record_loop(loop, sigmas, options)
    rows = loop_rows(recording)
    for row, sigma in zip(rows, recording.sigmas, strict=True):
        row |= {"t_model": sigma, "g1": 1.0}
    table = CoefficientTable(build_rows(rows), float(sigmas[0]), 1.0, name).validate()
    _verify_loop(table, loop, sigmas, options)
    return table


def _verify_loop(table, loop, sigmas, options):
    generator = torch.Generator().manual_seed(0)
    normal = lambda: torch.empty(_SHAPE, dtype=torch.float64).normal_(generator=generator)  # noqa: E731
    x, outputs, drawn = normal(), [], {}

    def model(x, sigma, **extra):
        outputs.append(normal())
        return outputs[-1]

    draws = Draws(
        lambda index, shape: drawn.setdefault(len(outputs) - 1, []).append(normal()) or drawn[len(outputs) - 1][-1], 7
    )
    levels = torch.as_tensor(np.asarray(sigmas, dtype=np.float64))
    with torch.no_grad(), draws:
        expected = loop(model, x.clone(), levels, **options)
    runner = _TableRunner(table, x)
    for row, output in enumerate(outputs):
        runner.step(row, output, drawn.get(row, [None])[-1])
    error = float((runner.x - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise NotAffine(
            f"the loop differs from its table by {error:.1e} on random tensors: it is not affine in x and the model's "
            "outputs, or adds noise before its first evaluation (churn)"
        )
