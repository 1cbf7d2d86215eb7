"""transformer_sample in CUDA graphs: what is recorded, what is not read back, and calls that the caller records."""

import pytest
import torch
from support import filled

from genengine.nets.transformer import Transformer
from genengine.ops import _transformer_graph, transformer_sample

pytestmark = pytest.mark.gpu
SMALL = {"length": 23, "num_levels": 11, "num_classes": 3, "dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}


@pytest.fixture
def net():
    _transformer_graph._loops.clear()
    yield filled(Transformer.from_config(SMALL), scale=0.3).cuda()
    _transformer_graph._loops.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_read_nothing_back(net, dtype):
    weights, labels = net.packed(dtype), torch.arange(5, device="cuda") % 4
    first = transformer_sample(weights, 5, labels=labels, seed=3, backend="cuda")  # records
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = transformer_sample(weights, 5, labels=labels, seed=3, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.log_prob, second.log_prob)
    assert len(_transformer_graph._loops) == 1


def test_the_tokens_are_the_reference_s(net):
    weights = net.packed()
    ours, plain = (transformer_sample(weights, 64, seed=5, backend=name) for name in ("cuda", "reference"))
    assert (ours.tokens != plain.tokens).any(1).sum() <= 1  # a uniform on an edge


def test_every_stream_has_recordings_of_its_own(net):
    weights = net.packed()
    expected = transformer_sample(weights, 5, seed=3, backend="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = transformer_sample(weights, 5, seed=3, backend="cuda")
    side.synchronize()
    assert torch.equal(found.tokens, expected.tokens) and len(_transformer_graph._loops) == 2


def test_a_caller_may_record_the_call(net):
    weights, labels = net.packed(), torch.zeros(3, dtype=torch.int64, device="cuda")
    seed = torch.tensor(1, device="cuda")
    expected = [transformer_sample(weights, 3, labels=labels, seed=s, backend="cuda").tokens for s in (1, 2)]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        transformer_sample(weights, 3, labels=labels, seed=seed, backend="reference")
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = transformer_sample(weights, 3, labels=labels, seed=seed, backend="cuda")
    for value, tokens in zip((1, 2), expected, strict=True):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(found.tokens, tokens)


def test_a_callback_sees_tokens_that_are_there(net):
    seen = []
    transformer_sample(net.packed(), 2, seed=1, backend="cuda", callback=lambda *now: seen.append(now))
    assert seen[-1] == (23, 23) and len(seen) == 12
