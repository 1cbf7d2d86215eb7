"""One untimed pass that records every op: its cost, where its data comes from and goes to, and the line that called it.

A `TorchDispatchMode` sees what reaches the dispatcher: ATen's kernels and ours, forward and backward. Views move
nothing and are no steps; they show in the operands, which say which part of which storage is read.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from genengine.ops._cost import Cost
from genengine.profiling import costs

# Modules whose frames say nothing about who asked for the work; of ours, those that no model is written in.
_MACHINERY = ("torch", "contextlib", "functools", "threading")
_BELOW_MODELS = (
    "genengine.ops",
    "genengine.profiling",
    "genengine.benchmarks.eager",
    "genengine.benchmarks.bench_adaln",
)
_KEYS = {"meta": "Meta"}  # of the dispatcher, where they are not the device's name in capitals
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_ALLOCATES = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh")
)


@dataclass(frozen=True)
class Operand:
    """What an op read or wrote: `version` counts the writes to the storage before it was read, or including this one.

    parameter: its storage is that of an `nn.Parameter`. outside: the storage was there before the recording.
    """

    storage: int
    version: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: str
    parameter: bool = False
    outside: bool = False

    @property
    def value(self) -> tuple:
        """Equal for two reads of the same numbers."""
        return self.storage, self.version, self.offset, self.shape, self.stride

    @property
    def region(self) -> tuple:
        """Equal for two reads of the same memory, in whatever order: of x and its transpose."""
        return self.storage, self.version, self.offset, self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the elements that exist: a broadcast row is one row."""
        count = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            count *= size if stride or size == 0 else 1
        return count * self.dtype.itemsize


@dataclass
class Step:
    """One op that ran: name as the profiler has it ("aten::mul"); args as the schema orders them, tensors as `Operand`,
    without `out=`.

    reads, writes: the tensors among them and the results. line: "file:line" of the user, or "" where no Python asked.
    stack: the calls that led here, "Attention.forward (layers.py)", outermost first. backward: autograd ran it.
    optimizer: one of torch's did. sync: how a user calls what makes the host wait, or None.
    """

    index: int
    name: str
    overload: str
    args: tuple
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    cost: Cost
    line: str
    backward: bool
    optimizer: bool
    stack: tuple[str, ...] = ()
    sync: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the widest work: of the largest tensor."""
        tensors = self.writes + self.reads
        floating = [operand for operand in tensors if operand.dtype.is_floating_point] or list(tensors)
        return max(floating, key=lambda operand: operand.nbytes).dtype if floating else torch.float32

    @property
    def first_shape(self) -> tuple[int, ...]:
        """That of the first argument that is a tensor with dimensions, not a list of them; () if none is."""
        return next((entry.shape for entry in self.args if isinstance(entry, Operand) and entry.shape), ())

    @property
    def shapes(self) -> str:
        """The shapes of the (first three) tensors read, "16x256x1152, 16x1152"."""
        shown = ["x".join(map(str, operand.shape)) or "()" for operand in (self.reads or self.writes)[:3]]
        return ", ".join(shown)


@dataclass
class Recording:
    """All steps of one call of a function, and the storages of tensors that outlive it: returned, or kept somewhere."""

    steps: list[Step] = field(default_factory=list)
    returned: frozenset[int] = frozenset()


def record(function: Callable[[], object]) -> Recording:
    """Call `function` once and return what it did. Its result is dropped.

    What torch.compile compiled runs eagerly this once: it does not go through the dispatcher.
    """
    recorder = _Recorder()
    with torch.compiler.set_stance("force_eager"), recorder:
        result = function()
    returned = {recorder.storage(tensor) for tensor in costs.tensors(result)}
    return Recording(recorder.steps, frozenset(returned | recorder.held(returned)))


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps: list[Step] = []
        self._numbers: dict[StorageWeakRef, int] = {}  # weak references keep a storage's address from a second life
        self._versions: dict[int, int] = {}
        self._made: set[int] = set()
        self._parameters: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_composite(func, args):  # as they arrive under inference_mode; not torch's Python decompositions
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        if func.namespace in ("profiler", "prim"):
            return func(*args, **kwargs)
        if any(tensor.is_nested for tensor in costs.tensors((args, kwargs))):
            raise ValueError(
                f"profile: {func._schema.name} takes a nested tensor, whose shape is unknown here; profile a padded one"
            )
        arguments = costs.complete(func._schema, args, kwargs)
        reads = [self._operand(tensor) for tensor in costs.read(func._schema, arguments)]
        shown = tuple(
            self._describe(value)
            for argument, value in zip(func._schema.arguments, arguments, strict=True)
            if not argument.is_out
        )
        known = set(map(self.storage, costs.tensors(arguments)))
        result = func(*args, **kwargs)
        writes = self._written(func._schema, arguments, result, known)
        if writes and func._schema.name not in _ALLOCATES or func._schema.name in costs.SYNCS:
            cost = costs.cost(func, arguments, result, reads, writes)
            self._append(func, shown, reads, writes, cost, costs.sync(func, arguments, result))
        return result

    def _append(self, func, args, reads, writes, cost, sync):
        backward = torch._C._current_graph_task_id() != -1
        line, optimizer, stack = _caller()
        if optimizer:  # which keeps its counters on the host
            sync = None
        name, overload = func._schema.name, func._schema.overload_name
        step = Step(
            len(self.steps), name, overload, args, tuple(reads), tuple(writes), cost, line, backward, optimizer, stack,
            sync,
        )  # fmt: skip
        self.steps.append(step)

    def held(self, returned: set[int]) -> set[int]:
        """The further storages made here that a Python object still holds: an attribute, a list, a closure.

        What autograd alone keeps for its backward is in no Python object.
        """
        made = self._made - returned
        alive = {ref: number for ref, number in self._numbers.items() if number in made and not ref.expired()}
        if not alive:
            return set()
        gc.collect()
        tensors = [entry for entry in gc.get_objects() if issubclass(type(entry), Tensor)]
        numbers = {id(tensor): alive.get(_reference(tensor)) for tensor in tensors}
        ours = [tensor for tensor in tensors if numbers[id(tensor)] is not None]
        holders = [holder for holder in gc.get_referrers(*ours) if holder is not tensors] if ours else []
        return {numbers[id(entry)] for holder in holders if holder is not ours for entry in gc.get_referents(holder)
                if numbers.get(id(entry)) is not None}  # fmt: skip

    def storage(self, tensor: Tensor) -> int:
        """A number of the tensor's storage, one for its whole life."""
        reference = _reference(tensor)
        if reference is None:
            return -id(tensor)
        number = self._numbers.setdefault(reference, len(self._numbers))
        if isinstance(tensor, torch.nn.Parameter):
            self._parameters.add(number)
        return number

    def _operand(self, tensor):
        number = self.storage(tensor)
        strided = tensor.layout == torch.strided
        stride = tensor.stride() if strided else (1,) * tensor.dim()
        offset = tensor.storage_offset() if strided else 0
        return Operand(
            number, self._versions.get(number, 0), tuple(tensor.shape), stride, offset, tensor.dtype,
            tensor.device.type, parameter=number in self._parameters, outside=number not in self._made,
        )  # fmt: skip

    def _describe(self, argument):
        if isinstance(argument, Tensor):
            return self._operand(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self._describe(entry) for entry in argument)
        return argument

    def _written(self, schema, arguments, result, known):
        """The operands that the op wrote: arguments marked so, and results in memory of their own."""
        found = []
        for argument, value in zip(schema.arguments, arguments, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in costs.tensors(value):
                    number = self.storage(tensor)
                    self._versions[number] = self._versions.get(number, 0) + 1
                    found.append(self._operand(tensor))
        mutated = {operand.storage for operand in found}
        for tensor in costs.tensors(result):
            number = self.storage(tensor)
            if number not in known and number not in mutated:
                self._made.add(number)
                found.append(self._operand(tensor))
        return found


def _reference(tensor) -> StorageWeakRef | None:
    """None for sparse tensors, which have no storage."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def _is_composite(func, args) -> bool:
    """Whether the op is made of others on the device of its first tensor, and has no kernel of its own there."""
    if not func.has_kernel_for_dispatch_key(_COMPOSITE):
        return False
    device = next((tensor.device.type for tensor in costs.tensors(args)), "cpu")
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _KEYS.get(device, device.upper()))


def _caller() -> tuple[str, bool, tuple[str, ...]]:
    """("file:line" of the user's innermost frame, whether an optimiser of torch's stands below it, the stack of calls).

    The user's are the frames outside torch and genengine, up to `record`. Where there is none, the work was asked for
    from the command line: then the innermost of ours that is not an op's.
    """
    frame, users, ours, optimizer, stack = sys._getframe(2), "", "", False, []
    while frame is not None and frame.f_code is not record.__code__:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package not in _MACHINERY and module != __name__:
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            below = module.startswith(_BELOW_MODELS)
            if package == "genengine":
                ours = ours or ("" if below else place)
            else:
                users = users or place
            if not below:
                stack.append(_named(frame.f_code))
        optimizer = optimizer or (module.startswith("torch.optim") and not users)
        frame = frame.f_back
    return users or ours, optimizer, tuple(reversed(stack))


@functools.cache
def _named(code) -> str:
    name = getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")
    return f"{name} ({os.path.basename(code.co_filename)})"
