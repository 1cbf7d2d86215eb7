"""A stand-in for a CUDA graph that works on a CPU: the operators of a function, recorded once and replayed.

It behaves as a CUDA graph does where that matters. Recording leaves no trace: what the operators wrote is put back, and
their temporaries are spoiled. A replay runs the same operators on the same memory, whatever Python has bound to its
names meanwhile: a buffer that a run should have filled, but replaced, makes the results wrong. Memory from outside is
not kept alive: a replay after it was freed is an error, and so is reading a value to the host while recording.
`using()` puts it in the place of CUDA graphs for tensors on the CPU.
"""

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from genengine import _capture

HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::_unique2", "aten::unique_dim")


class ReplayedGraph:
    """`_capture.Graph` of the operators that a function calls."""

    made = []  # all graphs, for tests to look at
    fail_next = []  # exceptions that the next recordings raise
    _thread = threading.local()

    @classmethod
    def recording(cls):
        return getattr(cls._thread, "recording", False)

    def __init__(self, run, warm_up, restore):
        warm_up()
        restore()
        if self.fail_next:
            raise self.fail_next.pop(0)
        recorder = _Recorder()
        self._thread.recording = True
        try:
            with recorder:
                run()
        finally:
            self._thread.recording = False
            recorder.undo()
        self.calls, self.nbytes, self.replays = recorder.calls, recorder.nbytes, 0
        self.made.append(self)

    def replay(self):
        assert self.calls is not None, "replayed after its release"
        self.replays += 1
        known = {}

        def found(leaf):
            return leaf.tensor() if isinstance(leaf, _Outside) else known[leaf] if isinstance(leaf, _Made) else leaf

        for func, args, kwargs, results in self.calls:
            new = tree_leaves(func(*tree_map(found, args), **tree_map(found, kwargs)))
            for (made, memory), value in zip(results, new, strict=True):
                if memory is not None:
                    with torch.inference_mode(memory.is_inference()):
                        memory.copy_(value)
                known[made] = value if memory is None else memory

    def release(self):
        self.calls = None


@dataclass(frozen=True)
class _Made:
    """A tensor that an operator of the recording returned."""

    number: int


class _Outside:
    """A tensor that was there before the recording: where it lies, but no reference to it."""

    def __init__(self, tensor):
        self.storage, self.dtype = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
        self.place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "memory that was captured has been freed"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.nbytes = [], 0
        self._made, self._own, self._before = {}, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() in HOST_READS:
            raise RuntimeError(f"{func.name()} is not permitted when a stream is capturing")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._save(tensor)
        call = func, *tree_map(self._reference, (args, kwargs))
        results = func(*args, **kwargs)
        shared = {_address(tensor) for tensor in inputs}
        self.calls.append((*call, [self._result(leaf, shared) for leaf in tree_leaves(results)]))
        return results

    def _reference(self, leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return self._made[id(leaf)][0] if id(leaf) in self._made else _Outside(leaf)

    def _result(self, leaf, shared):
        """(its name, the memory that is its own); none of a view, which its replay makes anew."""
        made = _Made(len(self._made))
        if not isinstance(leaf, Tensor):
            return made, None
        if id(leaf) in self._made:  # written in place
            return self._made[id(leaf)][0], None
        fresh = _address(leaf) not in shared or leaf.numel() == 0
        self._made[id(leaf)] = made, leaf  # held, so that no other gets its id
        if fresh:
            self._own[_address(leaf)] = leaf
        return made, leaf if fresh else None

    def _save(self, tensor):
        """Of memory that was there before the recording, a copy."""
        address = _address(tensor)
        if address and address not in self._own and address not in self._before:
            storage = tensor.untyped_storage()
            self._before[address] = (storage, storage.clone())

    def undo(self):
        for storage, before in self._before.values():
            storage.copy_(before)
        for tensor in self._own.values():
            self.nbytes += tensor.untyped_storage().nbytes()
            if tensor.is_floating_point():
                with torch.inference_mode(tensor.is_inference()):
                    tensor.fill_(float("nan"))
        self._made, self._before = {}, {}


def _address(tensor):
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def using():
    """Inside, runs on a CPU are captured by `ReplayedGraph`; gives the list of the graphs made."""
    before = dict(_capture.GRAPHS)
    ReplayedGraph.made.clear()
    ReplayedGraph.fail_next.clear()
    _capture.GRAPHS["cpu"] = ReplayedGraph
    try:
        yield ReplayedGraph.made
    finally:
        _capture.GRAPHS.clear()
        _capture.GRAPHS.update(before)
