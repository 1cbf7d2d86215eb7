"""CUDA graphs of the sampling loop. One captured row serves every row: step, time and table live on the device."""

from __future__ import annotations

import torch

WARM_UP_ROWS = 2  # lets cuBLAS, cuDNN and the allocator settle before the capture


def one_step(run):
    """A function of the row index that replays one captured row; the last row writes an x_in that nobody reads."""
    graph = torch.cuda.CUDAGraph()
    _warm_up(run)
    with torch.cuda.graph(graph):
        run.row(0)
    run.x.copy_(run.initial)
    run.rewind()
    return lambda row: graph.replay()


def replay_loop(run):
    """Capture all rows into one graph, and run it once."""
    graph = torch.cuda.CUDAGraph()
    _warm_up(run)
    run.x.copy_(run.initial)
    run.rewind()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for row in range(run.num_rows):
            run.row(row)
    graph.replay()


def _warm_up(run):
    """A few rows on a side stream, as capture wants; the state is put back by the caller."""
    run.initial = run.x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(min(WARM_UP_ROWS, run.num_rows)):
            run.row(0)
    torch.cuda.current_stream().wait_stream(side)
