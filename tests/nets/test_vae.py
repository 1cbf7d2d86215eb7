"""VAENet: textbook forward passes, dropout as a function of its arguments, shapes, classes, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from genengine.nets.vae import CONFIGS, VAEConfig, VAENet

MLP = {"image_size": 4, "in_channels": 3, "out_channels": 6, "kind": "mlp", "widths": (12, 10), "latent_dim": 5,
       "num_classes": 3, "conditional": True}  # fmt: skip
CONV = {"image_size": 8, "in_channels": 3, "out_channels": 6, "kind": "conv", "widths": (8, 16), "latent_dim": 5,
        "groups": 4, "blocks": 2, "num_classes": 3, "conditional": True}  # fmt: skip


def randomised(config, **overrides):
    """Every parameter filled, so that each matters."""
    net = VAENet.from_config(config, **overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(net, b=4):
    config = net.config
    x = torch.rand(b, config.in_channels, config.image_size, config.image_size) * 2 - 1
    return x, torch.arange(b) % 3 if config.conditional else None


def textbook_dense(p, prefix, h, y, masks):
    count = len({name for name in p if name.startswith(f"{prefix}.layers.") and name.endswith("weight")})
    for i in range(count):
        h = h @ p[f"{prefix}.layers.{i}.weight"].T + p[f"{prefix}.layers.{i}.bias"]
        if i == 0:
            h = h + p[f"{prefix}.y_embedder.embedding_table.weight"][y]
        if i < count - 1:
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            h = h * masks[i]
    return h


def test_the_mlp_is_the_textbook_network():
    net = randomised(MLP, dropout=0.3, input_dropout=0.2)
    p = {name: value.double() for name, value in net.state_dict().items()}
    x, y = batch(net)
    masks = net.dropout_masks(4, seed=1, step=2)
    mean, logvar = net.encode(x, y, masks)
    seen = x.double().flatten(1) * masks["input"]
    expected = textbook_dense(p, "encoder", seen, y, masks["encoder"])
    torch.testing.assert_close(torch.cat([mean, logvar], 1).double(), expected, rtol=1e-5, atol=1e-5)
    out = net.decode(mean, y, masks)
    expected = textbook_dense(p, "decoder", mean.double(), y, masks["decoder"]).view(4, 6, 4, 4)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def textbook_conv(p, prefix, h, y, masks, config, up):
    """The encoder's or decoder's body in plain torch and float64."""

    def conv(name, h, stride=1):
        weight = p[f"{prefix}.{name}.weight"]
        return F.conv2d(h, weight, p[f"{prefix}.{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(name, h):
        return F.group_norm(h, config.groups, p[f"{prefix}.{name}.weight"], p[f"{prefix}.{name}.bias"], eps=1e-5)

    levels = len(config.widths)
    for level in range(levels):
        if level:
            h = F.interpolate(h, scale_factor=2.0) if up else h
            h = conv(f"{'up' if up else 'down'}.{level - 1}", h, 1 if up else 2)
        for i in range(level * config.blocks, (level + 1) * config.blocks):
            block = f"blocks.{i}"
            scale, shift = p[f"{prefix}.{block}.y_embedder.embedding_table.weight"][y].chunk(2, 1)
            inner = conv(f"{block}.conv1", F.silu(norm(f"{block}.norm1", h)))
            inner = F.silu(norm(f"{block}.norm2", inner) * (1 + scale[..., None, None]) + shift[..., None, None])
            h = h + conv(f"{block}.conv2", inner * masks[i][..., None, None])
    return F.silu(norm("norm", h))


@pytest.mark.parametrize("spatial", [False, True])
def test_the_convolutions_are_the_textbook_network(spatial):
    net = randomised(CONV, dropout=0.3, spatial=spatial)
    p = {name: value.double() for name, value in net.state_dict().items()}
    x, y = batch(net)
    masks = net.dropout_masks(4, seed=1, step=2)
    mean, logvar = net.encode(x, y, masks)
    h = F.conv2d(x.double(), p["encoder.stem.weight"], p["encoder.stem.bias"], padding=1)
    h = textbook_conv(p, "encoder", h, y, masks["encoder"], net.config, up=False)
    out = (F.conv2d if spatial else F.linear)(
        h if spatial else h.flatten(1), p["encoder.out.weight"], p["encoder.out.bias"]
    )
    torch.testing.assert_close(torch.cat([mean, logvar], 1).double(), out, rtol=1e-4, atol=1e-4)
    assert mean.shape == (4, *net.config.latent_shape) == ((4, 5, 4, 4) if spatial else (4, 5))
    z = mean.double()
    weight, bias = p["decoder.stem.weight"], p["decoder.stem.bias"]
    h = F.conv2d(z, weight, bias, padding=1) if spatial else F.linear(z, weight, bias).view(4, 16, 4, 4)
    h = textbook_conv(p, "decoder", h, y, masks["decoder"], net.config, up=True)
    expected = F.conv2d(h, p["decoder.out.weight"], p["decoder.out.bias"], padding=1)
    torch.testing.assert_close(net.decode(mean, y, masks).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [MLP, CONV], ids=["mlp", "conv"])
def test_every_parameter_gets_a_gradient(config):
    net = randomised(config)
    x, y = batch(net)
    y = torch.tensor([0, 1, 2, 3])  # 3 is "no class"
    mean, logvar = net.encode(x, y)
    (net.decode(mean + logvar, y).square().sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_masks_drop_the_share_and_keep_the_mean():
    net = VAENet.from_config("tiny", dropout=0.3, input_dropout=0.1)
    masks = net.dropout_masks(64, seed=0)
    hidden = torch.cat([*masks["encoder"], *masks["decoder"]], 1)
    assert hidden.shape == (64, 4 * 256) and abs((hidden == 0).double().mean() - 0.3) < 0.01
    assert set(hidden.unique().tolist()) == {0.0, hidden.max().item()} and abs(hidden.max() - 1 / 0.7) < 1e-6
    assert abs((masks["input"] == 0).double().mean() - 0.1) < 0.02
    assert VAENet.from_config("tiny").dropout_masks(4, seed=0) is None


def test_masks_of_a_sample_do_not_depend_on_its_batch():
    net = VAENet.from_config("tiny", dropout=0.5)
    ids = torch.tensor([7, 1000, 3])
    whole, part = (net.dropout_masks(len(i), seed=5, sample_ids=i, step=9) for i in (ids, ids[1:2]))
    other = net.dropout_masks(3, seed=5, sample_ids=ids, step=10)
    assert torch.equal(whole["decoder"][0][1:2], part["decoder"][0])
    assert not torch.equal(whole["decoder"][0], other["decoder"][0])
    assert not torch.equal(whole["encoder"][0], whole["encoder"][1])  # each layer its own


def test_no_class_is_a_class_of_its_own():
    net = randomised(MLP)
    x, _ = batch(net)
    free = net.encode(x)[0]
    assert torch.equal(free, net.encode(x, torch.full((4,), net.null_class))[0])
    assert not torch.allclose(free, net.encode(x, torch.zeros(4, dtype=torch.int64))[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_named_configs_build_and_run(name):
    net = VAENet.from_config(name, **({} if name.startswith(("tiny", "mlp")) else {"blocks": 1}))
    config = net.config
    mean, logvar = net.encode(torch.zeros(1, config.in_channels, config.image_size, config.image_size))
    assert mean.shape == logvar.shape == (1, *config.latent_shape)
    assert net.decode(mean).shape == (1, config.out_channels, config.image_size, config.image_size)


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    nets = [VAENet.from_config(CONV, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, same, other = ([p.detach() for p in net.parameters()] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_odd_sizes_and_empty_batches():
    for config in ({**MLP, "image_size": 7}, {**CONV, "image_size": 12, "widths": (4, 8, 4), "blocks": 1}):
        net = VAENet.from_config(config)
        for b in (0, 1, 3):
            x, y = batch(net, b)
            assert net.decode(net.encode(x, y)[0], y).shape == (b, 6, *x.shape[2:])


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MLP, {"kind": "rnn"}, "kind must be one of mlp, conv, got 'rnn'"),
        (MLP, {"widths": ()}, "widths must be a sequence of ints"),
        (MLP, {"spatial": True}, "spatial must be False for kind 'mlp'"),
        (MLP, {"num_classes": 0}, "num_classes must be >= 1 with conditional=True"),
        (MLP, {"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        (MLP, {"latent_dim": 0}, "latent_dim must be an int >= 1"),
        (MLP, {"conditional": 1}, "conditional must be True or False"),
        (CONV, {"image_size": 9}, r"image_size must be a multiple of .* = 2, got 9"),
        (CONV, {"groups": 3}, "widths must be multiples of groups = 3"),
        (CONV, {"depth": 3}, "fields must be among .*, got depth"),
        ("huge", {}, "config must be one of tiny"),
    ],
)
def test_bad_configs_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=f"nets/VAENet: .*{message}"):
        VAENet.from_config(config, **fields)


def test_bad_inputs_are_refused():
    net = VAENet.from_config(MLP)
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) = \(B, 3, 4, 4\), got \(2, 3, 5, 5\)"):
        net.encode(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"z must be \(B, 5\), got \(2, 4\)"):
        net.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"y must be \(B,\) = \(2,\)"):
        net.decode(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))
    plain = VAENet.from_config(MLP, conditional=False)
    with pytest.raises(ValueError, match="y must be None for a network with conditional = False"):
        plain.decode(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    assert VAEConfig(widths=[8, 16]).widths == (8, 16)
