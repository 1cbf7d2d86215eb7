"""An engine's runs are `sample`'s bit for bit, and replayed where only values change; a stand-in takes CUDA's part."""

import functools

import pytest
import torch
from engine_support import FLOW, GRID, SHAPE, VP, agree, denoiser, guided

import genengine
from genengine import Engine, _loop, _request, extensions, paths, schedules, solvers
from genengine.nets.dit import DiT
from genengine.table import build_rows

pytestmark = pytest.mark.usefixtures("graphs")
EULER = solvers.euler(FLOW, GRID, prediction="velocity")


@pytest.mark.parametrize("capture", ["loop", "step"])
@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc"])
def test_replays_are_right_for_other_seeds_guidance_labels_and_tables(name, capture, graphs):
    engine = Engine(denoiser, capture=capture)
    for seed, guidance in ((1, 2.0), (2, torch.tensor([1.0, 2.0, 3.0])), (2**63 + 5, 0.5), (3, torch.zeros(3))):
        table = solvers.SOLVERS[name](VP, GRID, prediction="eps")
        agree(engine, table, SHAPE, seed=seed, guidance=guidance, **guided(seed % 7))
        agree(engine, table, SHAPE, seed=torch.tensor([seed % 9, 4, 5]), guidance=guidance, **guided(2))
    shifted = solvers.SOLVERS[name](paths.Cosine(), GRID**1.2, prediction="eps")
    agree(engine, shifted, SHAPE, guidance=1.5, sample_ids=torch.tensor([7, 1, 2**31]), **guided())
    assert len(graphs) == engine.stats.captures == 2  # with one guidance for all, and with one for each
    assert engine.stats.replays == engine.stats.runs == 9


# ---- what runs of one form share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["loop", "step"])
def test_a_state_given_its_layout_and_a_model_of_sixteen_bits(capture, graphs):
    engine, table = Engine(denoiser, capture=capture), solvers.heun(FLOW, GRID, prediction="velocity")
    for layout in (torch.contiguous_format, torch.channels_last):
        for _ in range(3):
            x = torch.randn(SHAPE).contiguous(memory_format=layout)
            agree(engine, table, x=x, model_dtype=torch.bfloat16, guidance=2.0, **guided())
    assert len(graphs) == 2
    agree(engine, table, x=torch.randn(SHAPE).bfloat16(), model_dtype=torch.bfloat16)
    assert len(graphs) == 3


def test_three_branches_and_a_learned_variance(graphs):
    y, engine = torch.ones(3), Engine(denoiser)
    for k in (1.0, 2.0):
        table = solvers.euler(FLOW, GRID, prediction="velocity").with_guidance(2.0 * k, 0.5)
        agree(engine, table, SHAPE, cond=[{"y": k * y}, {"y": 2 * y}], uncond={"y": 0 * y}, seed=int(k))
    learned = Engine(lambda x, t: torch.cat([denoiser(x, t), torch.sin(3 * x)], 1))
    for k in (1.0, 2.0):
        rows = build_rows(
            [{"t_model": t, "a": 0.9, "b": 0.2 * k, "s": 0.3, "l": v} for t, v in ((1.0, 0.7), (0.5, 0.1))]
        )
        agree(learned, genengine.CoefficientTable(rows), SHAPE, seed=int(k))
    assert len(graphs) == 2


def test_one_row_captured_serves_fewer_rows_and_callbacks(graphs):
    engine = Engine(denoiser, capture="step")
    for n in (7, 3, 5, 1, 7):
        agree(engine, solvers.dpmpp_2m(VP, schedules.uniform(n, t_max=0.99, t_min=0.01), prediction="eps"), SHAPE)
    assert len(graphs) == 2  # a table of one row writes no history
    engine, seen = Engine(denoiser), []
    table = EULER
    for k in (0.5, 0.7):
        halve = lambda info, k=k: seen.append((info.row, info.t)) or (k * info.x if info.row == 2 else None)  # noqa: E731
        agree(engine, table, SHAPE, seed=3, callback=halve)
        assert [row for row, _ in seen[:5]] == list(range(5)) and seen[0][1] == pytest.approx(0.99)
    assert len(graphs) == 3 and graphs[-1].replays == 10


def test_the_progress_bar_moves(capsys):
    Engine(denoiser).sample(solvers.euler(FLOW, GRID, prediction="velocity"), SHAPE, progress="digits")
    assert "digits" in capsys.readouterr().err


def test_where_the_host_takes_part_nothing_is_captured(graphs):
    engine, table = Engine(denoiser), solvers.ddpm(VP, GRID, prediction="eps")
    for _ in range(2):
        noise = torch.randn(table.num_rows, *SHAPE)
        agree(engine, table, SHAPE, noise=noise)
        agree(engine, table, SHAPE, noise=lambda row, noise=noise: noise[row])
        agree(engine, table, SHAPE, check_finite=True)
    agree(engine, table, (0, 2, 4, 4))
    assert not graphs and engine.stats.replays == 0 and engine.stats.runs == 7
    with pytest.raises(ValueError, match="capture='loop' leaves the host no part"):
        Engine(denoiser, capture="loop").sample(table, SHAPE, callback=lambda info: None)


def test_long_loops_are_one_row_replayed(graphs):
    agree(Engine(denoiser, max_loop_rows=4), solvers.euler(FLOW, GRID, prediction="velocity"), SHAPE)
    assert graphs[0].replays == 5


def test_nested_tensors_and_values_in_cond(graphs):
    def model(x, t, added, gain):
        return denoiser(x, t, added["y"].mean() * t, gain) * added["scale"][0]

    engine, table = Engine(model), EULER
    for gain in (0.1, 0.2):
        for _ in range(2):
            added = {"y": torch.rand(4), "scale": [torch.rand(())]}
            agree(engine, table, SHAPE, cond={"added": added, "gain": gain})
    assert len(graphs) == 2


def test_one_tensor_under_two_names_and_two_tensors(graphs):
    engine = Engine(lambda x, t, y, z: denoiser(x, t, y) + 0.1 * denoiser(x, t, z))
    y, z = torch.rand(6), torch.rand(3)
    for cond in ({"y": z, "z": z}, {"y": z, "z": y[:3]}, {"y": y[:3], "z": y[3:]}, {"y": y[3:], "z": y[:3]}):
        agree(engine, EULER, SHAPE, cond=cond)
        agree(engine, EULER, SHAPE, cond={name: value + 1 for name, value in cond.items()})
        agree(engine, EULER, SHAPE, cond=cond)
    assert len(graphs) == 4


def test_what_is_returned_stays_as_it_is():
    engine, table = Engine(denoiser), EULER
    first = engine.sample(table, SHAPE, seed=1)
    kept, x = first.clone(), torch.randn(SHAPE)
    before = x.clone()
    engine.sample(table, SHAPE, seed=2)
    engine.sample(table, x=x)
    assert torch.equal(first, kept) and torch.equal(x, before)
    assert not first.is_inference() and not first.requires_grad
    with torch.inference_mode():
        inside = engine.sample(table, SHAPE, seed=1)
    assert torch.equal(inside, kept) and torch.equal(engine.sample(table, SHAPE, seed=1), kept)


def test_what_the_caller_passed_is_never_written_to():
    y, ids, seeds, known = torch.rand(3), torch.arange(3), torch.arange(3), torch.rand(SHAPE)
    mask = torch.ones(4, 4)
    given, engine = [y, ids, seeds, known, mask], Engine(denoiser)
    before, table = [tensor.clone() for tensor in given], solvers.ddpm(VP, GRID, prediction="eps")
    inpaint = extensions.Inpaint(mask, known, VP)
    engine.sample(table, SHAPE, cond={"y": y}, sample_ids=ids, seed=seeds, extensions=(inpaint,))
    other = extensions.Inpaint(0 * mask, known + 1, VP)
    engine.sample(table, SHAPE, cond={"y": y + 1}, sample_ids=ids + 1, seed=seeds + 1, extensions=(other,))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# ---- what is captured anew -----------------------------------------------------------------------------------------


def test_another_form_is_captured_beside_the_first(graphs):
    engine, euler = Engine(denoiser), EULER
    runs = [
        lambda: agree(engine, euler, SHAPE),
        lambda: agree(engine, euler, (2, 2, 4, 4)),
        lambda: agree(engine, solvers.euler(FLOW, GRID[1:], prediction="velocity"), SHAPE),
        lambda: agree(engine, solvers.ddpm(VP, GRID, prediction="eps"), SHAPE),
        lambda: agree(engine, euler, SHAPE, cond={"y": torch.rand(3)}),
        lambda: agree(engine, euler, SHAPE, cond={"y": torch.rand(3).double()}),
        lambda: agree(engine, euler, SHAPE, model_dtype=torch.float16),
    ]
    for run in runs * 2:
        run()
    assert len(graphs) == engine.stats.graphs == len(runs) and all(graph.replays == 2 for graph in graphs)
    with genengine.backend("reference"):
        runs[0]()
    with torch.autocast("cpu", torch.bfloat16):
        runs[0]()
    assert len(graphs) == len(runs) + 2


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, y=None):
        return torch.tanh(self.mix(x)) + (0.1 if self.training else 0.2) * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: lambda x, t: net(x, t), lambda net: net.forward], ids="nfm"
)
def test_weights_are_read_where_they_lie(wrap, graphs):
    net, table = Net(), EULER
    engine = Engine(wrap(net))
    agree(engine, table, SHAPE)
    with torch.no_grad():
        net.mix.weight.mul_(2)
    agree(engine, table, SHAPE)
    assert len(graphs) == 1
    net.mix.weight = torch.nn.Parameter(torch.randn(2, 2, 3, 3))
    agree(engine, table, SHAPE)
    assert len(graphs) == 2 and graphs[0].calls is None  # the first is of no use any more
    net.eval()
    agree(engine, table, SHAPE)
    assert len(graphs) == 3 and engine.stats.graphs == 2


def test_a_row_captured_of_a_shorter_run_does_not_serve_a_longer_one(graphs):
    net = Net()
    engine = Engine(net, capture="step")
    for n in (7, 5, 7):
        agree(engine, solvers.euler(FLOW, schedules.uniform(n), prediction="velocity"), SHAPE)
        if n == 7:
            net.mix.weight = torch.nn.Parameter(torch.randn(2, 2, 3, 3))
    assert len(graphs) == 3


def test_modules_are_found_in_what_a_function_encloses(graphs):
    net = Net().eval()
    holder, bound = {"nets": [net]}, functools.partial(lambda net, x, t: net(x, t), net)
    for model in (lambda x, t: holder["nets"][0](x, t), bound, lambda x, t: bound(x, t)):
        engine = Engine(model)
        agree(engine, EULER, SHAPE)
        net.mix = torch.nn.Conv2d(2, 2, 3, padding=1)
        agree(engine, EULER, SHAPE)
        assert engine.stats.captures == 2


def test_tensors_that_a_function_encloses_are_read_where_they_lie(graphs):
    held, gain = [torch.rand(SHAPE)], torch.rand(())
    held.append(held)
    data = [held] * 1000  # not looked through

    def model(x, t):
        return denoiser(x, t) + held[0] * gain * len(data)

    engine = Engine(model)
    agree(engine, EULER, SHAPE)
    held[0].mul_(2)
    agree(engine, EULER, SHAPE)
    assert len(graphs) == 1
    held[0] = torch.rand(SHAPE)
    agree(engine, EULER, SHAPE)
    gain = torch.rand(())
    agree(engine, EULER, SHAPE)
    assert len(graphs) == 3


def test_a_compiled_model_is_captured_and_its_own_graphs_are_not(graphs):
    table = EULER
    engine = Engine(torch.compile(Net(), backend="eager"))
    agree(engine, table, SHAPE, seed=1)
    agree(engine, table, SHAPE, seed=2)
    assert len(graphs) == 1
    overhead = torch.compile(Net(), mode="reduce-overhead")
    for model in (overhead, lambda x, t: overhead(x, t)):
        for capture in ("loop", "step"):
            with pytest.raises(
                ValueError, match="compiled to CUDA graphs of its own .* compile it with mode='default'"
            ):
                genengine.sample(model, table, SHAPE, capture=capture)
            with pytest.raises(ValueError, match="which do not nest"):
                Engine(model, capture=capture).sample(table, SHAPE)
    request = _request.resolve(
        overhead, table, SHAPE, x=None, cond=None, uncond=None, guidance=None, seed=0, sample_ids=None, noise=None,
        device=None, model_dtype=None, check_finite=False, extensions=(),
    )  # fmt: skip
    assert _loop.choose_mode(request, "auto", watched=False, auto="loop") == "never"


# ---- models prepared for the schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["auto", "step"])
@pytest.mark.parametrize("limit", [2 << 30, 0], ids=["table", "product per step"])
def test_a_network_s_schedule_is_refreshed_before_the_replay(limit, capture, graphs):
    net = DiT.from_config("tiny", depth=1, dim=32).eval()
    net.max_table_bytes = limit
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    engine, null = Engine(net, capture=capture), torch.full((4,), 10)
    table = solvers.euler(FLOW, schedules.uniform(4), prediction="velocity")
    for labels in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 9], [4, 3, 2, 1]):
        for other in (table, solvers.euler(FLOW, schedules.uniform(4) ** 1.5, prediction="velocity")):
            branches = {"cond": {"y": torch.tensor(labels)}, "uncond": {"y": null}, "guidance": 2.0}
            agree(engine, other, (4, 1, 8, 8), seed=labels[0], **branches)
        with torch.no_grad():
            net.modulation.weight.mul_(0.9)
    assert len(graphs) == 1


def test_a_schedule_that_grows_is_captured_anew(graphs):
    net = DiT.from_config("tiny", depth=1, dim=32).eval()
    engine, table = Engine(net), solvers.euler(FLOW, schedules.uniform(4), prediction="velocity")
    for labels in ([1, 1, 1, 1], [1, 2, 3, 4], [5, 6, 7, 8], [2, 2, 2, 2]):
        agree(engine, table, (4, 1, 8, 8), cond={"y": torch.tensor(labels)})
    assert len(graphs) == 2 and graphs[1].replays == 3 and engine.stats.graphs == 1


def test_a_step_function_without_update_is_captured_for_every_run(graphs):
    class Scheduled:
        calls = 0

        def for_schedule(self, t_rows, y):
            self.calls += 1
            t_rows, sample = t_rows.clone(), torch.arange(t_rows.shape[1])
            return lambda x, row: denoiser(x, t_rows[row.long(), sample], y=y)

        def __call__(self, x, t, y):
            raise AssertionError("for_schedule goes before")

    model, table = Scheduled(), solvers.heun(FLOW, GRID, prediction="velocity")
    engine = Engine(model)
    for seed in (1, 2):
        found = engine.sample(table, SHAPE, seed=seed, guidance=2.0, **guided(seed))
        assert torch.equal(
            found, genengine.sample(denoiser, table, SHAPE, seed=seed, guidance=2.0, capture="never", **guided(seed))
        )
    assert model.calls == len(graphs) == 2 and graphs[0].replays == table.num_rows  # rows one by one
    assert graphs[0].calls is None and engine.stats.graphs == 1
