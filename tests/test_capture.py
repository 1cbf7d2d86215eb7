"""How a `CudaGraph` is recorded, on a pretended GPU: which stream does what, what is counted, what errors leave."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from genengine import _capture


@pytest.fixture
def log(monkeypatch):
    """What a graph asks of torch.cuda, in order."""
    log, current = [], ["default"]

    class Stream(str):
        def wait_stream(self, other):
            log.append(f"{self} waits for {other}")

    class Graph:
        def pool(self):
            return (0, 7)

        def replay(self):
            log.append(f"replay on {current[0]}")

        def reset(self):
            log.append("reset")

    @contextmanager
    def on(stream, what="use"):
        before, current[0] = current[0], stream
        log.append(f"{what} {stream}")
        try:
            yield
        finally:
            current[0] = before

    segments = [
        {"total_size": size, "segment_pool_id": pool} for size, pool in ((2, (0, 0)), (32, (0, 7)), (8, (0, 7)))
    ]
    pretended = SimpleNamespace(
        CUDAGraph=Graph, Stream=lambda: Stream("side"), stream=on, current_stream=lambda: Stream(current[0]),
        graph=lambda graph, stream, capture_error_mode: on(stream, f"capture ({capture_error_mode}) on"),
        memory_snapshot=lambda: segments, set_stream=lambda stream: log.append(f"back to {stream}"),
        synchronize=lambda: log.append("synchronize"), default_generators=[None], current_device=lambda: 0,
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", pretended)
    monkeypatch.setattr(_capture, "_release", lambda generator: None)
    return log


def says(log, text, error=None):
    def run():
        log.append(text)
        if error is not None:
            raise error

    return run


def test_warm_up_on_the_side_what_it_did_undone_on_the_caller_s_stream_and_then_the_capture(log):
    graph = _capture.CudaGraph(says(log, "run"), says(log, "warm up"), says(log, "restore"))
    assert log == [
        "side waits for default", "use side", "warm up", "default waits for side", "restore",
        "capture (thread_local) on side", "run",
    ]  # fmt: skip
    assert graph.nbytes == 40  # of its own pool
    graph.replay()
    graph.release()
    assert log[-2:] == ["replay on default", "reset"]


@pytest.mark.parametrize("fails", ["warm up", "run"])
def test_an_error_says_what_a_denoiser_may_not_do_and_lack_of_memory_stays_what_it_is(log, fails):
    step = lambda name, error: says(log, name, error if name == fails else None)  # noqa: E731
    for error, kind, message in (
        (RuntimeError("not permitted"), RuntimeError, r"captured in a CUDA graph \(not permitted\); it must not read"),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "^full$"),
    ):
        with pytest.raises(kind, match=message):
            _capture.CudaGraph(step("run", error), step("warm up", error), step("restore", error))
        assert fails == "warm up" or log[-3:] == ["back to default", "synchronize", "reset"]
