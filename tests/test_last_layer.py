"""The last layer joined to the solver's row: the samples are those of two passes, and it joins only where it may."""

import pytest
import torch
from support import filled, skip_unless_available
from torch import nn

import genengine
from genengine import extensions, paths, schedules, solvers
from genengine.nets.dit import DiT
from genengine.ops import _registry, normal
from genengine.ops.patch_step import PATCH_STEP

SIZES = {"image_size": 6, "patch_size": 2, "in_channels": 3, "dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5,
         "time_features": 8}  # fmt: skip
SHAPE, GRID = (2, 3, 6, 6), schedules.uniform(3, t_max=0.99, t_min=0.01)
TABLES = {
    "euler": lambda: solvers.euler(paths.RectifiedFlow(), GRID, prediction="velocity"),
    "history and noise": lambda: solvers.dpmpp_2m_sde(paths.VPLinear(), GRID, prediction="eps"),
    "learned variance": lambda: solvers.ddpm(paths.VPLinear(), GRID, prediction="eps", variance="learned_range"),
}
EULER = TABLES["euler"]


def network(learn_sigma=False, **overrides):
    return filled(DiT.from_config(SIZES, learn_sigma=learn_sigma, **overrides)).eval()


class Noting:
    """A network that notes whether the loop took its tokens or its output."""

    def __init__(self, net):
        self.net, self.parameters, self.taken = net, net.parameters, set()

    def for_schedule(self, t_rows, y):
        step = self.net.for_schedule(t_rows, y)

        def noting(x, row):
            self.taken.add("output")
            return step(x, row)

        def tokens(x, row):
            self.taken.add("tokens")
            return step.tokens(x, row)

        noting.tokens, noting.last_layer = tokens, step.last_layer
        return noting


def sampled(denoiser, table, device, **options):
    y = torch.arange(2, device=device)
    branches = {"cond": {"y": y}, "uncond": {"y": 0 * y + 5}, "guidance": 2.0, "seed": 3}
    where = {"shape": None if "x" in options else SHAPE, "device": device}
    return genengine.sample(denoiser, table, **(branches | where | options))


@pytest.fixture
def device(monkeypatch):
    """Where Triton's kernels run here, and patch_step's is the one to run."""
    device, automatic = skip_unless_available("patch_step_out", "triton"), _registry.automatic
    monkeypatch.setattr(
        _registry, "automatic", lambda op, *where: "triton" if op is PATCH_STEP else automatic(op, *where)
    )
    return device


@pytest.mark.triton
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_are_those_of_two_passes(device, name, dtype):
    """In bfloat16 they are nearer to those of the same weights in float32: the output is rounded nowhere."""
    net, table = network(name == "learned variance").to(device, dtype), TABLES[name]()
    joins, seen = Noting(net), []
    found = sampled(joins, table, device, callback=lambda info: seen.append(info.row))
    assert joins.taken == {"tokens"} and seen == list(range(table.num_rows))
    two_passes = sampled(lambda x, t, y: net(x, t, y), table, device, model_dtype=dtype)
    wide = net.float()
    exact = sampled(lambda x, t, y: wide(x, t, y), table, device)
    error, allowed = (found - exact).abs().max(), (two_passes - exact).abs().max()
    assert error <= 1e-5 * exact.abs().max() if dtype == torch.float32 else error <= 2 * allowed


@pytest.mark.triton
@pytest.mark.parametrize("noise", ["a tensor", "a function"])
def test_given_noise(device, noise):
    net, table = network().to(device), TABLES["history and noise"]()
    tensor = normal((table.num_rows, *SHAPE), seed=8, device=device)
    joins = Noting(net)
    found = sampled(joins, table, device, noise=tensor if noise == "a tensor" else tensor.__getitem__)
    expected = sampled(lambda x, t, y: net(x, t, y), table, device, noise=tensor)
    assert joins.taken == {"tokens"} and (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.triton
def test_an_engine_joins_too(device):
    net, table = network().to(device), TABLES["history and noise"]()
    y = torch.arange(2, device=device)
    engine = genengine.Engine(net)
    for seed in (3, 4, 3):
        options = {"cond": {"y": y}, "uncond": {"y": 0 * y + 5}, "guidance": 2.0, "seed": seed, "device": device}
        assert torch.equal(engine.sample(table, SHAPE, **options), genengine.sample(net, table, SHAPE, **options))
    (entry,) = engine._entries.values()
    assert entry.loop._joined is not None
    weights = {parameter.data_ptr() for parameter in net.parameters()}
    assert not weights & {tensor.data_ptr() for tensor in entry.loop.tensors()}


class Identity(extensions.Extension):
    def after_row(self, run):
        pass


@pytest.mark.triton
@pytest.mark.parametrize(
    "options",
    [
        {"check_finite": True}, {"extensions": [extensions.Rescale(0.5)]}, {"extensions": [Identity()]},
        {"x": torch.zeros(SHAPE).contiguous(memory_format=torch.channels_last)},
    ],
    ids=["check_finite", "an extension of the output", "an extension of x", "channels_last"],
)  # fmt: skip
def test_where_the_output_is_needed_it_does_not_join(device, options):
    options = {name: value.to(device) if name == "x" else value for name, value in options.items()}
    joins = Noting(network().to(device))
    sampled(joins, EULER(), device, **options)
    assert joins.taken == {"output"}


@pytest.mark.triton
def test_an_output_that_does_not_fit_is_refused_as_ever(device):
    with pytest.raises(ValueError, match="denoiser must return \\(4, 3, 6, 6\\) like its input"):
        sampled(network(learn_sigma=True).to(device), EULER(), device)


@pytest.mark.triton
def test_a_layer_that_is_no_plain_product_does_not_join(device):
    hooked = network().to(device)
    hooked.final_layer.linear.register_forward_hook(lambda module, args, output: 0 * output)
    wrapped = network().to(device)
    wrapped.final_layer.linear = nn.Sequential(wrapped.final_layer.linear)

    class Other(DiT):
        def _run(self, x, modulation):
            return 0 * x

    for net in (hooked, wrapped, filled(Other.from_config(SIZES, learn_sigma=False)).to(device)):
        joins = Noting(net)
        sampled(joins, EULER(), device)
        assert joins.taken == {"output"}


@pytest.mark.triton
@pytest.mark.parametrize(
    "change", [lambda h: h[:, :4], lambda h: h.double(), lambda h: [h]], ids=["N", "dtype", "type"]
)
def test_tokens_that_do_not_fit_are_refused(device, change):
    class Wrong(Noting):
        def for_schedule(self, t_rows, y):
            step = super().for_schedule(t_rows, y)
            right = step.tokens
            step.tokens = lambda x, row: change(right(x, row))
            return step

    with pytest.raises(ValueError, match=r"tokens of a step .* must be \(k B, N, D\) = \(4, 9, 32\) of its dtype"):
        sampled(Wrong(network().to(device)), EULER(), device)


def test_on_a_cpu_it_is_the_two_calls():
    joins = Noting(network())
    sampled(joins, EULER(), torch.device("cpu"))
    assert joins.taken == {"output"}


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["step", "loop"])
def test_captured_it_gives_the_same_samples(capture, device):
    net, table = network().cuda(), TABLES["history and noise"]()
    found, plain = (sampled(net, table, torch.device("cuda"), capture=mode) for mode in (capture, "never"))
    assert torch.equal(found, plain)
