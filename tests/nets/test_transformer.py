"""Transformer: what each token sees, a textbook forward pass, initial weights, packed weights, errors."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from support import filled
from torch import nn

from genengine import ops
from genengine.nets.transformer import CONFIGS, Transformer, TransformerConfig

SMALL = {"length": 7, "num_levels": 6, "num_classes": 3, "dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2}


def make(dtype=torch.float64, **overrides):
    return filled(Transformer.from_config(SMALL, **overrides), scale=0.3).to(dtype)


def some(b=3, n=7):
    return torch.randint(6, (b, n), generator=torch.Generator().manual_seed(1))


def test_a_token_sees_exactly_those_before_it():
    """By autograd: tokens have no gradient, the rows of their table have; each position gets a table of its own."""
    net, tokens, y = make(), some(1), torch.tensor([1])
    rows = net.levels.weight.detach()[tokens].requires_grad_()  # (1, N, D)

    class Rows(torch.nn.Module):
        def forward(self, index):
            return rows[:, : index.shape[1]]

    net.levels = Rows()
    logits = net(tokens, y)
    for i in range(7):
        weight = torch.randn(6, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((logits[0, i] * weight).sum(), rows, retain_graph=True, allow_unused=True)
        seen = (gradient[0] != 0).any(1)
        assert seen.tolist() == [j < i for j in range(7)]


def test_the_class_is_seen_by_every_token():
    net, tokens = make(), some(2)
    first, second = (net(tokens, torch.tensor([y, 1])) for y in (0, 3))
    assert (first[0] != second[0]).any(1).all() and torch.equal(first[1], second[1])
    assert torch.equal(net(tokens), net(tokens, torch.tensor([3, 3])))


def test_a_prefix_has_the_same_logits():
    net, tokens = make(), some()
    for n in (1, 4, 7):
        torch.testing.assert_close(net(tokens[:, :n]), net(tokens)[:, :n], rtol=1e-12, atol=1e-12)


def textbook(net, tokens, y):
    """In NumPy, one token and one head at a time."""
    p = {name: value.detach().numpy() for name, value in net.named_parameters()}
    dim, heads = net.config.dim, net.config.num_heads
    head = dim // heads

    def linear(name, x):
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def norm(x):
        return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    logits = []
    for sequence, label in zip(tokens.tolist(), y.tolist(), strict=True):
        start = p["start.embedding_table.weight"][label]
        before = [start] + [p["levels.weight"][token] for token in sequence[:-1]]
        xs = [row + place for row, place in zip(before, p["positions"], strict=False)]
        for i in range(net.config.depth):
            triples = [np.split(linear(f"blocks.{i}.attn.qkv", norm(x)), 3) for x in xs]
            for n, (q, _, _) in enumerate(triples):
                o = np.zeros(dim)
                for h in range(heads):
                    part = slice(h * head, (h + 1) * head)
                    weights = np.exp([q[part] @ k[part] / math.sqrt(head) for _, k, _ in triples[: n + 1]])
                    values = [v[part] for _, _, v in triples[: n + 1]]
                    o[part] = sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum()
                xs[n] = xs[n] + linear(f"blocks.{i}.attn.proj", o)
            xs = [x + linear(f"blocks.{i}.mlp.fc2", gelu(linear(f"blocks.{i}.mlp.fc1", norm(x)))) for x in xs]
        logits.append([linear("out", norm(x)) for x in xs])
    return torch.from_numpy(np.array(logits))


@pytest.mark.parametrize("overrides", [{}, {"num_heads": 1, "dim": 5}, {"depth": 1, "mlp_ratio": 1, "num_heads": 12}])
def test_forward_equals_the_textbook_network(overrides):
    net, tokens, y = make(**overrides), some(), torch.tensor([0, 3, 2])
    torch.testing.assert_close(net(tokens, y), textbook(net, tokens, y), rtol=1e-9, atol=1e-9)


def test_every_parameter_learns():
    net, tokens = make(torch.float32), some(16)
    loss = torch.nn.functional.cross_entropy(net(tokens, torch.arange(16) % 4).flatten(0, 1), tokens.flatten())
    loss.backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_an_untrained_network_is_uniform_and_a_function_of_the_seed():
    before = torch.get_rng_state()
    a, b, c = (Transformer.from_config("tiny", seed=seed) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[0].attn.qkv.weight, c.blocks[0].attn.qkv.weight)
    assert a(torch.zeros(2, 64, dtype=torch.int64)).abs().max() == 0
    assert 190_000 < sum(p.numel() for p in a.parameters()) < 230_000
    weight = a.blocks[1].mlp.fc1.weight
    assert abs(weight.std() / math.sqrt(2 / (256 + 64)) - 1) < 0.1


def test_packed_weights_follow_the_parameters():
    net = make(torch.float32)
    first = net.packed()
    assert net.packed() is first and first.matrices.dtype == torch.float32
    assert net.packed(torch.bfloat16).matrices.dtype == torch.bfloat16 and net.packed() is first
    with torch.no_grad():
        net.out.bias.add_(1)
    second = net.packed()
    assert second is not first and not torch.equal(second.vectors, first.vectors)
    net.load_state_dict(Transformer.from_config(SMALL, seed=5).state_dict())
    third = net.packed()
    assert not torch.equal(third.matrices, second.matrices)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.positions.mul_(2)
    assert not torch.equal(twin.packed().vectors, third.vectors) and net.packed() is third
    assert net.double().packed().matrices.dtype == torch.float64


def test_packed_weights_are_told_from_others_at_the_same_address():
    net = make(torch.float32)
    net.positions = nn.Parameter(torch.zeros(net.positions.shape))
    net.packed()
    address, others = net.positions.data_ptr(), []
    net.positions = None  # whose memory may be given to the next tensor
    while len(others) < 64 and not (others and others[-1].data_ptr() == address):
        others.append(torch.ones(net.config.length, net.config.dim))
    net.positions = nn.Parameter(others[-1])
    assert net.packed().vectors.eq(1).sum() >= net.positions.numel()


def test_copies_and_pickles_carry_no_packed_weights():
    net = make(torch.float32)
    sizes = []
    for _ in range(2):
        sizes.append(len(pickle.dumps(net)))
        first = net.packed()
    assert sizes[0] == sizes[1] and net.packed() is first
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin.packed().matrices, first.matrices) and twin.packed().matrices is not first.matrices


def test_weights_in_float16_are_packed_in_float32():
    net = make(torch.float16)
    assert net.packed().matrices.dtype == torch.float32 == net.packed().vectors.dtype


def test_weights_made_in_inference_mode_are_packed_too():
    with torch.inference_mode():
        net = make(torch.float32)
        before = net.packed()
        net.out.weight.mul_(2)  # nobody counts this change
        assert not torch.equal(net.packed().matrices, before.matrices)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_weights_follow_their_moving_average(backend):
    if backend == "cpu" and not ops.EXTENSION.loaded:
        pytest.skip(f"no compiled kernels: {ops.EXTENSION.reason}")
    average, net = make(torch.float32), Transformer.from_config(SMALL, seed=3)
    before = average.packed()
    with torch.no_grad():
        ops.ema_update(list(average.parameters()), list(net.parameters()), 0.5, backend=backend)
    after = average.packed()
    assert (after.matrices - before.matrices).abs().max() > 0.1


def test_sizes_and_tokens_are_checked():
    net, tokens = make(torch.float32), some(2)
    for bad in (torch.zeros(2, 8).long(), torch.zeros(2, 0).long(), torch.zeros(7).long()):
        with pytest.raises(ValueError, match=r"tokens must be \(B, N\) with N in 1 \.\. 7, got"):
            net(bad)
    for bad in (6, -1):
        with pytest.raises(ValueError, match=rf"tokens must be in 0 \.\. 5, got {bad}"):
            net(torch.full((2, 7), bad))
    for bad in (tokens.float(), tokens.tolist()):
        with pytest.raises(TypeError, match="tokens must be an int64 tensor, got"):
            net(bad)
    with pytest.raises(ValueError, match=r"y must be \(B,\) = \(2,\) int64 in 0 \.\. 3, got 4"):
        net(tokens, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="y must be None"):
        make(torch.float32, num_classes=0)(tokens, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="config must be one of tiny"):
        Transformer.from_config("huge")
    with pytest.raises(ValueError, match="fields must be among.*got widht"):
        Transformer.from_config("tiny", widht=3)
    refused = {"dim": (0, "dim must be an int >= 1"), "num_levels": (1, "num_levels must be an int >= 2"),
               "num_classes": (-1, "num_classes must be an int >= 0"), "length": (2.0, "length must be an int >= 1"),
               "num_heads": (5, "dim must be a multiple of num_heads = 5")}  # fmt: skip
    for name, (value, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            TransformerConfig(**(SMALL | {name: value}))
    with pytest.raises(ValueError, match="at most 256 for each, got 300"):
        TransformerConfig(dim=300, num_heads=1)


def test_an_empty_batch_and_every_named_size():
    for name in CONFIGS:
        with torch.device("meta"):
            net = Transformer.from_config(name)
        assert sum(p.numel() for p in net.parameters()) > 0
    net = make(torch.float32)
    out = net(some(0), torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 7, 6)
    out.sum().backward()


def test_bf16_autocast_and_one_graph():
    net, tokens, y = make(torch.float32), some(), torch.arange(3)
    with torch.autocast("cpu", torch.bfloat16):
        net(tokens, y).float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, y), net(tokens, y))
