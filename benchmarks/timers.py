"""Clocks: what one sample of a variant is, on a CPU and on a GPU.

The variants of one row share one clock: a replayed graph has no launches from the host, so that a ratio of it to plain
calls would say more about the host than about the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping

import torch

from genengine import _capture

GRAPH_CALLS = 20  # in one graph, whose own launch takes some microseconds
GRAPH_SECONDS = 2e-3  # that a graph takes at most, unless one pass over the functions takes longer


def samplers(
    variants: Mapping[str, list[Callable]], device: str, *, graphs: bool = True
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Clocks of all variants of one row, warmed up, and why some have none.

    variants: name -> functions that do the same work on different inputs, taken in rotation. device: "cpu" or "cuda".
    Returns ({name: sample}, {name: "Type: message"}), a name in one of the two: a variant that raises is in the second,
    and costs the others nothing. sample(count) -> (seconds per call by the protocol's clock, wall seconds per call)
    makes count * sample.calls calls. `sample.clock` names the clock, the same for all; on a GPU it is of graphs, or, if
    any variant cannot be captured, of plain calls for all, with what prevented it in `sample.reason` (else None);
    without `graphs` of plain calls at once.
    """
    if torch.device(device).type != "cuda":
        return _each(variants, _CpuSampler)
    with stream_of(device):
        passes, failures = _each(variants, _warm_up)
        variants = {name: variants[name] for name in passes}
        captured, reason = {}, "its variants replay graphs of their own"
        if graphs:
            captured, reason = _capture_all({name: functions * passes[name] for name, functions in variants.items()})
        found = {
            name: _CudaSampler(functions, passes[name], captured.get(name), reason)
            for name, functions in variants.items()
        }
        return found, failures


def sampler(functions: list[Callable], device: str):
    """The clock of one piece of work, as `samplers` makes it; what the functions raise is raised."""
    if torch.device(device).type != "cuda":
        return _CpuSampler(functions)
    with stream_of(device):
        passes = _warm_up(functions)
        graphs, reason = _capture_all({"": functions * passes})
        return _CudaSampler(functions, passes, graphs.get(""), reason)


@contextlib.contextmanager
def stream_of(device: str):
    """The stream on which a row is built, checked, warmed up, captured and timed: nothing on a CPU.

    Autograd runs a backward pass on the streams of its forward, and a capture must hold all of them: so inputs whose
    gradients are timed are made within this. A GPU's default stream cannot be captured; inside another stream, that one
    stays.
    """
    if torch.device(device).type != "cuda" or torch.cuda.current_stream() != torch.cuda.default_stream():
        yield
        return
    outer, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    side.wait_stream(outer)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        outer.wait_stream(side)


@functools.cache
def _side_stream(index):
    """One for all rows: memory that one row has freed serves the next only on the same stream."""
    return torch.cuda.Stream(index)


def _each(variants, make):
    """make(functions) of every variant, and what it raised of the others."""
    found, failures = {}, {}
    for name, functions in variants.items():
        try:
            found[name] = make(functions)
        except Exception as error:
            failures[name] = _message(error)
    return found, failures


def _message(error):
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _CpuSampler:
    """Process time: other people's work on the machine does not count, what it does to the caches does."""

    clock, reason = "process time", None

    def __init__(self, functions):
        self.functions, self.calls = functions, len(functions)
        for function in functions:
            function()
            function()

    def __call__(self, count):
        functions = self.functions
        wall, start = time.perf_counter(), time.process_time()
        for _ in range(count):
            for function in functions:
                function()
        seconds = time.process_time() - start
        wall = time.perf_counter() - wall
        return seconds / (count * self.calls), wall / (count * self.calls)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


def _launch(functions):
    for function in functions:
        function()


def _elapsed(launch, count):
    """Seconds on the device from before to after `count` launches."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        launch()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _warm_up(functions):
    """Run all functions three times; how often a graph shall pass over them, from what the third time took."""
    for _ in range(2):
        _launch(functions)
    torch.cuda.synchronize()
    seconds = _elapsed(lambda: _launch(functions), 1)
    return max(1, min(-(-GRAPH_CALLS // len(functions)), int(GRAPH_SECONDS / max(seconds, 1e-9))))


def _capture_all(variants):
    """({name: graph}, None), or ({}, why not) if one of them cannot be captured."""
    graphs, stream = {}, torch.cuda.current_stream()
    for name, functions in variants.items():
        graphs[name] = torch.cuda.CUDAGraph()
        try:
            with _capture.capturing(graphs[name], stream):
                _launch(functions)
        except Exception as error:  # it waits for the device, say
            _side_stream.cache_clear()  # a capture may have been left open on it
            return {}, f"{name or 'it'} cannot be captured: {_message(error)}"
    return graphs, None


class _CudaSampler:
    """Events around replays of one graph of many calls, or around plain calls."""

    def __init__(self, functions, passes, graph, reason):
        functions = functions * passes
        self.calls, self.reason = len(functions), reason
        self.launch = graph.replay if graph is not None else lambda: _launch(functions)
        self.clock = "events around plain calls" if graph is None else "events around a graph"

    def __call__(self, count):
        wall = time.perf_counter()
        seconds = _elapsed(self.launch, count)
        wall = time.perf_counter() - wall
        return seconds / (count * self.calls), wall / (count * self.calls)
