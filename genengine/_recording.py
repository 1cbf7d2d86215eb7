"""What a sampler did with the basis of a probe: a scheduler object row by row, or a loop over model evaluations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genengine._probe import MAX_DRAWS, Draws, Probe
from genengine._registers import NotAffine

_STATE = (int, float, bool, str, type(None), list, tuple, Tensor)


@dataclass
class Recording:
    """A sampler's run on a probe, row by row.

    outputs: x' as vectors over the probe's elements. fields: the other tensors of each step's result, likewise by name.
    states: the scheduler's attributes after each row; probe tensors in them are `Combination`s. initial: before.
    draws: how often each row drew noise. noise_calls: the arguments of a noise sampler object's calls, for each row.
    c_in: the factor of `scale_model_input`. times: what the scheduler was told as its timestep; per_sample_time: as a
    (B,) tensor.
    """

    probe: Probe
    initial: dict[str, Any] = field(default_factory=dict)
    outputs: list[np.ndarray] = field(default_factory=list)
    fields: list[dict[str, np.ndarray]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)
    noise_calls: list[list[tuple]] = field(default_factory=list)
    c_in: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    per_sample_time: bool = False
    output_class: type = tuple


class Combination:
    """A tensor in a scheduler's state, by its coefficients over a probe's elements, most of which are 0."""

    def __init__(self, values: np.ndarray):
        self._size, self._index = len(values), np.flatnonzero(values)
        self._nonzero = values[self._index]

    @property
    def values(self) -> np.ndarray:
        values = np.zeros(self._size)
        values[self._index] = self._nonzero
        return values


class NoiseSampler:
    """Stands in for a noise sampler object, such as a Brownian tree, and notes what it is called with."""

    def __init__(self, draws: Draws, probe: Probe):
        self._draws, self._probe, self.calls = draws, probe, []

    def __call__(self, *arguments) -> Tensor:
        self.calls.append(tuple(float(value) for value in arguments))
        return torch.randn(self._probe.shape)


def record_scheduler(
    scheduler: Any, *, begin: int = 0, options: Mapping[str, Any] | None = None, variance: float | None = None
) -> Recording:
    """Step a copy of a scheduler through its timesteps from index `begin` on; every row gets its own basis.

    Args:
        scheduler: has `timesteps` and step(model_output, timestep, sample, ...) and has not stepped yet.
        options: further keyword arguments of every step.
        variance: the value of the learned variance, for models whose output has twice the channels.

    Raises:
        NotAffine: where a step raises, or draws noise too often.
    """
    arguments = begin, options or {}, variance
    try:
        return _record(copy.deepcopy(scheduler), *arguments, per_sample_time=False)
    except _WantsBatchOfTimes:
        return _record(copy.deepcopy(scheduler), *arguments, per_sample_time=True)


class _WantsBatchOfTimes(Exception):
    """The scheduler indexes its timestep, so it wants one for each sample."""


def _record(scheduler, begin, options, variance, *, per_sample_time) -> Recording:
    times = scheduler.timesteps[begin:].cpu()
    channels = 1 if variance is None else 3
    recording = Recording(Probe(len(times), channels), per_sample_time=per_sample_time)
    probe, row = recording.probe, 0
    draws = Draws(lambda index, shape: _draw(probe, row, index), probe.size)
    sampler = NoiseSampler(draws, probe)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = sampler
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    initial = recording.initial = {
        name: copy.copy(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()
    }
    with torch.no_grad(), draws:
        for row, t in enumerate(times):
            draws.next_row()
            sampler.calls = []
            ones = torch.ones(probe.shape, dtype=torch.float64)
            scaled = scheduler.scale_model_input(ones, t) if hasattr(scheduler, "scale_model_input") else ones
            output = probe.output(row)
            if variance is not None:
                output = torch.cat([output, torch.full_like(output, variance)], 1)
            try:
                result = scheduler.step(output, t.reshape(1) if per_sample_time else t, probe.state(row), **options)
            except IndexError as error:
                if row == 0 and not per_sample_time:
                    raise _WantsBatchOfTimes from error
                if row and row + 1 == len(times):
                    break  # the last of the timesteps is only an end
                raise _failed(row, t, error) from error
            except Exception as error:
                raise _failed(row, t, error) from error
            recording.c_in.append(float(scaled.flatten()[0]))
            recording.times.append(float(t))
            _note(recording, result, scheduler, initial, draws.count, sampler.calls)
    return recording


def _failed(row: int, t: Tensor, error: Exception) -> NotAffine:
    return NotAffine(f"row {row}: its step(model_output, {t.item()}, sample) raised {type(error).__name__}: {error}")


def _draw(probe: Probe, row: int, index: int) -> Tensor:
    if index >= MAX_DRAWS:
        raise NotAffine(f"row {row} draws noise more than {MAX_DRAWS} times")
    return probe.draw(row, index)


def _note(recording, result, scheduler, initial, draws, calls):
    probe = recording.probe
    named = (
        dict(result)
        if isinstance(result, Mapping)
        else dict(enumerate(result if isinstance(result, tuple) else [result]))
    )
    first, *others = named
    recording.output_class = type(result)
    if not isinstance(named[first], Tensor) or named[first].shape != probe.shape:
        got = tuple(named[first].shape) if isinstance(named[first], Tensor) else type(named[first]).__name__
        raise NotAffine(f"row {len(recording.outputs)}: the step of a sample of shape {probe.shape} returned {got}")
    recording.outputs.append(probe.read(named[first]))
    recording.fields.append({name: probe.read(named[name]) for name in others if _is_probe(named[name], probe)})
    recording.draws.append(draws)
    recording.noise_calls.append(calls)
    recording.states.append(
        {
            name: _encode(value, probe)
            for name, value in vars(scheduler).items()
            if isinstance(value, _STATE) and not (isinstance(value, Tensor) and value is initial.get(name))
        }
    )


def _is_probe(value: Any, probe: Probe) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == probe.size


def _encode(value: Any, probe: Probe) -> Any:
    if _is_probe(value, probe):
        return Combination(probe.read(value))
    if isinstance(value, list | tuple):
        return type(value)(_encode(item, probe) for item in value)
    return value


@dataclass
class LoopRecording:
    """A loop's state at every evaluation, then its result, as vectors; and the sigma of each evaluation."""

    probe: Probe
    states: list[np.ndarray]
    sigmas: list[float]


def record_loop(loop: Callable[..., Tensor], sigmas: Sequence[float], options: Mapping[str, Any]) -> LoopRecording:
    """Run loop(model, x, sigmas, **options) on a probe; noise is drawn by torch.randn or the loop's `noise_sampler`.

    Raises:
        NotAffine: where how often the model is evaluated depends on the values, or noise is drawn too often.
    """
    levels = torch.as_tensor(np.asarray(sigmas, dtype=np.float64))
    probe = Probe(_count_evaluations(loop, levels, options))
    recording = LoopRecording(probe, [], [])

    def model(x, sigma, **extra):
        row = len(recording.sigmas)
        if row == probe.num_rows:
            raise _adaptive()
        draws.next_row()
        recording.states.append(probe.read(x))
        recording.sigmas.append(float(torch.as_tensor(sigma).flatten()[0]))
        return probe.output(row)

    def draw(index, shape):  # what is drawn before the first evaluation has no row; the table's verification sees it
        row = len(recording.sigmas) - 1
        return probe.zeros() if row < 0 else _draw(probe, row, index)

    draws = Draws(draw, probe.size)
    with torch.no_grad(), draws:
        result = loop(model, probe.state(0), levels, **options)
    if len(recording.sigmas) != probe.num_rows:
        raise _adaptive()
    recording.states.append(probe.read(result))
    return recording


def _adaptive() -> NotAffine:
    return NotAffine("how often the loop evaluates the model depends on the values: adaptive steps are no table")


def _count_evaluations(loop, sigmas, options) -> int:
    count = 0

    def model(x, sigma, **extra):
        nonlocal count
        count += 1
        return torch.zeros_like(x)

    with torch.no_grad(), Draws(lambda index, shape: torch.zeros(1), 1):
        loop(model, torch.zeros(1, 1, 1, 1, dtype=torch.float64), sigmas, **options)
    return count
