"""UNet: a textbook forward pass, the size of DDPM's network, the precomputed schedule, and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import filled

from genengine import ops
from genengine.nets import unet
from genengine.nets.unet import CONFIGS, UNet, UNetConfig

SMALL = {"image_size": 8, "in_channels": 3, "channels": 8, "multipliers": (1, 2, 2), "num_blocks": 1,
         "attention": (4, 2), "head_dim": 8, "num_groups": 4, "num_classes": 5}  # fmt: skip
VARIANTS = [
    {},
    {"modulation": "add", "learn_sigma": True},
    {"fourier": (1, 3), "head_dim": 0, "num_blocks": 2},
    {"image_size": 12, "attention": (), "num_classes": 0, "time_features": 10},
    {"multipliers": (1,), "attention": (8,), "in_channels": 1},
]


def randomised(seed=0, dtype=torch.float32, **overrides):
    """A small UNet whose zero-initialised layers are filled too, so that every branch matters."""
    return filled(UNet.from_config(SMALL, seed=seed, **overrides).to(dtype), seed)


def inputs(b=4, dtype=torch.float32, net=None):
    generator = torch.Generator().manual_seed(1)
    channels, size = (3, 8) if net is None else (net.config.in_channels, net.config.image_size)
    x = torch.randn(b, channels, size, size, generator=generator, dtype=dtype)
    y = None if net is not None and not net.config.num_classes else torch.arange(b) % 5
    return x, torch.linspace(0.1, 0.9, b), y


def textbook(net, x, t, y):
    """The network in plain torch, from its state dict and configuration alone."""
    config, p = net.config, dict(net.state_dict(keep_vars=True))
    b, groups = len(x), config.num_groups

    def conv(name, h, stride=1):
        weight = p[f"{name}.weight"]
        return F.conv2d(h, weight, p[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def dense(name, h):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, h):
        parts = h.reshape(b, groups, -1)
        parts = (parts - parts.mean(-1, keepdim=True)) / torch.sqrt(parts.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return parts.view(h.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    half = net.config.time_width // 2
    angle = (1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)).float()
    c = dense("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1).to(x.dtype))
    c = dense("t_embedder.mlp.2", F.silu(c))
    rows = dense("modulation", F.silu(c if y is None else c + p["y_embedder.embedding_table.weight"][y]))

    def take(width):
        nonlocal rows
        first, rows = rows[:, :width, None, None], rows[:, width:]
        return first

    def stage(name, h, attention):
        start = h
        h = conv(f"{name}.res.conv1", F.silu(norm(f"{name}.res.norm1", h)))
        width = h.shape[1]
        if config.modulation == "add":
            h = norm(f"{name}.res.norm2", h + take(width))
        else:
            h = norm(f"{name}.res.norm2", h) * (1 + take(width)) + take(width)
        h = conv(f"{name}.res.conv2", F.silu(h))
        x = h + (conv(f"{name}.res.skip", start) if start.shape[1] != width else start)
        if not attention:
            return x
        tokens = norm(f"{name}.attn.norm", x).flatten(2).transpose(1, 2)  # (B, N, C)
        dim = config.head_dim or width
        q, k, v = dense(f"{name}.attn.attn.qkv", tokens).reshape(b, -1, 3, width // dim, dim).permute(2, 0, 3, 1, 4)
        o = torch.softmax(q @ k.mT / math.sqrt(dim), -1) @ v
        o = dense(f"{name}.attn.attn.proj", o.transpose(1, 2).reshape(tokens.shape))
        return x + o.transpose(1, 2).view(x.shape)

    waves = [f(2**k * math.pi * x) for k in config.fourier for f in (torch.sin, torch.cos)]
    x = conv("conv_in", torch.cat([x, *waves], 1))
    skips, n, levels = [x], 0, len(config.multipliers)
    for level in range(levels):
        for _ in range(config.num_blocks):
            x = stage(f"down.{n}", x, config.image_size >> level in config.attention)
            skips, n = [*skips, x], n + 1
        if level + 1 < levels:
            x = conv(f"downsample.{level}", x, stride=2)
            skips.append(x)
    x, n = stage("middle.1", stage("middle.0", x, True), False), 0
    for level in reversed(range(levels)):
        for _ in range(config.num_blocks + 1):
            x = stage(f"up.{n}", torch.cat([x, skips.pop()], 1), config.image_size >> level in config.attention)
            n += 1
        if level:
            x = conv(f"upsample.{levels - 1 - level}", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert not skips and rows.shape[1] == 0
    return conv("conv_out", F.silu(norm("norm_out", x)))


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_forward_and_gradients_equal_the_textbook_network(overrides):
    net = randomised(dtype=torch.float64, **overrides)
    x, t, y = inputs(dtype=torch.float64, net=net)
    x.requires_grad_()
    out, expected = net(x, t, y), textbook(net, x, t, y)
    assert out.shape[1] == net.config.in_channels * (2 if net.config.learn_sigma else 1)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    leaves = [x, *net.parameters()]
    got = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_sizes_of_the_papers_networks():
    with torch.device("meta"):
        cifar, large = UNet.from_config("cifar"), UNet.from_config("image64")
    assert sum(p.numel() for p in cifar.parameters()) == 35_746_307  # the published DDPM checkpoint's
    assert round(sum(p.numel() for p in large.parameters()) / 1e6) == 122
    tiny = UNet.from_config("tiny")
    assert sum(p.numel() for p in tiny.parameters()) * 2 < 2_000_000  # in float16, on disk
    assert set(CONFIGS) == {"tiny", "cifar", "image64"}


def test_initialisation_is_a_function_of_the_seed_and_starts_at_zero():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (UNet.from_config(SMALL, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())  # no global generator was touched
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv_in.weight, c.conv_in.weight)
    assert all(torch.isfinite(p).all() for p in a.parameters())
    x, t, y = inputs()
    assert a(x, t, y).abs().max() == 0 and a.conv_out.weight.abs().max() == 0
    h = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    first, x, branch = a.down[0].res(h, h, torch.ones(2, 8), torch.ones(2, 8))
    assert torch.equal(first, h + h) and torch.equal(x + branch, first)  # every block is the identity
    weight = a.down[1].res.conv2.weight, a.down[1].res.conv1.weight
    assert weight[0].abs().max() == 0 and abs(weight[1].std() * math.sqrt((8 + 16) * 9 / 2) - 1) < 0.1


@pytest.mark.parametrize("modulation", unet.MODULATIONS)
def test_joined_sums_change_nothing(modulation, monkeypatch):
    """Outputs bit for bit, gradients but for the order of sums; every norm behind a branch is joined to it."""
    net = randomised(modulation=modulation)
    calls, joined = [], ops.add_group_norm_silu
    monkeypatch.setattr(
        ops, "add_group_norm_silu", lambda *args, **options: calls.append(1) or joined(*args, **options)
    )
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(unet, "LEAST_JOINED", least)
        out = net(*inputs())
        found.append((out, torch.autograd.grad(out.square().sum(), list(net.parameters()))))
    (out, grads), (plain, expected) = found
    assert calls and torch.equal(out, plain)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["table", "product per step"])
def test_schedule_equals_forward_for_every_row(limit):
    net = randomised().eval()
    net.max_table_bytes = limit
    x, _, y = inputs()
    t_rows = torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        step = net.for_schedule(t_rows, y=y)
        for row in (torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5, 0, 2])):
            t = t_rows[row, torch.arange(4)]
            torch.testing.assert_close(step(x, row.int()), net(x, t, y), rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch_or_on_the_layout():
    net = randomised()
    x, t, y = inputs()
    out = net(x, t, y)
    torch.testing.assert_close(net(x[2:3], t[2:3], y[2:3]), out[2:3], rtol=1e-5, atol=1e-5)
    strided = net(x.contiguous(memory_format=torch.channels_last), t, y)
    assert out.is_contiguous() and strided.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(strided, out, rtol=1e-5, atol=1e-5)
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), 5)))  # no label is the label of no class


def test_the_convolutions_see_channels_last():
    net, seen = randomised(fourier=(2,)), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(*inputs())
    assert len(seen) > 20 and all(h.is_contiguous(memory_format=torch.channels_last) for h in seen)


def test_an_empty_batch_gives_an_empty_output():
    net = randomised()
    out = net(*inputs(0))
    assert out.shape == (0, 3, 8, 8)


def test_bf16_autocast_trains():
    net = randomised()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*inputs())
        loss = out.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    exact = net(*inputs())
    assert (out - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


def test_compiles_to_one_graph():
    net = randomised()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs()), net(*inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 10}, r"image_size must be a multiple of 2\^\(len\(multipliers\) - 1\) = 4, got 10; pad"),
        ({"num_groups": 3}, r"num_groups must divide every width, got num_groups=3 and widths \[8, 16, 16\]"),
        ({"attention": (5,)}, r"attention must be among \[8, 4, 2\], got 5"),
        ({"head_dim": 3}, "head_dim must divide the width 16"),
        ({"channels": 512, "head_dim": 0}, "heads of at most 256, got head_dim=0"),
        ({"multipliers": ()}, "multipliers must name at least one resolution"),
        ({"multipliers": (1, 0)}, "multipliers must be ints >= 1"),
        ({"multipliers": 2}, "multipliers must be ints >= 1, got 2"),
        ({"fourier": (-1,)}, "fourier must be ints >= 0"),
        ({"num_blocks": 0}, "num_blocks must be an int >= 1"),
        ({"channels": True}, "channels must be an int >= 1, got True"),
        ({"num_classes": "ten"}, "num_classes must be an int >= 0"),
        ({"modulation": "film"}, "modulation must be one of scale_shift, add, got 'film'"),
        ({"time_scale": math.inf}, "time_scale must be a finite number"),
        ({"time_features": 3}, r"time_features \(or channels\) must be even, got 3"),
        ({"widht": 3}, "fields must be among.*got widht"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"nets/UNet: .*{message}"):
        UNet.from_config(SMALL, **fields)


def test_bad_arguments_are_named():
    net = randomised()
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"nets/UNet: x must be \(B, C, H, W\) = \(B, 3, 8, 8\), got \(4, 3, 4, 4\)"):
        net(x[..., :4, :4], t, y)
    with pytest.raises(ValueError, match="nets/UNet: config must be one of tiny, cifar"):
        UNet.from_config("huge")
    with pytest.raises(ValueError, match=r"nets/UNet: y must be \(B,\) = \(4,\) int64 in 0 \.\. 5, got 6"):
        net(x, t, torch.full((4,), 6))
    assert UNetConfig(**SMALL).resolutions == [8, 4, 2]
