"""Clocks: what one sample of a variant is, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

GRAPH_CALLS = 20  # in one graph, whose own launch takes some microseconds


def sampler(functions: list[Callable], device: str):
    """sample(count) -> (seconds per call by the protocol's clock, wall seconds per call), warmed up.

    `sample.clock` names the clock; a count makes `sample.calls` calls, the functions in rotation.
    """
    return _CudaSampler(functions) if device == "cuda" else _CpuSampler(functions)


class _CpuSampler:
    """Process time: other people's work on the machine does not count, what it does to the caches does."""

    clock = "process time"

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


class _CudaSampler:
    """Events around replays of one graph of many calls, or around plain calls where they cannot be captured."""

    def __init__(self, functions):
        self.functions = functions * -(-GRAPH_CALLS // len(functions))
        self.calls = len(self.functions)
        for _ in range(3):
            self._launch(functions)
        torch.cuda.synchronize()
        self.graph = self._capture()
        self.clock = "events around plain calls" if self.graph is None else "events around a graph"

    @staticmethod
    def _launch(functions):
        for function in functions:
            function()

    def _capture(self):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch(self.functions)
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch(self.functions)
        except RuntimeError:  # it waits for the device, say
            torch.cuda.synchronize()
            return None
        return graph

    def __call__(self, count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        wall = time.perf_counter()
        begin.record()
        for _ in range(count):
            if self.graph is None:
                self._launch(self.functions)
            else:
                self.graph.replay()
        end.record()
        end.synchronize()
        wall = time.perf_counter() - wall
        return begin.elapsed_time(end) * 1e-3 / (count * self.calls), wall / (count * self.calls)
