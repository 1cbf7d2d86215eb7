"""Triton kernels write within their tensors: every output lies between bands of a value that must survive.

The interpreter protects no memory, and on a GPU an illegal access often stays within the allocation: a missing mask
would go unseen. Here all that a launcher allocates, and every tensor that a case lets it write, lies in a longer one.
"""

import pytest
import torch
from support import device_of, skip_unless_available
from torch.overrides import TorchFunctionMode

from genengine import testing
from genengine.ops import _registry

BAND = 128  # elements on either side: a multiple of every alignment that wide accesses ask for
MARK = {torch.float32: -12345.0, torch.float16: -12344.0, torch.bfloat16: -12352.0}
KERNELS = sorted(name for name, op in _registry.OPS.items() if "triton" in op.kernels)
pytestmark = pytest.mark.triton


class Guard(TorchFunctionMode):
    """Gives every floating tensor allocated inside the block a band on either side."""

    def __init__(self):
        super().__init__()
        self.rooms = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros"):
            return self.surround(result, zero="zeros" in name)
        return result

    def surround(self, tensor, *, zero=False, values=None):
        """A tensor of the same dtype and strides in a room of its own; zero or values: what it holds."""
        if tensor.dtype not in MARK:
            return tensor
        with torch._C.DisableTorchFunction():
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            room = tensor.new_full((span + 2 * BAND,), MARK[tensor.dtype])
            inside = room.as_strided(tensor.shape, tensor.stride(), BAND)
            if zero:
                inside.zero_()
            elif values is not None:
                inside.copy_(values)
            else:
                inside.fill_(float("nan"))  # what is read before it is written shows
        self.rooms.append((room, span))
        return inside

    def broken(self):
        """The first band that was written into, or None."""
        for room, span in self.rooms:
            mark = torch.tensor(MARK[room.dtype], dtype=room.dtype)
            for side, band in (("before", room[:BAND]), ("after", room[BAND + span :])):
                if not bool((band.cpu() == mark).all()):
                    return f"{side} a tensor of {span} elements"
        return None


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_written_outside(name):
    device = skip_unless_available(name, "triton")
    op = _registry.OPS[name]
    launcher = getattr(_registry.triton_module(op.module), name)
    for case in some_cases(name, device):
        guard = Guard()
        args = [guarded(guard, argument) if i in case.mutated else argument for i, argument in enumerate(case.args)]
        with guard:
            launcher(*args)
        assert guard.rooms, f"{case.label}: {name} allocated nothing that a band could stand around"
        assert guard.broken() is None, f"{case.label}: {name} wrote {guard.broken()}"


def some_cases(name, device):
    """All of them on a GPU; under the interpreter two of the slow ones."""
    found = testing.cases(name, device, seed=1, thin=_registry.triton_interpreted())
    if not _registry.triton_interpreted():
        return found
    large = [case for case in found if case.large]
    return [case for case in found if not case.large] + large[:: max(1, len(large) - 1)]


def guarded(guard, argument):
    if isinstance(argument, list):
        return [guarded(guard, entry) for entry in argument]
    return guard.surround(argument, values=argument) if isinstance(argument, torch.Tensor) else argument


def test_a_write_outside_is_found():
    guard = Guard()
    with guard:
        out = torch.empty(5, device=device_of("reference"))
    assert guard.broken() is None
    out.as_strided((6,), (1,))[5] = 0
    assert guard.broken() == "after a tensor of 5 elements"
