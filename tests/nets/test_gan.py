"""DCGAN: a textbook forward pass, second derivatives, the projection, and every size."""

import math

import pytest
import torch
import torch.nn.functional as F

from genengine.nets.gan import CONFIGS, SIZES, Discriminator, GANConfig, Generator, minibatch_stddev, resolve_config

SMALL = {"image_size": 8, "in_channels": 1, "num_classes": 3, "latent_dim": 5, "class_dim": 4, "generator_dim": 4,
         "discriminator_dim": 4, "max_dim": 6}  # fmt: skip


def pair(seed=0, dtype=torch.float64, **overrides):
    """Small networks with every bias filled too."""
    config = resolve_config(SMALL, **overrides)
    nets = Generator(config, seed=seed).to(dtype), Discriminator(config, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for net in nets:
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return nets


def inputs(config, b=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(b, config.latent_dim, generator=generator, dtype=dtype)
    shape = (b, config.in_channels, config.image_size, config.image_size)
    x = torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1
    return z, x, (torch.arange(b) % config.num_classes if config.num_classes else None)


# bias_act's reference rounds the slope 0.2 to float32 in its derivatives: 2^-24 relative in each of a few layers, on
# sums of terms of order 1 (and up to 30 in the second derivatives).
TOLERANCE = {"rtol": 1e-6, "atol": 4e-7}


def act(x):
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def textbook_generator(net, z, y):
    p = dict(net.named_parameters())
    if y is not None:
        z = torch.cat([z, p["classes.weight"][y]], 1)
    x = act((z @ p["start.weight"].T + p["start.bias"]).view(len(z), -1, 4, 4))
    for i, block in enumerate(net.blocks):
        weight, bias = p[f"blocks.{i}.conv.weight"], p[f"blocks.{i}.bias"].view(1, -1, 1, 1)
        if isinstance(block.conv, torch.nn.ConvTranspose2d):
            b, c, h, w = x.shape  # zeros between the pixels, then a correlation with the flipped kernel
            spread = x.new_zeros(b, c, 2 * h - 1, 2 * w - 1)
            spread[:, :, ::2, ::2] = x
            x = act(F.conv2d(spread, weight.flip(2, 3).transpose(0, 1), padding=2) + bias)
        else:
            x = act(F.conv2d(x, weight, padding=1) + bias)
    return torch.tanh(F.conv2d(x, p["out.weight"], padding=1) + p["out_bias"].view(1, -1, 1, 1))


def textbook_discriminator(net, x, y):
    p = dict(net.named_parameters())
    for i, block in enumerate(net.blocks):
        weight, bias = p[f"blocks.{i}.conv.weight"], p[f"blocks.{i}.bias"].view(1, -1, 1, 1)
        x = act(F.conv2d(x, weight, padding=1, stride=2 if weight.shape[2] == 4 else 1) + bias)
        assert block.conv.stride == ((2, 2) if weight.shape[2] == 4 else (1, 1))
    group = net.config.stddev_group
    if group:
        count = len(x) // group
        maps = []
        for b in range(len(x)):
            members = x[[m for m in range(len(x)) if m % count == b % count]]
            deviation = torch.sqrt(((members - members.mean(0)) ** 2).mean(0) + 1e-8).mean()
            maps.append(deviation.expand(1, 4, 4))
        x = torch.cat([x, torch.stack(maps)], 1)
    x = act(F.conv2d(x, p["last.conv.weight"], padding=1) + p["last.bias"].view(1, -1, 1, 1)).flatten(1)
    x = act(x @ p["features.weight"].T + p["features.bias"])
    logit = (x @ p["out.weight"].T + p["out.bias"])[:, 0]
    return logit if y is None else logit + (p["classes.weight"][y] * x).sum(1)


CASES = [{}, {"num_classes": 0}, {"image_size": 16, "in_channels": 3}, {"stddev_group": 3}]


@pytest.mark.parametrize("overrides", CASES)
def test_forward_and_gradients_equal_the_textbook_networks(overrides):
    g, d = pair(**overrides)
    z, x, y = inputs(g.config)
    size, channels = g.config.image_size, g.config.in_channels
    out = g(z.requires_grad_(), y)
    assert out.shape == (6, channels, size, size) and out.abs().max() < 1
    logits = d(x.requires_grad_(), y)
    assert logits.shape == (6,)
    for net, value, expected, leaf in (
        (g, out, textbook_generator(g, z, y), z),
        (d, logits, textbook_discriminator(d, x, y), x),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
        weight = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(2))
        leaves = [leaf, *net.parameters()]
        got = torch.autograd.grad((value * weight).sum(), leaves)
        for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("overrides", [{}, {"stddev_group": 2}])
def test_second_derivatives_equal_the_textbook_ones(overrides):
    _, d = pair(**overrides)
    _, x, y = inputs(d.config)
    x.requires_grad_()

    def penalty(logits):
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        weights = [p for name, p in d.named_parameters() if name != "out.bias"]
        grads = torch.autograd.grad(slope.square().sum(), weights, allow_unused=True)
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(weights, grads, strict=True)]

    got, expected = penalty(d(x, y)), penalty(textbook_discriminator(d, x, y))
    assert sum(float(grad.abs().sum()) > 0 for grad in got) >= 5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds_and_fits_its_partner(size):
    g, d = pair(dtype=torch.float32, image_size=size, in_channels=3, num_classes=0)
    assert g.config.dims(4) == [min(4 * size // (4 << i), 6) for i in range(len(g.config.dims(4)))]
    z, _, _ = inputs(g.config, 2, torch.float32)
    assert d(g(z)).shape == (2,) and g(z).shape == (2, 3, size, size)


def test_the_class_matters_in_both_networks():
    g, d = pair()
    z, x, _ = inputs(g.config)
    zero, one = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    assert (g(z, zero) - g(z, one)).abs().max() > 1e-3 and (d(x, zero) - d(x, one)).abs().max() > 1e-3


def test_minibatch_stddev_of_equal_images_is_nothing():
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    x[4:] = x[:4]  # groups of 2: image g with g + 4
    assert float(minibatch_stddev(x, 2).abs().max()) < 2e-4
    assert float(minibatch_stddev(x, 4).min()) > 0.1
    with pytest.raises(ValueError, match="stddev_group = 3 must divide the batch, got 8"):
        minibatch_stddev(x, 3)


def test_initialisation_keeps_the_variance_and_is_a_function_of_the_seed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (Generator.from_config("base", seed=seed) for seed in (7, 7, 8))
    d = Discriminator.from_config("base", seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.start.weight, c.start.weight)
    z, x, _ = inputs(a.config, 8, torch.float32)
    seen = {}
    for name, net in (("g", a), ("d", d)):
        net.blocks[-1].register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    a(z), d(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    for name, value in seen.items():  # unit second moment, but for the edges, where padding feeds zeros
        assert 0.5 < float(value[:, :, 1:-1, 1:-1].detach().square().mean()) < 1.5, name


def test_bad_arguments_are_named():
    g, d = pair(dtype=torch.float32)
    z, x, y = inputs(g.config, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"z must be \(B, 5\), got \(6, 4\)"):
        g(z[:, :4], y)
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\) = \(B, 1, 8, 8\), got \(6, 1, 8, 4\)"):
        d(x[..., :4], y)
    for call in (lambda y: g(z, y), lambda y: d(x, y)):
        with pytest.raises(TypeError, match="a conditional network needs a label for every image"):
            call(None)
        with pytest.raises(ValueError, match=r"in 0 \.\. 2, got 3"):
            call(torch.full((6,), 3))
        with pytest.raises(ValueError, match=r"got shape \(2,\)"):
            call(y[:2])
    with pytest.raises(ValueError, match="y must be None"):
        pair(dtype=torch.float32, num_classes=0)[0](z, y)
    refused = {"image_size": (12, r"one of \(8, 16, 32, 64\), got 12"), "latent_dim": (0, "latent_dim must be an int"),
               "stddev_group": (1, "at least 2"), "num_classes": (-1, "num_classes must be an int >= 0")}  # fmt: skip
    for name, (value, message) in refused.items():
        with pytest.raises(ValueError, match=message):
            GANConfig(**{name: value})
    with pytest.raises(ValueError, match="config must be one of tiny"):
        Generator.from_config("huge")
    with pytest.raises(ValueError, match="fields must be among.*got widht"):
        Discriminator.from_config("tiny", widht=3)


def test_empty_batches_and_named_sizes():
    g, d = pair(dtype=torch.float32)
    z, x, y = inputs(g.config, 0, torch.float32)
    assert g(z, y).shape == (0, 1, 8, 8) and d(x, y).shape == (0,)
    for name in CONFIGS:
        with torch.device("meta"):
            count = sum(p.numel() for net in (Generator, Discriminator) for p in net.from_config(name).parameters())
        assert count > 0 and (name != "tiny" or count < 500_000)


def test_compiles_to_one_graph():
    for net, value in zip(pair(dtype=torch.float32), inputs(resolve_config(SMALL), dtype=torch.float32), strict=False):
        y = torch.arange(6) % 3
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(value, y), net(value, y))
