"""A stand-in for a CUDA graph that works on a CPU: the operators of a function, recorded once and replayed.

It behaves as a CUDA graph does where that matters. Recording leaves no trace: what the operators wrote is put back, and
their temporaries are spoiled. A replay runs the same operators on the same memory, whatever Python has bound to its
names meanwhile: a buffer that a run should have filled, but replaced, makes the results wrong. Reading a value to the
host is an error. `using()` puts it in the place of CUDA graphs for tensors on the CPU.
"""

import contextlib
import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        self.calls, self.nbytes, self.replays = recorder.calls, recorder.temporary_bytes(), 0
        self.made.append(self)

    def replay(self):
        assert self.calls is not None, "replayed after its release"
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            new = tree_leaves(func(*args, **kwargs))
            for old, value in zip(results, new, strict=True):
                if old is not None:
                    with torch.inference_mode(old.is_inference()):
                        old.copy_(value)

    def release(self):
        self.calls = None


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self._own, self._before = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() in HOST_READS:
            raise RuntimeError(f"{func.name()} is not permitted when a stream is capturing")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._save(tensor)
        results = func(*args, **kwargs)
        known = {_address(tensor) for tensor in inputs}
        fresh = []
        for leaf in tree_leaves(results):  # None for a view of an input, which its memory makes right
            fresh.append(leaf if isinstance(leaf, Tensor) and _address(leaf) not in known else None)
            if fresh[-1] is not None:
                self._own[_address(leaf)] = leaf
        self.calls.append((func, args, kwargs, fresh))
        return results

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
            if tensor.is_floating_point():
                with torch.inference_mode(tensor.is_inference()):
                    tensor.fill_(float("nan"))

    def temporary_bytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self._own.values())


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
