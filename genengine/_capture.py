"""CUDA graphs: work that was recorded once is replayed without Python. What a graph reads and writes stays in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch


class Graph(Protocol):
    """Work recorded on construction, Graph(run, warm_up, restore): warm_up() runs first, for kernels to be chosen and
    compiled, then restore(), which undoes it; run() is recorded, not run. Raises RuntimeError where it cannot be."""

    nbytes: int  # of memory that the recording keeps for itself

    @staticmethod
    def recording() -> bool:
        """Whether a graph is being recorded on the current stream."""

    def replay(self) -> None:
        """Do the recorded work, in order with the current stream."""

    def release(self) -> None:
        """Give its memory back; it cannot be replayed any more."""


class CudaGraph:
    """A `Graph` of CUDA kernels, recorded on a side stream of the current device.

    Its temporaries lie in a memory pool of its own. Graphs that never run at the same time, and keep nothing there
    between two replays, could share one; then none could be released alone, nor its memory be told from the others'.
    nbytes is what the allocator has reserved for the pool.
    """

    recording = staticmethod(torch.cuda.is_current_stream_capturing)

    def __init__(self, run: Callable[[], None], warm_up: Callable[[], None], restore: Callable[[], None]):
        self._graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                warm_up()
            current.wait_stream(side)
            restore()  # on this stream, so that what it allocates belongs to the stream that will use it
            with capturing(self._graph, side):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"sample: this denoiser cannot be captured in a CUDA graph ({error}); it must not read values back to "
                "the host: pass capture='never' if it does"
            ) from error
        self.nbytes = _pool_bytes(self._graph.pool())

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        self._graph.reset()


# By the type of the device; where there is none, nothing is captured.
GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}


def _pool_bytes(pool: tuple[int, int]) -> int:
    """Bytes that the allocator has reserved for a graph's memory pool, of blocks in use and free."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


@contextlib.contextmanager
def capturing(graph, stream):
    """`torch.cuda.graph` on that stream, which leaves the process usable where the capture fails.

    When ending a capture raises, torch leaves the capture's stream current and, in some versions, the default generator
    waiting for a capture: random numbers and later captures would fail far from the cause. Errors concern this thread
    alone, so that other threads may allocate meanwhile.
    """
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()
        graph.reset()
        _release(torch.cuda.default_generators[torch.cuda.current_device()])
        raise


def _release(generator):
    """Take the generator out of a failed capture, where resetting the graph has not; the same numbers follow.

    Only there, since it gets a new state for it: graphs captured earlier keep drawing from the old one.
    """
    state = generator.get_state()
    try:
        _draw(generator)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
    else:
        generator.set_state(state)


def _draw(generator):
    torch.empty(1, device=generator.device).uniform_(generator=generator)
