"""Clocks of the variants of a row: one clock for all, on a pretended GPU whose captures can fail as real ones do."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from genengine import _capture, _loop
from genengine.benchmarks import timers

PLAIN, GRAPH = "events around plain calls", "events around a graph"


class Gpu:
    """Streams, events, graphs and a clock. A graph holds the functions that were called while it was captured."""

    def __init__(self):
        self.now, self.default, self.capturing, self.captured_on = 0.0, "default", None, []
        self.stream, self.waits, self.launches = self.default, [], 0
        self.generator_is_capturing, self.resetting_helps, self.drawn, self.states = False, True, 0, 1

    def draw(self, generator):
        if self.generator_is_capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly")
        self.drawn += 1

    def reset(self):
        if self.resetting_helps:  # as newer versions do
            self.generator_is_capturing = False

    def take_new_state(self, state):
        self.generator_is_capturing, self.states, self.drawn = False, self.states + 1, state

    def work(self, seconds):
        def run():
            if self.capturing is not None:
                self.capturing.append(seconds)
            else:
                self.launches, self.now = self.launches + 1, self.now + seconds

        return run

    def waits_for_the_device(self):
        """What a capture does not allow."""
        if self.capturing is not None:
            self.capturing = ...
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def graph(self, graph, stream, capture_error_mode):
        gpu = self
        assert gpu.capturing is None and capture_error_mode == "thread_local" and stream != gpu.default

        class Capture:
            def __enter__(self):
                gpu.stream, gpu.capturing, gpu.generator_is_capturing = stream, [], True
                gpu.captured_on.append(stream)

            def __exit__(self, *_):
                captured, gpu.capturing = gpu.capturing, None
                if captured is ...:  # as torch does: neither the stream nor the generator is given back
                    gpu.stream = "left behind"
                    raise RuntimeError("operation failed due to a previous error during capture")
                graph.held, gpu.generator_is_capturing = captured, False

        return Capture()

    def replay(self, held):
        self.now += sum(held)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()

    class Graph:
        def replay(self):
            gpu.replay(self.held)

        def reset(self):
            gpu.reset()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def synchronize(self):
            assert gpu.capturing is None

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Stream(str):
        def wait_stream(self, other):
            gpu.waits.append((str(self), str(other)))

    gpu.default = gpu.stream = Stream("default")
    names = iter("abcdef")
    generator = SimpleNamespace(
        get_state=lambda: gpu.drawn, set_state=lambda state: setattr(gpu, "drawn", state),
        clone_state=lambda: gpu.drawn, graphsafe_set_state=gpu.take_new_state,
    )  # fmt: skip
    pretended = SimpleNamespace(
        Stream=lambda index: Stream(next(names)), Event=Event, CUDAGraph=Graph, graph=gpu.graph, stream=gpu.on,
        current_stream=lambda: gpu.stream, default_stream=lambda: gpu.default, current_device=lambda: 0,
        set_stream=lambda stream: setattr(gpu, "stream", stream), synchronize=lambda: None,
        default_generators=[generator],
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", pretended)
    monkeypatch.setattr(_capture, "_draw", gpu.draw)
    timers._side_stream.cache_clear()
    yield gpu
    timers._side_stream.cache_clear()


def test_graphs_of_all_variants_tell_seconds_per_call(gpu):
    found, failures = timers.samplers({"fused": [gpu.work(1e-5)] * 3, "eager": [gpu.work(3e-5)]}, "cuda")
    assert failures == {} and {sample.clock for sample in found.values()} == {GRAPH}
    assert found["fused"](5)[0] == pytest.approx(1e-5) and found["eager"](2)[0] == pytest.approx(3e-5)
    assert found["fused"].calls == 21 and found["eager"].calls == 20 and found["fused"].reason is None


@pytest.mark.parametrize("first", [True, False])
def test_one_variant_that_cannot_be_captured_puts_all_on_plain_calls(gpu, first):
    variants = {"eager": [gpu.waits_for_the_device, gpu.work(2e-5)], "fused": [gpu.work(1e-5)]}
    found, failures = timers.samplers(variants if first else dict(reversed(variants.items())), "cuda")
    assert failures == {} and {sample.clock for sample in found.values()} == {PLAIN}
    for sample in found.values():
        assert sample.reason.startswith("eager cannot be captured: RuntimeError: operation ")
        assert "\n" not in sample.reason
    assert found["fused"](4)[0] == pytest.approx(1e-5) and found["eager"](4)[0] == pytest.approx(1e-5)


def test_a_failed_capture_leaves_stream_generator_and_later_captures_usable(gpu):
    timers.samplers({"eager": [gpu.waits_for_the_device]}, "cuda")
    assert gpu.stream == gpu.default and not gpu.generator_is_capturing
    found, _ = timers.samplers({"fused": [gpu.work(1e-5)]}, "cuda")
    assert found["fused"].clock == GRAPH
    assert gpu.captured_on == ["a", "b"]  # not on the stream of the one that failed


@pytest.mark.parametrize("resetting_helps", [True, False])
def test_the_generator_goes_on_after_a_failed_capture_and_keeps_its_state_where_it_can(gpu, resetting_helps):
    gpu.drawn, gpu.resetting_helps = 5, resetting_helps
    with pytest.raises(RuntimeError, match="previous error"), _capture.capturing(torch.cuda.CUDAGraph(), "side"):
        gpu.waits_for_the_device()
    assert gpu.stream == gpu.default and not gpu.generator_is_capturing
    assert (gpu.drawn, gpu.states) == (5, 1 if resetting_helps else 2)


def test_a_variant_that_raises_is_reported_and_costs_the_others_nothing(gpu):
    def fail():
        raise ValueError("not here\nnor there")

    for device, clock in (("cuda", GRAPH), ("cpu", "process time")):
        found, failures = timers.samplers({"peer": [fail], "fused": [gpu.work(1e-5)], "mute": [_mute]}, device)
        assert failures == {"peer": "ValueError: not here", "mute": "KeyError: "}
        assert set(found) == {"fused"} and found["fused"].clock == clock and found["fused"].reason is None
        with pytest.raises(ValueError, match="not here"):
            timers.sampler([fail], device)


def _mute():
    raise KeyError


def test_slow_functions_are_captured_less_often(gpu):
    sizes = {1e-6: 20, 1.5e-4: 13, 9e-4: 2, 3e-2: 1}
    for seconds, calls in sizes.items():
        assert timers.sampler([gpu.work(seconds)], "cuda").calls == calls
    assert timers.sampler([gpu.work(3e-2)] * 4, "cuda").calls == 4  # one pass over the rotated inputs at least
    gpu.launches = 0
    timers.sampler([gpu.work(3e-2)], "cuda")
    assert gpu.launches == 3


def test_a_row_is_built_warmed_up_captured_and_timed_on_one_side_stream(gpu):
    seen = set()

    def look():
        seen.add(str(gpu.stream))

    with timers.stream_of("cuda"):
        built = gpu.stream
        timers.sampler([look], "cuda")(2)
        assert gpu.stream == built != gpu.default
    assert gpu.stream == gpu.default and seen == {str(built)} == set(gpu.captured_on)
    assert gpu.waits == [("a", "default"), ("default", "a")]
    with timers.stream_of("cuda"):
        assert gpu.stream == built  # memory that a row has freed is of use to the next


def test_the_stream_is_left_when_the_row_raises(gpu):
    with pytest.raises(ValueError, match="bad row"), timers.stream_of("cuda"):
        raise ValueError("bad row")
    assert gpu.stream == gpu.default and gpu.waits[-1] == ("default", "a")


def test_a_cpu_has_no_streams():
    with timers.stream_of("cpu"):
        found, failures = timers.samplers({"fused": [lambda: None] * 2}, "cpu")
    assert failures == {} and found["fused"].calls == 2 and found["fused"](3)[0] >= 0


@pytest.mark.parametrize(
    ("capturing", "noise", "mode"), [(False, None, "step"), (True, None, "never"), (False, torch.ones(1), "never")]
)
def test_sampling_inside_a_capture_captures_nothing(monkeypatch, capturing, noise, mode):
    monkeypatch.setattr(_capture.CudaGraph, "recording", lambda: capturing)
    request = SimpleNamespace(
        device=torch.device("cuda"), shape=(1, 2), check_finite=False, noise=noise, denoiser=lambda x, t: x
    )
    choose = lambda capture: _loop.choose_mode(request, capture, watched=False, auto="step")  # noqa: E731
    assert choose("auto") == mode and choose("never") == "never"
    if capturing:
        for asked in ("step", "loop"):
            with pytest.raises(ValueError, match="inside the capture of another CUDA graph; pass capture='auto'"):
                choose(asked)
