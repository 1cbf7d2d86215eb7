"""PixelCNN: what each pixel sees, a textbook forward pass with full masked kernels, and odd sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from genengine import ops
from genengine.nets.pixelcnn import CONFIGS, PixelCNN, PixelCNNConfig

SMALL = {"image_size": 6, "in_channels": 1, "num_levels": 5, "num_classes": 3, "dim": 6, "depth": 3, "first_size": 5,
         "head": "categorical", "head_dim": 24}  # fmt: skip
COLOUR = {"in_channels": 3, "image_size": 5}
MIXTURE = {"in_channels": 3, "head": "logistic_mixture", "components": 2}


def randomised(seed=0, dtype=torch.float64, **overrides):
    """A small network whose zero-initialised weights are filled too."""
    net = PixelCNN.from_config(SMALL, seed=seed, **overrides).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return net


def images(net, b=2, dtype=torch.float64):
    c, size, levels = net.config.in_channels, net.config.image_size, net.config.num_levels
    level = torch.randint(levels, (b, c, size, size), generator=torch.Generator().manual_seed(1))
    return (2 * level.to(dtype) - (levels - 1)) / (levels - 1)


def seen(net, row, column, channel):
    """(C, H, W) bool: the inputs on which any output of one pixel and channel depends."""
    x = images(net, 24).requires_grad_()  # of few images all hidden units may be off
    output = net(x, torch.arange(24) % 3 if net.config.num_classes else None)
    output = output[:, :, channel] if net.config.head == "categorical" else output
    weight = torch.randn(output.shape[:2], generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    (gradient,) = torch.autograd.grad((output[..., row, column] * weight).sum(), x)
    return (gradient != 0).any(0)


def earlier(net, row, column, channel):
    """(C, H, W) bool: all that comes before one pixel and channel in the order of generation."""
    c, size = net.config.in_channels, net.config.image_size
    before = torch.arange(size * size).view(1, size, size).expand(c, -1, -1) < row * size + column
    before = before.clone()
    if net.config.head == "categorical":
        before[:channel, row, column] = True
    return before


@pytest.mark.parametrize("overrides", [{}, COLOUR, MIXTURE, {"num_classes": 0, "depth": 2}])
def test_a_pixel_sees_exactly_those_before_it(overrides):
    net = randomised(**overrides)
    channels = net.config.in_channels if net.config.head == "categorical" else 1
    size = net.config.image_size
    for row in range(size):
        for column in range(size):
            for channel in range(channels):
                dependence = seen(net, row, column, channel)
                allowed = earlier(net, row, column, channel)
                # within reach sideways: 2 of the first layer and 1 of each other in the pixel's row, and as far again
                # for every row above; this size is reached everywhere but in short nets
                if net.config.depth == 2:
                    assert not (dependence & ~allowed).any()
                    far = net.config.first_size // 2 + 1
                    assert dependence[:, row, max(0, column - far) : column].all()
                    assert not dependence[:, row, : max(0, column - far)].any()
                    assert not dependence[:, : max(0, row - net.reach)].any()
                else:
                    near = allowed & (torch.arange(size) >= column - 4)
                    near[:, :row] &= (torch.arange(size) - column).abs() <= 4
                    assert not (dependence & ~allowed).any(), (row, column, channel)
                    assert (dependence & near).equal(near), (row, column, channel)


def test_the_plain_stack_has_a_blind_spot_and_no_leak():
    plain, gated = randomised(mode="plain", depth=4), randomised(depth=4)
    blind = 0
    for row in range(6):
        for column in range(6):
            allowed = earlier(plain, row, column, 0)
            assert not (seen(plain, row, column, 0) & ~allowed).any()
            assert seen(gated, row, column, 0).equal(allowed)
            blind += int((allowed & ~seen(plain, row, column, 0)).sum())
    assert blind > 0
    # the wedge up to the right: two rows up a kernel of side 5 and then 3 reaches 2 + 1 to the right, not further
    assert not seen(plain, 5, 0, 0)[0, 4, 3:].any() and seen(gated, 5, 0, 0)[0, 4].all()


def test_reach_is_the_rows_that_are_seen():
    for overrides in ({"depth": 1}, {"depth": 3}, {"depth": 2, "mode": "plain"}, {"depth": 2, "kernel_size": 5}):
        net = randomised(image_size=8, **overrides)
        rows = seen(net, 7, 3, 0)[0].any(1)
        assert int(rows[:-1].sum()) == min(7, net.reach)


def textbook(net, x, y):
    """The same network with full square kernels times masks, from the weights alone."""
    config, p = net.config, dict(net.named_parameters())
    dim, groups = config.dim, config.groups

    def gate(u):
        return torch.tanh(u[:, :dim]) * torch.sigmoid(u[:, dim:])

    def allowed(ins, outs, strict):  # group of feature f of n: f // (n / groups)
        rows = [[o * groups // outs > i * groups // ins if strict else o * groups // outs >= i * groups // ins
                 for i in range(ins)] for o in range(outs)]  # fmt: skip
        return torch.tensor(rows, dtype=x.dtype)

    def product(name, h, ins, outs):
        weight = p[f"{name}.conv.weight"][:, :, 0, 0] * allowed(ins, outs, False)
        return torch.einsum("oi,bihw->bohw", weight, h) + p[f"{name}.conv.bias"].view(1, -1, 1, 1)

    bias = p["classes.embedding_table.weight"][y].view(len(x), config.depth, 2, 2 * dim, 1, 1)
    v = h = x
    for i in range(config.depth):
        size = config.kernel_size if i else config.first_size
        mid, ins = size // 2, h.shape[1]
        above = torch.zeros(2 * dim, v.shape[1], size, size, dtype=x.dtype)
        above[:, :, : mid + 1] = p[f"layers.{i}.above.weight"]
        above = F.conv2d(v, above, p[f"layers.{i}.above.bias"], padding=mid)
        down = torch.cat([torch.zeros_like(above[:, :, :1]), above[:, :, :-1]], 2)
        left = torch.zeros(2 * dim, ins, size, size, dtype=x.dtype)
        taps = p[f"layers.{i}.left.conv.weight"]
        left[:, :, mid, : taps.shape[3]] = taps[:, :, 0]
        half = allowed(ins, dim, i == 0)
        left[:, :, mid, mid] *= torch.cat([half, half])
        u = F.conv2d(down, p[f"layers.{i}.down.weight"]) + F.conv2d(h, left, padding=mid)
        new = product(f"layers.{i}.out", gate(u + bias[:, i, 1]), dim, dim)
        v, h = gate(above + bias[:, i, 0]), new if i == 0 else h + new
        if i == 0:
            v, h = v + p["positions"][0], h + p["positions"][1]
    h = product("hidden", F.relu(h), dim, config.head_dim)
    h = product("out", F.relu(h), config.head_dim, config.out_features)
    if config.head == "categorical":
        return h.view(len(x), config.in_channels, config.num_levels, *x.shape[2:]).transpose(1, 2)
    return h


@pytest.mark.parametrize("overrides", [{}, COLOUR, MIXTURE, {"kernel_size": 5, "first_size": 3}])
def test_forward_and_gradients_equal_the_textbook_network(overrides):
    net = randomised(**overrides)
    x, y = images(net, 3).requires_grad_(), torch.tensor([0, 3, 2])
    out, expected = net(x, y), textbook(net, x, y)
    if net.config.head == "categorical":
        assert out.shape == (3, 5, net.config.in_channels, *x.shape[2:])
    else:
        assert out.shape == (3, 2 * (1 + 3 + 3 + 3), *x.shape[2:])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    leaves = [x, *net.parameters()]
    got = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("overrides", [{"image_size": 12}, {"image_size": 12, "mode": "plain"}])
def test_rows_within_reach_suffice(overrides):
    net = randomised(depth=2, **overrides)
    x, y = images(net), torch.tensor([0, 1])
    top = 3
    part = net(x[:, :, top:], y, first_row=top)
    torch.testing.assert_close(part[..., net.reach :, :], net(x, y)[..., top + net.reach :, :], rtol=1e-12, atol=1e-12)
    assert (part[..., : net.reach, :] - net(x, y)[..., top : top + net.reach, :]).abs().max() > 1e-6


def test_levels_may_enter_by_a_table():
    net = randomised(embedding=4, num_classes=0, in_channels=2, dim=6)
    x = images(net)
    out = net(x)
    # later pixels change nothing, earlier ones do: there is no gradient to look at
    changed = x.clone()
    changed[:, 1, 3, 2] = torch.where(x[:, 1, 3, 2] > 0, -1.0, 1.0)
    other = net(changed)
    same = (out == other).all(1).all(0)  # (C, H, W)
    assert same[:, :3].all() and same[:, 3, :3].all() and not same[:, 3, 3].any() and not same[:, 4].all()
    # channel 1 of a level is another row of the table than channel 0
    assert net.table.weight.shape == (2 * 5, 4)
    table = net.table.weight.detach()
    level = torch.round((x + 1) * 2).long()
    features = net._features(x)
    assert torch.equal(features[1, 4:, 2, 5], table[5 + level[1, 1, 2, 5]])


def test_dropout_is_a_draw_of_the_image():
    net = randomised(dtype=torch.float32, dropout=0.5)
    x, y = images(net, 4, torch.float32), torch.arange(4) % 3
    ids = torch.tensor([7, 3, 900, 4])
    out = net(x, y, dropout={"seed": 5, "sample_ids": ids, "step": 2})
    assert not torch.equal(out, net(x, y))
    alone = net(x[2:3], y[2:3], dropout={"seed": 5, "sample_ids": ids[2:3], "step": 2})
    torch.testing.assert_close(out[2:3], alone, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, net(x, y, dropout={"seed": 5, "sample_ids": ids, "step": 3}))
    keep = net._keep(x, {"seed": 5, "sample_ids": ids, "step": 2})
    u = ops.uniform((4, 3, 6, 6, 6), seed=5, sample_ids=ids, step=2, stream="dropout")
    assert torch.equal(keep, torch.where(u < 0.5, 0.0, 2.0))


def test_an_untrained_network_is_uniform_and_a_function_of_the_seed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (PixelCNN.from_config("tiny", seed=seed) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.layers[0].above.weight, c.layers[0].above.weight)
    assert a(torch.zeros(1, 1, 8, 8)).abs().max() == 0
    assert 120_000 < sum(p.numel() for p in a.parameters()) < 180_000
    mixture = PixelCNN.from_config("small", seed=1)
    assert torch.isfinite(mixture(torch.rand(1, 3, 32, 32) * 2 - 1)).all()
    weight = a.layers[1].above.weight
    assert abs(weight.std() / math.sqrt(2 / (weight[0].numel() + 64)) - 1) < 0.1


def test_labels_and_sizes_are_checked():
    net = randomised(dtype=torch.float32)
    x = images(net, 2, torch.float32)
    assert torch.equal(net(x), net(x, torch.tensor([3, 3])))
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) = \(B, 1, 6, 6\), got \(2, 1, 6, 5\)"):
        net(x[..., :5])
    with pytest.raises(ValueError, match=r"= \(B, 1, 4, 6\), got \(2, 1, 6, 6\)"):
        net(x, first_row=2)
    for bad in ([0, 4], [-1, 0], [1]):
        with pytest.raises(ValueError, match=r"y must be \(B,\) = \(2,\) int64 in 0 \.\. 3, got"):
            net(x, torch.tensor(bad))
    for bad in (torch.tensor([0.0, 1.0]), [0, 1]):
        with pytest.raises(TypeError, match=r"y must be \(B,\) = \(2,\) int64 in 0 \.\. 3, got"):
            net(x, bad)
    with pytest.raises(ValueError, match="y must be None"):
        randomised(num_classes=0)(images(net), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="config must be one of tiny"):
        PixelCNN.from_config("huge")
    with pytest.raises(ValueError, match="fields must be among.*got widht"):
        PixelCNN.from_config("tiny", widht=3)
    refused = {"dim": (0, "dim must be an int >= 1"), "num_levels": (1, "num_levels must be an int >= 2"),
               "kernel_size": (4, "must be odd"), "mode": ("row", "mode must be one of gated, plain"),
               "head": ("gaussian", "head must be one of"), "dropout": (1.0, r"dropout must be a number in \[0, 1\)"),
               "in_channels": (4, "multiples of in_channels = 4")}  # fmt: skip
    for name, (value, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            PixelCNNConfig(**(SMALL | {name: value}))
    with pytest.raises(ValueError, match="in_channels must be 1 to 4"):
        PixelCNNConfig(in_channels=5)


def test_an_empty_batch_and_every_named_size():
    for name in CONFIGS:
        with torch.device("meta"):
            net = PixelCNN.from_config(name)
        assert sum(p.numel() for p in net.parameters()) > 0
    net = randomised(dtype=torch.float32)
    out = net(images(net, 0, torch.float32), torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 5, 1, 6, 6)
    out.sum().backward()


def test_bf16_autocast_and_one_graph():
    net = randomised(dtype=torch.float32)
    x, y = images(net, 3, torch.float32), torch.arange(3)
    with torch.autocast("cpu", torch.bfloat16):
        net(x, y).float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), net(x, y))
