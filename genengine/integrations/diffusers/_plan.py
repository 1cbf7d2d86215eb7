"""A traced scheduler ready to step: its table, and what each row draws and leaves behind in the scheduler."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from genengine._probe import Reading
from genengine._recording import Combination
from genengine.table import Phi
from genengine.trace import TracedScheduler, scheduler_table, verify_scheduler

_KEPT_TENSORS = 16  # tables and steps on devices, for each plan


class Term(NamedTuple):
    """x x_j + m m_j + clamped clamp(p x_j + q m_j, -1, 1) + z z_j for the row j that is `lag` rows back."""

    lag: int
    x: float
    m: float
    clamped: float
    p: float
    q: float
    z: float

    def evaluate(self, x: Tensor, m: Tensor, z: Tensor | None) -> Tensor:
        total = self.x * x + self.m * m
        if self.clamped:
            total = total + self.clamped * (self.p * x + self.q * m).clamp(-1.0, 1.0)
        return total if z is None or not self.z else total + self.z * z


class Affine(NamedTuple):
    """A sum over rows of terms of their states, outputs and noise."""

    terms: tuple[Term, ...]

    def evaluate(self, inputs) -> Tensor:
        """inputs[-1 - lag] = (x, m, z)."""
        return sum((term.evaluate(*inputs[-1 - term.lag]) for term in self.terms), torch.zeros_like(inputs[-1][0]))


class Rule(NamedTuple):
    """What a step does with dtypes: of x', and of each draw of noise."""

    out: torch.dtype
    draws: tuple[torch.dtype, ...]


class Plan:
    """Everything that `step` needs to know about a schedule, found out once by tracing it.

    table: the coefficients. states[k]: the attributes a scheduler has after row k that are no tensors of the sample's
    shape; lazy[k]: those that are, as `Affine`s. draws[k]: (how often row k draws, which draw it adds, or None).
    chained[k]: row k is right only where x is the tensor that row k - 1 returned.
    """

    def __init__(self, scheduler: Any, begin: int, options: Mapping[str, Any]):
        self._scheduler, self.begin = scheduler, begin
        self._options = dict(options)
        self.traced = scheduler_table(scheduler, begin=begin, options=options, name=type(scheduler).__name__)
        verify_scheduler(self.traced, scheduler, begin=begin, options=options)
        recording = self.traced.recording
        self.table = self.traced.table
        self.num_rows = self.table.num_rows
        self.chained = self.traced.chained
        self.has_history = self.table.num_history > 0
        self.c_in = recording.c_in
        self.per_sample_time = recording.per_sample_time
        self.dynamic = [int(flags) & 3 == Phi.DYNAMIC_THRESHOLD for flags in self.table.column("flags")[:, 0]]
        self.learned = bool((self.table.column("l") != 0).any())
        self.doubled = recording.probe.channels > 1  # the model's output has the channels of a variance, read or not
        self.output_class = recording.output_class
        self.draws = [
            (count, recording.probe.draw_used(values, k))
            for k, (count, values) in enumerate(zip(recording.draws, recording.outputs, strict=True))
        ]
        self.noise_calls = recording.noise_calls
        self.fields = [
            {name: _affine(values, k) for name, values in fields.items()} for k, fields in enumerate(recording.fields)
        ]
        self.states, self.lazy = _states(self.traced)
        self.hidden = [lazy.keys() - before.keys() for before, lazy in zip([{}, *self.lazy], self.lazy, strict=False)]
        kept = [value for row in (*self.lazy, *self.fields) for value in row.values()]
        self.memory = 1 + max((lag for value in kept for lag in _lags(value)), default=0)
        self.remembers = any(self.lazy) or any(self.fields) or any(self.chained)
        self._tables: dict[tuple, Tensor] = {}
        self._steps: dict[tuple, tuple[Tensor, ...]] = {}
        self._rules: dict[tuple[torch.dtype, torch.dtype], Rule] = {}
        self._drop_vectors()

    def rule(self, state: torch.dtype, model: torch.dtype) -> Rule:
        """Found by steps of a copy of the scheduler on a tensor of one pixel."""
        if (state, model) not in self._rules:
            self._rules[state, model] = _find_rule(self, state, model)
        return self._rules[state, model]

    def table_on(self, device: torch.device, dtype: torch.dtype, guidance: tuple[float, float] | None) -> Tensor:
        """(R, 1, 16) of float32, or of float64 for float64 samples."""
        key = device, dtype, guidance
        if key not in self._tables:
            if len(self._tables) >= _KEPT_TENSORS:
                self._tables.clear()
            source = self.table if guidance is None else self.table.with_guidance(*guidance)
            rows = source.rows.copy() if dtype == torch.float64 else source.astype_float32()
            self._tables[key] = torch.from_numpy(rows).to(device, non_blocking=True)
        return self._tables[key]

    def steps_on(self, device: torch.device, batch: int) -> tuple[Tensor, ...]:
        """For each row k, int32 (B,) filled with k."""
        key = device, batch
        if key not in self._steps:
            if len(self._steps) >= _KEPT_TENSORS:
                self._steps.clear()
            steps = torch.arange(self.num_rows, dtype=torch.int32, device=device)
            self._steps[key] = steps[:, None].expand(self.num_rows, batch).contiguous().unbind(0)
        return self._steps[key]

    def fresh_scheduler(self) -> Any:
        """A copy of the scheduler as it is before its first step, on the CPU."""
        return copy.deepcopy(self._scheduler)

    def _drop_vectors(self):
        recording = self.traced.recording
        recording.outputs, recording.states, recording.fields, recording.initial = [], [], [], {}


def _affine(values: np.ndarray, row: int) -> Affine:
    r = Reading(values)
    terms = []
    for j in range(row + 1):
        z = float(r.draws[j].sum())
        if not (r.x[j] or r.m[j] or r.clamped[j] or z):
            continue
        terms.append(Term(row - j, *map(float, (r.direct_x[j], r.direct_m[j], r.clamped[j], r.p[j], r.q[j])), z))
    return Affine(tuple(terms))


def _states(traced: TracedScheduler) -> tuple[list[dict], list[dict]]:
    """The attributes after each row, split into values and `Affine`s (or lists of both)."""
    recording, states, lazy = traced.recording, [], []
    for k, state in enumerate(recording.states):
        reduce = _reducer(traced, k)
        encoded = {name: _replace(value, reduce) for name, value in state.items()}
        lazy.append({name: value for name, value in encoded.items() if _lags(value)})
        states.append({name: value for name, value in encoded.items() if name not in lazy[-1]})
    return _only_changes(states, recording.initial), lazy


def _reducer(traced: TracedScheduler, k: int):
    """Combinations after row k as `Affine`s of recent rows; x_k = x'_{k-1} makes those of a corrector short."""
    outputs, probe = traced.recording.outputs, traced.recording.probe

    def reduce(values):
        affine = _affine(values, k)
        if k and traced.chained[k] and affine.terms and affine.terms[0].lag == k:
            now, before = Reading(values), Reading(outputs[k - 1])
            j = next(j for j in range(k) if before.x[j] or before.m[j])
            weight = now.x[j] / before.x[j] if before.x[j] else now.m[j] / before.m[j]
            affine = _affine(values + weight * (probe.read(probe.state(k)) - outputs[k - 1]), k)
        return affine

    return reduce


def _replace(value: Any, reduce) -> Any:
    if isinstance(value, Combination):
        return reduce(value.values)
    if isinstance(value, list | tuple) and not isinstance(value, Affine):
        return type(value)(_replace(item, reduce) for item in value)
    return value


def _lags(value: Any) -> list[int]:
    """How many rows back each term of an attribute reaches; empty where it holds no `Affine`."""
    if isinstance(value, Affine):
        return [term.lag for term in value.terms] or [0]
    if isinstance(value, list | tuple):
        return [lag for item in value for lag in _lags(item)]
    return []


def _only_changes(states: list[dict], initial: dict) -> list[dict]:
    """Row by row, what differs from the row before; in the first row whatever the run changes at all."""
    varies = lambda name: not all(_same(initial.get(name, initial), state.get(name, states)) for state in states)  # noqa: E731
    changes = [{name: value for name, value in state.items() if varies(name)} for state in states[:1]]
    for before, after in zip(states, states[1:], strict=False):
        changes.append({name: value for name, value in after.items() if not _same(value, before.get(name, changes))})
    return changes


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # a list that holds tensors
        return False


class _DrawnDtypes(TorchFunctionMode):
    """Notes the dtypes of noise that is asked for, and draws none: no generator moves."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        value = (torch.zeros if func is torch.randn else torch.zeros_like)(*args, **kwargs)
        self.dtypes.append(value.dtype)
        return value


def _find_rule(plan: Plan, state: torch.dtype, model: torch.dtype) -> Rule:
    """Step as far as the first row that draws."""
    scheduler, channels = plan.fresh_scheduler(), 3 if plan.doubled else 1
    x, m = torch.zeros(1, channels, 1, 1, dtype=state), torch.zeros(1, channels * (1 + plan.doubled), 1, 1, dtype=model)
    drawing = [k for k, (count, _) in enumerate(plan.draws) if count]
    if plan.begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(plan.begin)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: torch.zeros_like(x)
    with torch.no_grad(), _DrawnDtypes() as drawn:
        for t in scheduler.timesteps[plan.begin :][: 1 + min(drawing, default=0)]:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            out = scheduler.step(m, t.reshape(1) if plan.per_sample_time else t, x, **plan._options)[0]
    return Rule(out.dtype, tuple(drawn.dtypes))
