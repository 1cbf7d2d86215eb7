"""An engine on a GPU: replays equal uncaptured runs bit for bit, keep to a bound of memory, and wait for no host."""

import pytest
import torch

import genengine
from genengine import Engine, extensions, paths, schedules, solvers
from genengine.models.flow import FlowMatching
from genengine.nets.dit import DiT

pytestmark = pytest.mark.gpu
SHAPE = (4, 3, 8, 8)
FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
GRID = schedules.uniform(5, t_max=0.99, t_min=0.01)
EULER = solvers.euler(FLOW, GRID, prediction="velocity")


def denoiser(x, t, y=None):
    column = lambda v: v.reshape(-1, 1, 1, 1).to(x.dtype)  # noqa: E731
    y = torch.zeros_like(t) if y is None else y
    return torch.tanh(0.3 * x + column(t) + 0.1 * column(y))


class Net(torch.nn.Module):
    def __init__(self, channels=3, width=32):
        super().__init__()
        self.up = torch.nn.Conv2d(channels, width, 3, padding=1)
        self.down = torch.nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, t, y=None):
        return self.down(torch.tanh(self.up(x) + t.view(-1, 1, 1, 1).to(x.dtype)))


def guided(seed):
    y = torch.arange(4.0, device="cuda") + seed
    return {"cond": {"y": y}, "uncond": {"y": torch.zeros_like(y)}, "guidance": 1.0 + seed / 4, "seed": seed}


def agree(engine, table, *args, **kwargs):
    found = engine.sample(table, *args, device="cuda", **kwargs)
    expected = genengine.sample(engine.denoiser, table, *args, device="cuda", capture="never", **kwargs)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    return found


@pytest.mark.parametrize("capture", ["loop", "step"])
@pytest.mark.parametrize("name", ["euler", "heun", "ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "lms"])
def test_replays_equal_uncaptured_runs(name, capture):
    engine = Engine(denoiser, capture=capture)
    for seed, power in ((1, 1.0), (2, 1.0), (3, 1.2), (4, 0.9)):
        agree(engine, solvers.SOLVERS[name](VP, GRID**power, prediction="eps"), SHAPE, **guided(seed))
    assert (engine.stats.captures, engine.stats.replays) == (1, 4)


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_on_every_backend(backend):
    table = solvers.dpmpp_2m_sde(VP, GRID, prediction="eps")
    with genengine.backend(backend):
        engine = Engine(denoiser)
        for seed in (1, 2):
            agree(engine, table, SHAPE, **guided(seed))
    assert engine.stats.captures == 1
    agree(engine, table, SHAPE, **guided(1))
    assert engine.stats.captures == 2


def test_states_layouts_and_dtypes():
    engine = Engine(denoiser)
    for layout in (torch.contiguous_format, torch.channels_last):
        for _ in range(2):
            x = torch.randn(SHAPE, device="cuda").contiguous(memory_format=layout)
            agree(engine, EULER, x=x, model_dtype=torch.bfloat16)
    assert engine.stats.captures == 2


EXTENSIONS = {
    "rescale": lambda: extensions.Rescale(),
    "inpaint": lambda: extensions.Inpaint(torch.rand(8, 8).round(), torch.rand(SHAPE), VP),
    "inpaint by row": lambda: extensions.Inpaint(torch.rand(8, 8).round(), torch.rand(SHAPE), VP, "row"),
    "threshold": lambda: extensions.DynamicThreshold(0.9),
    "langevin": lambda: extensions.Langevin(VP, "eps"),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extensions_are_started_anew_and_replayed(name):
    engine, table = Engine(denoiser), solvers.ddpm(VP, GRID, prediction="eps", clip=1.0)
    for seed in (1, 2):
        agree(engine, table, SHAPE, extensions=(EXTENSIONS[name](),), **guided(seed))
    assert engine.stats.captures == 1


def test_a_dit_s_modulations_are_refreshed_before_the_replay():
    net = DiT.from_config("tiny").cuda().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    engine, shape, null = Engine(net), (4, 1, 8, 8), torch.full((4,), 10, device="cuda")
    for seed, labels in enumerate(([1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 1, 1])):
        cond = {"y": torch.tensor(labels, device="cuda")}
        found = engine.sample(EULER, shape, cond=cond, uncond={"y": null}, guidance=2.0, seed=seed)
        expected = genengine.sample(
            net, EULER, shape, cond=cond, uncond={"y": null}, guidance=2.0, seed=seed, capture="never"
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            net.modulation.weight.mul_(0.9)
    assert engine.stats.captures == 1
    net.to(torch.bfloat16)  # other weights
    engine.sample(EULER, shape, cond={"y": null})
    assert engine.stats.captures == 2


def test_a_compiled_model_is_captured():
    net = Net().cuda()
    engine = Engine(torch.compile(net))
    for seed in (1, 2):
        found = engine.sample(EULER, SHAPE, seed=seed)
        torch.testing.assert_close(found, genengine.sample(net, EULER, SHAPE, seed=seed), rtol=1e-4, atol=1e-4)
    assert (engine.stats.captures, engine.stats.replays) == (1, 2)


def test_a_model_compiled_to_graphs_of_its_own_runs_uncaptured_and_is_refused_by_name():
    net = Net().cuda()
    compiled = torch.compile(net, mode="reduce-overhead")
    with pytest.raises(ValueError, match="compile it with mode='default'"):
        Engine(compiled, capture="loop").sample(EULER, SHAPE, device="cuda")
    engine = Engine(compiled)
    for seed in (1, 2, 3):
        found = engine.sample(EULER, SHAPE, seed=seed)
        torch.testing.assert_close(found, genengine.sample(net, EULER, SHAPE, seed=seed), rtol=1e-4, atol=1e-4)
    assert engine.stats.captures == 0


def test_a_replay_does_not_wait_for_the_host():
    engine = Engine(denoiser)
    table = solvers.ddpm(VP, GRID, prediction="eps")
    runs = [guided(seed) for seed in (1, 2)]
    expected = [engine.sample(table, SHAPE, device="cuda", **run) for run in runs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [engine.sample(table, SHAPE, device="cuda", **run) for run in runs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_streams_are_ordered_with_the_caller_s():
    engine, streams = Engine(Net(width=256).cuda()), [torch.cuda.Stream() for _ in range(2)]
    shape = (16, 3, 64, 64)
    x = [torch.randn(shape, device="cuda") for _ in range(6)]
    expected = [genengine.sample(engine.denoiser, EULER, x=start, capture="never") for start in x]
    torch.cuda.synchronize()
    found = []
    for index, start in enumerate(x):
        with torch.cuda.stream(streams[index % 2]):
            late = start.clone()
            torch.cuda._sleep(2_000_000)
            late.add_(1).sub_(1).copy_(start)  # what the run reads is written just before, on this stream
            found.append(engine.sample(EULER, x=late) * 1.0)
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert engine.stats.captures == 1


def test_the_bound_of_memory_counts_pools_and_evicts():
    net = Net(width=64).cuda()
    engine = Engine(net)
    engine.sample(EULER, (8, 3, 64, 64))
    one = engine.stats.bytes
    activations = 8 * 64 * 64 * 64 * 4
    assert one > activations  # the temporaries of a row lie in the graph's pool
    bounded = Engine(net, max_bytes=int(1.5 * one))
    for batch in (8, 7, 6, 8):
        bounded.sample(EULER, (batch, 3, 64, 64))
        assert bounded.stats.bytes <= 1.5 * one
    assert bounded.stats.evictions >= 2
    engine.clear()
    bounded.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for batch in (8, 7, 6):
        bounded.sample(EULER, (batch, 3, 64, 64))
        bounded.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + one // 2  # nothing is kept of what was evicted


def test_out_of_memory_gives_up_the_other_forms_and_leaves_the_engine_usable():
    net = Net(width=64).cuda()
    engine = Engine(net)
    small = engine.sample(EULER, (2, 3, 64, 64), seed=1)
    batch = int(3 * torch.cuda.get_device_properties(0).total_memory / (64 * 64 * 64 * 4))
    with pytest.raises(torch.OutOfMemoryError):
        engine.sample(EULER, (batch, 3, 64, 64))
    torch.cuda.empty_cache()
    torch.testing.assert_close(engine.sample(EULER, (2, 3, 64, 64), seed=1), small, rtol=1e-4, atol=1e-4)


def test_a_denoiser_that_reads_the_device_fails_and_leaves_the_engine_usable():
    bad = [True]

    def model(x, t):
        return x * float(t[0]) if bad[0] else denoiser(x, t)

    engine = Engine(model)
    with pytest.raises(RuntimeError, match="it must not read values back to the host"):
        engine.sample(EULER, SHAPE, device="cuda")
    bad[0] = False
    agree(engine, EULER, SHAPE)
    agree(engine, EULER, SHAPE, seed=1)
    assert engine.stats.captures == 1


def test_models_capture_once():
    model = FlowMatching.from_config({"net": {"name": "dit", "config": "tiny", "num_classes": 3}}).to("cuda").eval()
    first = [model.sample(4, seed=seed, steps=5, solver="euler", guidance=2.0) for seed in (1, 2)]
    again = [model.sample(4, seed=seed, steps=5, solver="euler", guidance=2.0) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (engine,) = model._engines.values()
    assert engine.stats.captures == 1
    assert model.sample(2, seed=1, steps=3, progress=True).isfinite().all()
