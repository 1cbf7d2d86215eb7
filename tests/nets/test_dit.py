"""DiT: names and sizes of the paper's networks, a textbook forward pass, and the precomputed schedule."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import filled

from genengine.nets.dit import CONFIGS, DiT, DiTConfig
from genengine.ops.patch_step import unpatchify

SMALL = {"image_size": 8, "patch_size": 2, "in_channels": 3, "dim": 24, "depth": 3, "num_heads": 2,
         "num_classes": 5, "learn_sigma": False, "time_features": 16}  # fmt: skip


def randomised(seed=0, dtype=torch.float32, **overrides):
    """A small DiT whose zero-initialised layers are filled too, so that every branch matters."""
    return filled(DiT.from_config(SMALL, seed=seed, **overrides).to(dtype), seed)


def inputs(b=4, dtype=torch.float32, config=None):
    generator = torch.Generator().manual_seed(1)
    channels, size = (3, 8) if config is None else (config.in_channels, config.image_size)
    x = torch.randn(b, channels, size, size, generator=generator, dtype=dtype)
    return x, torch.linspace(0.1, 0.9, b), torch.arange(b) % 5


def textbook(net, x, t, y):
    """The paper's network in plain torch, from the public state-dict names alone."""
    config, p = net.config, {k: v for k, v in net.state_dict(keep_vars=True).items()}
    dim, patch, heads = config.dim, config.patch_size, config.num_heads

    def dense(name, h):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(h, shift, scale):
        mean = h.mean(-1, keepdim=True)
        variance = ((h - mean) ** 2).mean(-1, keepdim=True)
        return (h - mean) / torch.sqrt(variance + 1e-6) * (1 + scale[:, None]) + shift[:, None]

    half = config.time_features // 2
    rate = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angle = (1000 * t[:, None] * rate).to(torch.float32)
    wave = torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype)
    c = dense("t_embedder.mlp.2", F.silu(dense("t_embedder.mlp.0", wave))) + p["y_embedder.embedding_table.weight"][y]
    h = F.conv2d(x, p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + p["pos_embed"]
    b, n = h.shape[:2]
    for i in range(config.depth):
        sa, ca, ga, sm, cm, gm = dense(f"blocks.{i}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        qkv = dense(f"blocks.{i}.attn.qkv", norm(h, sa, ca)).reshape(b, n, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(dim // heads), -1) @ v
        h = h + ga[:, None] * dense(f"blocks.{i}.attn.proj", o.transpose(1, 2).reshape(b, n, dim))
        hidden = F.gelu(dense(f"blocks.{i}.mlp.fc1", norm(h, sm, cm)), approximate="tanh")
        h = h + gm[:, None] * dense(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = dense("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    out = dense("final_layer.linear", norm(h, shift, scale))  # (B, N, p p C)
    side = config.image_size // patch
    out = out.reshape(b, side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(b, -1, config.image_size, config.image_size)


@pytest.mark.parametrize("overrides", [{}, {"patch_size": 4}, {"learn_sigma": True}, {"num_heads": 3, "depth": 1}])
def test_forward_and_gradients_equal_the_textbook_network(overrides):
    net = randomised(dtype=torch.float64, **overrides)
    x, t, y = inputs(dtype=torch.float64)
    x.requires_grad_()
    out, expected = net(x, t, y), textbook(net, x, t, y)
    assert out.shape == (4, 6 if overrides.get("learn_sigma") else 3, 8, 8)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    leaves = [x, *net.parameters()]
    got = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_state_dict_names_are_those_of_the_public_checkpoints():
    net = DiT.from_config(SMALL, depth=2)
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    block = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    expected = {"pos_embed", "y_embedder.embedding_table.weight"}
    for name in ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
                 "final_layer.adaLN_modulation.1"):  # fmt: skip
        expected |= {f"{name}.weight", f"{name}.bias"}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert set(net.state_dict()) == expected
    assert net.state_dict()["blocks.1.adaLN_modulation.1.weight"].shape == (6 * 24, 24)


def test_state_dict_round_trip_also_nested():
    source, target = randomised(1), DiT.from_config(SMALL, seed=2)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs()), target(*inputs()))
    outer = torch.nn.ModuleDict({"net": DiT.from_config(SMALL)})
    outer.load_state_dict({f"net.{key}": value for key, value in source.state_dict().items()})
    assert torch.equal(source(*inputs()), outer["net"](*inputs()))
    assert "net.blocks.0.adaLN_modulation.1.weight" in outer.state_dict()


def test_bad_state_dicts_are_refused_by_name():
    net, state = DiT.from_config(SMALL), randomised().state_dict()
    missing = {k: v for k, v in state.items() if k != "blocks.1.adaLN_modulation.1.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.adaLN_modulation\.1\.bias"):
        net.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"final_layer\.adaLN_modulation\.1\.weight"):
        net.load_state_dict(state | {"final_layer.adaLN_modulation.1.weight": torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.7\.attn"):
        net.load_state_dict(state | {"blocks.7.attn.qkv.bias": torch.zeros(3)})


def test_sizes_of_the_papers_networks():
    millions = {"DIT_S_2": 33, "DIT_B_2": 130, "DIT_L_2": 458, "DIT_XL_2": 675, "DIT_S_8": 33, "DIT_B_4": 130}
    for name, expected in millions.items():
        with torch.device("meta"):
            net = DiT.from_config(name)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == expected, name
    assert set(CONFIGS) == {f"DIT_{s}_{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)} | {"tiny"}


def test_initialisation_is_a_function_of_the_seed_and_starts_at_zero():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (DiT.from_config(SMALL, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())  # no global generator was touched
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.x_embedder.proj.weight, c.x_embedder.proj.weight)
    assert all(torch.isfinite(p).all() for p in a.parameters())
    assert a(*inputs()).abs().max() == 0  # adaLN-zero: the output layer is zero
    weight = a.blocks[0].attn.qkv.weight
    assert abs(weight.std() * math.sqrt((24 + 72) / 2) - 1) < 0.1


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["table", "product per step"])
def test_schedule_equals_forward_for_every_row(limit):
    net = randomised().eval()
    net.max_table_bytes = limit
    x, _, y = inputs()
    t_rows = torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    t_rows[:, 2] = t_rows[:, 1]  # equal pairs are computed once
    with torch.inference_mode():
        step = net.for_schedule(t_rows, y=y)
        for row in (torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5, 0, 2])):
            t = t_rows[row, torch.arange(4)]
            torch.testing.assert_close(step(x, row.int()), net(x, t, y), rtol=1e-5, atol=1e-5)
        finished = torch.tensor([6, 9, 6, 6], dtype=torch.int32)
        torch.testing.assert_close(step(x, finished), net(x, t_rows[5], y), rtol=1e-5, atol=1e-5)


def test_schedule_without_labels_and_without_classes():
    for overrides in ({}, {"num_classes": 0}):
        net = randomised(**overrides).eval()
        x, t, _ = inputs()
        with torch.inference_mode():
            step = net.for_schedule(t[None])
            out = step(x, torch.zeros(4, dtype=torch.int32))
            torch.testing.assert_close(out, net(x, t), rtol=1e-5, atol=1e-5)
    null = torch.full((4,), 5)
    net = randomised()
    assert torch.equal(net(x, t), net(x, t, null))


def test_training_and_evaluation_give_the_same_numbers():
    net = randomised()
    with torch.no_grad():
        assert torch.equal(net.train()(*inputs()), net.eval()(*inputs()))


def test_bf16_autocast_trains():
    net = randomised()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*inputs())
        loss = out.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    exact = net(*inputs())
    assert (out - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


def test_tokens_keep_their_place():
    net = DiT.from_config(SMALL, dim=16, depth=1)
    x = torch.arange(3 * 64.0).view(1, 3, 8, 8)
    tokens = F.unfold(x, 2, stride=2).transpose(1, 2).view(1, 16, 3, 2, 2).permute(0, 1, 3, 4, 2).reshape(1, 16, 12)
    assert torch.equal(unpatchify(tokens, (4, 4), 2, 3), x)
    expected = F.conv2d(x, net.x_embedder.proj.weight, net.x_embedder.proj.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(net.x_embedder(x), expected, rtol=1e-5, atol=1e-4)


def test_bad_arguments_are_named():
    net = randomised()
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) = \(B, 3, 8, 8\), got \(4, 3, 4, 4\)"):
        net(x[..., :4, :4], t, y)
    with pytest.raises(ValueError, match="config must be one of DIT_S_2"):
        DiT.from_config("DIT_XXL_2")
    with pytest.raises(ValueError, match="fields must be among.*got widht"):
        DiT.from_config("tiny", widht=3)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        DiTConfig(image_size=9)
    with pytest.raises(ValueError, match="multiple of 4 and of num_heads"):
        DiTConfig(dim=1154)
    with pytest.raises(ValueError, match="depth must be an int >= 1"):
        DiTConfig(depth=0)
    for bad in ({"num_classes": "ten"}, {"mlp_ratio": None}, {"time_scale": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            DiTConfig(**bad)
    with pytest.raises(ValueError, match="y must be None"):
        randomised(num_classes=0)(x, t, y)


@pytest.mark.parametrize("overrides", [{}, {"patch_size": 4, "learn_sigma": True}, {"num_classes": 0}])
def test_an_empty_batch_gives_an_empty_output(overrides):
    net = randomised(**overrides)
    x, t, y = inputs(0)
    y = None if net.null_class == 0 else y
    out = net(x, t, y)
    assert out.shape == (0, net.out_channels, 8, 8)
    out.sum().backward()
    with torch.inference_mode():
        step = net.for_schedule(torch.rand(3, 0), y=y)
        assert step(x, torch.zeros(0, dtype=torch.int32)).shape == out.shape


def test_labels_are_checked_before_the_network_and_before_the_schedule():
    net = randomised()
    x, t, y = inputs()
    calls = {"forward": lambda net, y: net(x, t, y), "schedule": lambda net, y: net.for_schedule(t[None], y=y),
             "condition": lambda net, y: net.condition(t, y)}  # fmt: skip
    for call in calls.values():
        for wrong in (-1, 6, 12):
            bad = torch.tensor([0, wrong, 5, 2])
            with pytest.raises(ValueError, match=rf"y must be \(B,\) = \(4,\) int64 in 0 \.\. 5, got {wrong};"):
                call(net, bad)
        with pytest.raises(ValueError, match=r"got shape \(3,\); give one label per sample"):
            call(net, y[:3])
        for bad in (y.float(), y.bool(), y.tolist()):
            with pytest.raises(TypeError, match=r"y must be \(B,\) = \(4,\) int64.*got"):
                call(net, bad)
        with pytest.raises(ValueError, match="y must be None for a network with num_classes = 0"):
            call(randomised(num_classes=0), y)
        call(net, torch.full((4,), 5))  # "no class" is a label too
        call(net, y.int())
    with pytest.raises(ValueError, match=r"t must be \(B,\) = \(4,\) like x, got \(1,\)"):
        net(x, t[:1], y)


def test_compiles_to_one_graph():
    net = randomised()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs()), net(*inputs()))
