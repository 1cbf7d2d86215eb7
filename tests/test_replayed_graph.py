"""The stand-in for CUDA graphs does what they do, and shows the mistakes that they would hide."""

import pytest
import torch
from replayed_graph import ReplayedGraph


def record(run):
    return ReplayedGraph(run, lambda: None, lambda: None)


def test_recording_leaves_no_trace_and_a_replay_works_on_the_same_memory():
    x, y = torch.arange(4.0), torch.zeros(2, 2)

    def run():
        x.add_(1)
        y[0] = (2 * x).view(2, 2)[0] @ x[:2]

    graph = record(run)
    assert torch.equal(x, torch.arange(4.0)) and not y.any() and graph.nbytes > 0
    expected_x, expected_y = x.clone(), y.clone()
    for start in (torch.arange(4.0), torch.tensor([3.0, -1.0, 0.5, 2.0])):
        x.copy_(start)
        graph.replay()
        expected_x = start + 1
        expected_y[0] = 2 * expected_x[:2] @ expected_x[:2]
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_a_buffer_bound_anew_is_not_seen_and_freed_memory_is_an_error():
    held = {"x": torch.ones(3)}
    out = torch.zeros(3)
    graph = record(lambda: out.copy_(held["x"] * 2))
    kept = held["x"]
    held["x"] = torch.full((3,), 5.0)
    graph.replay()
    assert torch.equal(out, torch.full((3,), 2.0))
    del kept
    with pytest.raises(AssertionError, match="has been freed"):
        graph.replay()


def test_reading_to_the_host_and_a_replay_after_release_are_errors():
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="not permitted when a stream is capturing"):
        record(lambda: x.mul_(float(x[0])))
    assert torch.equal(x, torch.ones(2)) and not ReplayedGraph.recording()
    graph = record(lambda: x.add_(1))
    graph.release()
    with pytest.raises(AssertionError, match="after its release"):
        graph.replay()
