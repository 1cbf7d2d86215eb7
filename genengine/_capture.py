"""CUDA graphs of the sampling loop. One captured row serves every row: step, time and table live on the device."""

from __future__ import annotations

import contextlib

import torch


def one_step(run):
    """A function of the row index that replays one captured row; the last row writes an x_in that nobody reads."""
    graph = _capture(run, rows=(0,))
    return lambda row: graph.replay()


def replay_loop(run):
    """Capture all rows into one graph, and run it once."""
    _capture(run, rows=range(run.num_rows)).replay()


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


def _capture(run, rows):
    """A graph of the rows, with the run's state left as it was before.

    Everything happens on a stream of this run's own device. The warm-up compiles what would otherwise compile inside
    the capture: the first row and the last, whose kernel writes no x_in.
    """
    initial, graph = run.x.clone(), torch.cuda.CUDAGraph()
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            for row in sorted({rows[0], rows[-1]}):
                run.row(row)
            run.x.copy_(initial)
            run.rewind()
        side.synchronize()
        with capturing(graph, side):
            for row in rows:
                run.row(row)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"sample: this denoiser cannot be captured in a CUDA graph ({error}); it must not read values back to the "
            "host: pass capture='never' if it does"
        ) from error
    current.wait_stream(side)
    return graph
