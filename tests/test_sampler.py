"""The loop: equal to a loop written by hand, whatever the batch split, guidance, noise or callback."""

import pytest
import torch

import genengine
from genengine import paths, schedules, solvers
from genengine.ops import normal
from genengine.table import build_rows

FLOW = paths.RectifiedFlow()
GRID = schedules.uniform(6)
SHAPE = (3, 2, 4, 4)


def denoiser(x, t, y=None, gain=0.3):
    """A model whose output depends on everything it is given."""
    column = lambda v: v.reshape(-1, 1, 1, 1).to(x.dtype)  # noqa: E731
    y = torch.zeros_like(t) if y is None else y
    return torch.tanh(gain * x + column(t) + 0.1 * column(y))


def euler_by_hand(x, cond, uncond, guidance):
    for t, t_next in zip(GRID[:-1], GRID[1:], strict=True):
        times = torch.full((x.shape[0],), t, dtype=torch.float32)
        m = denoiser(x, times, **uncond)
        m = m + guidance * (denoiser(x, times, **cond) - m)
        x = x + (t_next - t) * m
    return x


@pytest.mark.parametrize("backend", [None, "reference"])
def test_equals_a_loop_by_hand_with_guidance(backend):
    cond, uncond = {"y": torch.tensor([1.0, 2.0, 3.0])}, {"y": torch.zeros(3)}
    table = solvers.euler(FLOW, GRID, prediction="velocity")
    with genengine.backend(backend):
        got = genengine.sample(denoiser, table, SHAPE, cond=cond, uncond=uncond, guidance=2.5, seed=7)
    expected = euler_by_hand(normal(SHAPE, seed=7), cond, uncond, 2.5)
    assert (got - expected).abs().max() < 2e-6


def test_returns_an_ordinary_tensor():
    x = genengine.sample(denoiser, solvers.euler(FLOW, GRID, prediction="velocity"), SHAPE)
    assert not x.is_inference() and not x.requires_grad
    (x * torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpmpp_2m", "ddpm", "euler_ancestral"])
def test_a_sample_does_not_depend_on_its_batch(name):
    """Bit for bit, on the samplers' part: the model here is elementwise."""
    table = solvers.SOLVERS[name](paths.VPLinear(), schedules.uniform(5, t_max=0.99, t_min=0.01), prediction="eps")
    y = torch.tensor([1.0, 2.0, 3.0])
    run = lambda ids: genengine.sample(  # noqa: E731
        denoiser, table, (len(ids), 2, 5, 5), cond={"y": y[ids]}, uncond={"y": 0 * y[ids]}, guidance=1.5, seed=3,
        sample_ids=torch.tensor(ids),
    )  # fmt: skip
    whole = run([0, 1, 2])
    assert whole.isfinite().all()
    assert torch.equal(torch.cat([run([0]), run([1, 2])]), whole)


def test_guidance_seed_and_solver_per_sample():
    cond, uncond = {"y": torch.tensor([1.0, 2.0])}, {"y": torch.zeros(2)}
    grid = schedules.uniform(5, t_max=0.99, t_min=0.01)
    arguments = (paths.VPLinear(), grid)
    tables = [solvers.ddim(*arguments, prediction="eps"), solvers.ddpm(*arguments, prediction="eps")]
    both = genengine.CoefficientTable.stack(tables)
    shape, seeds = (2, 2, 4, 4), torch.tensor([5, 6])
    got = genengine.sample(
        denoiser, both, shape, cond=cond, uncond=uncond, guidance=torch.tensor([1.0, 3.0]), seed=seeds
    )
    for b, (table, guidance) in enumerate(zip(tables, (1.0, 3.0), strict=True)):
        pick = lambda branch, b=b: {"y": branch["y"][b : b + 1]}  # noqa: E731
        alone = genengine.sample(
            denoiser, table, (1, 2, 4, 4), cond=pick(cond), uncond=pick(uncond), guidance=guidance, seed=int(seeds[b]),
            sample_ids=torch.tensor([b]),
        )  # fmt: skip
        assert torch.equal(got[b : b + 1], alone)


def test_noise_given_equals_noise_drawn():
    table = solvers.ddpm(paths.VPLinear(), schedules.uniform(5, t_max=0.99, t_min=0.01), prediction="eps")
    noise = torch.stack([normal(SHAPE, seed=11, step=row, stream="step") for row in range(table.num_rows)])
    drawn = genengine.sample(denoiser, table, SHAPE, seed=11)
    assert torch.equal(genengine.sample(denoiser, table, SHAPE, seed=11, noise=noise), drawn)
    assert torch.equal(genengine.sample(denoiser, table, SHAPE, seed=11, noise=lambda row: noise[row]), drawn)


def test_start_from_x_keeps_it_and_its_layout():
    table = solvers.heun(FLOW, GRID, prediction="velocity")
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    got = genengine.sample(denoiser, table, x=x)
    assert torch.equal(x, before) and got.stride() == x.stride()
    assert torch.equal(got, genengine.sample(denoiser, table, x=x.contiguous()))


def test_three_branches():
    y = torch.ones(3)
    table = solvers.euler(FLOW, GRID, prediction="velocity").with_guidance(2.0, 0.5)
    got = genengine.sample(denoiser, table, SHAPE, cond=[{"y": y}, {"y": 2 * y}], uncond={"y": 0 * y}, seed=1)
    x = normal(SHAPE, seed=1)
    for t, t_next in zip(GRID[:-1], GRID[1:], strict=True):
        out = [denoiser(x, torch.full((3,), t, dtype=torch.float32), y=k * y) for k in range(3)]
        x = x + (t_next - t) * (out[0] + 2.0 * (out[1] - out[0]) + 0.5 * (out[2] - out[1]))
    assert (got - x).abs().max() < 2e-6


def test_sixteen_bit_model_with_a_float32_state():
    seen = []

    def model(x, t):
        seen.append(x.dtype)
        return denoiser(x, t)

    table = solvers.euler(FLOW, GRID, prediction="velocity")
    got = genengine.sample(model, table, SHAPE, seed=2, model_dtype=torch.bfloat16)
    assert got.dtype == torch.float32 and set(seen) == {torch.bfloat16}
    assert 0 < (got - genengine.sample(denoiser, table, SHAPE, seed=2)).abs().max() < 0.1


def test_callback_sees_every_row_and_may_replace_the_state():
    table = solvers.euler(FLOW, GRID, prediction="velocity")
    seen = []
    plain = genengine.sample(denoiser, table, SHAPE, seed=3, callback=lambda info: seen.append((info.row, info.t)))
    assert [row for row, _ in seen] == list(range(6))
    assert [t for _, t in seen] == pytest.approx(list(GRID[:-1]))
    assert torch.equal(plain, genengine.sample(denoiser, table, SHAPE, seed=3))

    half = genengine.sample(
        denoiser, table, SHAPE, seed=3, callback=lambda info: 0.5 * info.x if info.row == 2 else None
    )
    x = normal(SHAPE, seed=3)
    for row, (t, t_next) in enumerate(zip(GRID[:-1], GRID[1:], strict=True)):
        x = x + (t_next - t) * denoiser(x, torch.full((3,), t, dtype=torch.float32))
        x = 0.5 * x if row == 2 else x
    assert (half - x).abs().max() < 2e-6
    with pytest.raises(ValueError, match="callback's return value must be x's shape"):
        genengine.sample(denoiser, table, SHAPE, callback=lambda info: info.x[:1])


def test_progress_bar(capsys):
    genengine.sample(denoiser, solvers.euler(FLOW, GRID, prediction="velocity"), SHAPE, progress="digits")
    assert "digits" in capsys.readouterr().err
    genengine.sample(denoiser, solvers.euler(FLOW, GRID, prediction="velocity"), SHAPE)
    assert capsys.readouterr().err == ""


def test_for_schedule_is_called_once_with_all_times():
    class Scheduled:
        calls = 0

        def for_schedule(self, t_rows, y):
            self.calls += 1
            self.t_rows, sample = t_rows, torch.arange(t_rows.shape[1])
            return lambda x, row: denoiser(x, t_rows[row.long(), sample], y=y)

    table = solvers.heun(FLOW, GRID, prediction="velocity")
    conditions = {"cond": {"y": torch.ones(3)}, "uncond": {"y": torch.zeros(3)}, "guidance": 2.0, "seed": 4}
    scheduled = Scheduled()
    got = genengine.sample(scheduled, table, SHAPE, **conditions)
    assert scheduled.calls == 1 and scheduled.t_rows.shape == (table.num_rows, 6)
    assert torch.equal(got, genengine.sample(denoiser, table, SHAPE, **conditions))


def test_no_allocation_per_row_but_the_model_s():
    """The addresses that the model sees do not change from row to row."""
    addresses = set()

    def model(x, t):
        addresses.add((x.data_ptr(), t.data_ptr()))
        return denoiser(x, t)

    genengine.sample(model, solvers.dpmpp_2m(FLOW, GRID, prediction="velocity"), SHAPE)
    assert len(addresses) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_learned_variance_is_that_of_the_last_branch(layout):
    """Against a loop by hand: the mean guided, v the second half of the conditional branch's channels."""
    rows = build_rows(
        [{"t_model": t, "a": 0.9, "b": 0.2, "s": 0.3, "l": scale} for t, scale in ((1.0, 0.7), (0.5, 0.0))]
    )
    table = genengine.CoefficientTable(rows)

    def model(x, t, y):
        return torch.cat([denoiser(x, t, y), torch.sin(3 * x) + y.reshape(-1, 1, 1, 1)], 1)

    y, x = torch.tensor([1.0, 2.0, 3.0]), normal(SHAPE, seed=7).contiguous(memory_format=layout)
    branches = {"cond": {"y": y}, "uncond": {"y": 0 * y}, "guidance": 2.0}
    got = genengine.sample(model, table, x=x, seed=7, **branches)
    for row, (t, scale) in enumerate(((1.0, 0.7), (0.5, 0.0))):
        times = torch.full((3,), t)
        (u, _), (c, v) = (model(x, times, label).chunk(2, 1) for label in (0 * y, y))
        z = normal(SHAPE, seed=7, step=row, stream="step")
        x = 0.9 * x + 0.2 * (u + 2 * (c - u)) + 0.3 * torch.exp(scale * v) * z
    assert (got - x).abs().max() < 2e-6 and got.is_contiguous(memory_format=layout)


def test_learned_variance_needs_twice_the_channels():
    table = genengine.CoefficientTable(build_rows([{"a": 1.0, "s": 0.3, "l": 0.7}]))
    for channels in (2, 3):
        with pytest.raises(
            ValueError, match=f"must return twice the channels .* got \\(3, {channels}, 4, 4\\); or make"
        ):
            genengine.sample(lambda x, t, n=channels: x[:, :1].expand(-1, n, -1, -1), table, SHAPE)


def test_between_model_calls_stand_two_ops_and_nothing_else():
    """sampler_step and advance: no temporary, no copy, no host read."""
    log = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            log.append(func.name())
            return func(*args, **(kwargs or {}))

    output = torch.zeros(SHAPE)

    def model(x, t):
        log.append("model")
        return output

    table = solvers.dpmpp_2m_sde(paths.VPLinear(), schedules.uniform(5, t_max=0.99, t_min=0.01), prediction="eps")
    with Recorder():
        genengine.sample(model, table, SHAPE, seed=1)
    rows = "|".join(log[log.index("model") :]).split("model")[1:]
    between = {tuple(name for name in row.split("|") if name and "as_strided" not in name) for row in rows}
    assert len(rows) == table.num_rows
    assert between == {("genengine::sampler_step_out", "genengine::advance")}


def test_guidance_keeps_the_third_branch():
    y, table = torch.ones(3), solvers.euler(FLOW, GRID, prediction="velocity").with_guidance(2.0, 0.5)
    branches = {"cond": [{"y": y}, {"y": 2 * y}], "uncond": {"y": 0 * y}, "seed": 1}
    assert torch.equal(
        genengine.sample(denoiser, table, SHAPE, guidance=2.0, **branches),
        genengine.sample(denoiser, table, SHAPE, **branches),
    )


def test_a_view_of_the_input_as_output_is_not_overwritten_as_it_is_read():
    table = solvers.euler(FLOW, GRID, prediction="velocity")
    view = genengine.sample(lambda x, t: x[:1].expand_as(x), table, SHAPE, seed=2)
    copy = genengine.sample(lambda x, t: x[:1].expand_as(x).clone(), table, SHAPE, seed=2)
    assert torch.equal(view, copy)


def test_a_compiled_model_is_not_bypassed():
    class Net(torch.nn.Module):
        def forward(self, x, t):
            return denoiser(x, t)

        def for_schedule(self, t_rows):
            raise AssertionError("the module that was not compiled was used")

    compiled = torch.compile(Net(), backend="eager")
    genengine.sample(compiled, solvers.euler(FLOW, GRID, prediction="velocity"), SHAPE)


def test_check_finite_names_the_row():
    bad = lambda x, t: x if t[0] > 0.6 else x * float("nan")  # noqa: E731
    table = solvers.euler(FLOW, GRID, prediction="velocity")
    with pytest.raises(FloatingPointError, match="model output of row 3 of 6 \\(t = 0.5\\) is not finite"):
        genengine.sample(bad, table, SHAPE, check_finite=True)
    assert genengine.sample(bad, table, SHAPE).isnan().all()


def test_empty_batch():
    table, y = solvers.euler(FLOW, GRID, prediction="velocity"), torch.zeros(0)
    genengine.sample(denoiser, table, (0, 2, 4, 4), cond={"y": y}, uncond={"y": y}, guidance=torch.zeros(0))
    x = genengine.sample(denoiser, solvers.ddim(FLOW, GRID, prediction="velocity", eta=0.5), (0, 2, 4, 4))
    assert x.shape == (0, 2, 4, 4)


def wrong_shape(x, t):
    return torch.cat([x, x], dim=1)


Y = {"y": torch.zeros(3)}
BAD = [
    ({"noise": lambda row: torch.zeros(1, 2, 4, 4)}, ValueError, "noise must be \\(B, ...\\) = \\(3, 2, 4, 4\\)"),
    ({"noise": lambda row: None}, TypeError, "noise must be a tensor, got NoneType"),
    ({"shape": None, "x": torch.zeros(SHAPE), "device": "meta"}, ValueError, "x must be on device=meta, got cpu"),
    ({"shape": None, "x": torch.zeros(SHAPE).half()}, TypeError, "x must be float32 or of the model's dtype"),
    ({"shape": None, "x": torch.zeros(SHAPE), "seed": -1}, ValueError, "seed must be in"),
    ({"shape": None, "x": torch.zeros(SHAPE, requires_grad=True)}, RuntimeError, "sample: has no backward"),
    ({"shape": ()}, ValueError, "shape must be \\(B, ...\\), got \\(\\)"),
    ({"model_dtype": torch.float64}, TypeError, "model_dtype must be one of torch.float32"),
    ({"denoiser": lambda x, t: (x, t)}, TypeError, "denoiser must return a tensor, got tuple"),
    ({"denoiser": lambda x, t: x.long()}, TypeError, "denoiser returned torch.int64 .* convert it in a wrapper"),
    ({"callback": lambda info: True}, TypeError, "callback must return a tensor or None, got bool"),
    ({"table": None}, TypeError, "table must be a CoefficientTable, got NoneType"),
    ({"shape": None}, ValueError, "exactly one of shape and x must be given, got neither"),
    ({"x": torch.zeros(SHAPE)}, ValueError, "exactly one of shape and x must be given, got both"),
    ({"seed": -1}, ValueError, "seed must be in \\[0, 2\\*\\*64\\), got -1"),
    ({"guidance": 2.0}, ValueError, "guidance needs uncond beside cond"),
    ({"cond": Y, "uncond": {"z": Y["y"]}}, ValueError, "same keys, got \\['y'\\] and \\['z'\\]"),
    ({"cond": {"y": torch.zeros(2)}, "uncond": Y}, ValueError, "must be a tensor \\(B, ...\\) with B = 3"),
    ({"cond": {"gain": 1.0}, "uncond": {"gain": 2.0}}, ValueError, "must be equal in cond and uncond"),
    ({"cond": [Y, Y]}, ValueError, "two cond dicts need uncond"),
    ({"capture": "always"}, ValueError, "capture must be one of auto, loop, step, never"),
    ({"sample_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "sample_ids must be \\(B,\\) = \\(3,\\)"),
    ({"noise": torch.zeros(2, *SHAPE)}, ValueError, "noise must be \\(R, B, ...\\) = \\(6, 3, 2, 4, 4\\)"),
    (
        {"denoiser": wrong_shape},
        ValueError,
        "denoiser must return \\(3, 2, 4, 4\\) like its input, got \\(3, 4, 4, 4\\)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    good = {"denoiser": denoiser, "table": solvers.euler(FLOW, GRID, prediction="velocity"), "shape": SHAPE}
    with pytest.raises(error, match=message):
        genengine.sample(**(good | change))


def test_a_guidance_scale_without_a_second_branch_is_an_error():
    table = solvers.euler(FLOW, GRID, prediction="velocity", guidance_scale=3.0)
    with pytest.raises(ValueError, match="the table has a guidance scale, but there is one branch"):
        genengine.sample(denoiser, table, SHAPE, cond=Y)


def test_a_wider_output_than_the_model_dtype_is_an_error():
    table = solvers.euler(FLOW, GRID, prediction="velocity")
    with pytest.raises(TypeError, match="pass model_dtype=torch.float32"):
        genengine.sample(lambda x, t: x.float(), table, SHAPE, model_dtype=torch.bfloat16)
