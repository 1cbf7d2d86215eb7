"""The timesteps of a fused scheduler on the host, and the plans of runs that start from one of them."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genengine._registers import NotAffine
from genengine.integrations.diffusers._plan import Plan

_CACHE_SIZE = 32
_CACHE_LOCK = threading.Lock()
_CACHE: OrderedDict[tuple, _Timesteps] = OrderedDict()
_DECIDING = ("num_inference_steps", "custom_timesteps")
_OWN = ("_schedule", "_run", "_given_up", "_warned", "_config_key", "noise_sampler")


class Unfit(Exception):
    """This step is not one of the rows of a plan; the message says why."""


class _Timesteps:
    """What depends on a scheduler's class, config and `decides` attributes alone: shared by all objects."""

    def __init__(self, scheduler: Any, cls: type):
        self.host = _plain_copy(scheduler, cls)
        self.times = self.host.timesteps.tolist()
        self.sequential = hasattr(scheduler, "_step_index")
        self.index_of: dict[float, int] = {}
        for index, t in enumerate(self.times):
            self.index_of.setdefault(t, index)
        self.first_index: dict[int, int] = {}
        self.plans: dict[tuple, Plan | str] = {}  # or why there is none


class Schedule:
    """The timesteps that one scheduler object has set: nothing is read from a device while it steps."""

    def __init__(self, timesteps: Tensor, shared: _Timesteps):
        self._shared = shared
        self.host, self.sequential, self.times = shared.host, shared.sequential, shared.times
        self._timesteps, self._address, self._size = timesteps, timesteps.data_ptr(), timesteps.element_size()

    def plan(self, begin: int, options: Mapping[str, Any]) -> Plan:
        """Traced at first use.

        Raises:
            NotAffine: where it cannot be.
        """
        key = (begin, *sorted(options.items())) if options else (begin,)
        plan = self._shared.plans.get(key)
        if plan is None:
            try:
                plan = Plan(self.host, begin, options)
            except NotAffine as error:
                plan = str(error)
            self._shared.plans[key] = plan
        if isinstance(plan, str):
            raise NotAffine(plan)
        return plan

    def index(self, timestep: Any) -> int:
        """Which of the timesteps this is; a view into the tensor of timesteps is told by its address, without a sync.

        Raises:
            Unfit: where it is none of them.
        """
        if isinstance(timestep, Tensor):
            offset = timestep.data_ptr() - self._address
            here = 0 <= offset < len(self.times) * self._size and timestep.dtype == self._timesteps.dtype
            if here and (timestep.dim() == 0 or not any(timestep.stride()) or timestep.numel() == 1):
                return offset // self._size
            first, *others = timestep.flatten().tolist()
            if any(other != first for other in others):
                raise Unfit("the samples of a batch are at different timesteps")
            timestep = first
        index = self._shared.index_of.get(timestep)
        if index is None:
            raise Unfit(f"timestep {timestep} is none of the {len(self.times)} that are set")
        return index

    def first_index(self, begin: int | None, timestep: Any) -> int:
        """The index that a scheduler's first step starts from: its begin index, or what it makes of the timestep."""
        if begin is not None:
            return begin
        if not hasattr(self.host, "index_for_timestep"):
            return self.index(timestep)
        try:
            index = self.index(timestep)
        except Unfit as reason:
            return self._index_by_value(timestep, reason)
        if index not in self._shared.first_index:  # of equal timesteps it takes the second
            self._shared.first_index[index] = int(self.host.index_for_timestep(self.host.timesteps[index]))
        return self._shared.first_index[index]

    def _index_by_value(self, timestep, reason) -> int:
        """What the scheduler makes of a timestep that is none of its own: some take it for the last."""
        try:
            return int(self.host.index_for_timestep(torch.as_tensor(timestep).cpu()))
        except IndexError:
            name = type(self.host).__name__
            raise IndexError(f"{name}.step: {reason}; pass one of scheduler.timesteps") from None


def schedule_of(scheduler: Any, cls: type) -> Schedule:
    """The schedule of a fused scheduler of class `cls` whose timesteps are set."""
    state = scheduler.__dict__
    config = state["_internal_dict"]
    if state.get("_config_key", (None,))[0] is not config:
        state["_config_key"] = config, repr(sorted(config.items()))
    deciding = tuple((name, _frozen(state[name])) for name in sorted(state) if decides(name, state[name]))
    key = cls, state["_config_key"][1], deciding
    with _CACHE_LOCK:
        shared = _CACHE.get(key)
        if shared is None:
            shared = _CACHE[key] = _Timesteps(scheduler, cls)
            if len(_CACHE) > _CACHE_SIZE:
                _CACHE.popitem(last=False)
        _CACHE.move_to_end(key)
    return Schedule(scheduler.timesteps, shared)


def decides(name: str, value: Any) -> bool:
    """Whether an attribute has a say in the coefficients: timesteps, noise levels, alphas_cumprod and their like."""
    return name in _DECIDING or isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.dim() <= 1)


def _frozen(value: Any) -> tuple:
    if isinstance(value, Tensor):
        return value.dtype, value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else (value,)


def _plain_copy(scheduler: Any, cls: type) -> Any:
    """The scheduler as an object of its original class on the CPU, before its first step."""
    plain = object.__new__(cls)
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):  # a sample left over from an earlier run has no say, and is not kept
            plain.__dict__[name] = value.detach().cpu().clone() if value.dim() <= 1 else None
        elif name not in _OWN:
            plain.__dict__[name] = copy.deepcopy(value)
    if hasattr(scheduler, "noise_sampler"):
        plain.noise_sampler = None
    for name in ("_begin_index", "_step_index"):  # scale_model_input may have set the index already
        if name in plain.__dict__:
            plain.__dict__[name] = None
    return plain
