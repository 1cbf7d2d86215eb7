"""sampler_step, advance: every backend follows the reference bit for bit, the reference follows NumPy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, skip_unless_available
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from genengine import random, testing
from genengine.ops import EXTENSION, _registry, _verify, advance, sampler_step
from genengine.table import COLUMNS
from genengine.testing.sampler_step import random_table

NAMESPACES = ["genengine", "genengine_triton", "genengine_reference"]
COLUMN = {name: index for index, name in enumerate(COLUMNS)}


def row_table(**columns):
    """A table of one row shared by the batch."""
    table = torch.zeros(1, 1, 16)
    for name, value in columns.items():
        table[..., COLUMN[name]] = value
    return table


def steps(batch, value=0):
    return torch.full((batch,), value, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    """Dtypes and mixes, one to three branches, all registers, clamps, rows per sample, both layouts, bit for bit."""
    device = skip_unless_available("sampler_step_out", backend)
    for name in ("sampler_step_out", "advance"):
        assert testing.cases(name, device)
        assert _verify.run(_registry.OPS[name], backend, device) == []


def numpy_row(x, outputs, row, history, z):
    """The row in float64, written out once more, independently of torch."""
    c = dict(zip(COLUMNS, row, strict=True))
    m = outputs[0]
    if len(outputs) > 1:
        m = m + c["g1"] * (outputs[1] - outputs[0])
    if len(outputs) > 2:
        m = m + c["g2"] * (outputs[2] - outputs[1])
    y = c["p"] * x + c["q"] * m
    phi = int(c["flags"]) % 4
    if phi:
        y = np.clip(y, -c["r"], c["r"])
    if phi == 2:
        y = y / c["r"]
    value = c["a"] * x + c["b"] * m + c["c"] * y + c["s"] * z
    for j, register in enumerate(history):
        value = value + c[f"h{j + 1}"] * register
    written = [(register, y, x)[int(c["flags"]) // 4 ** (j + 1) % 4] for j, register in enumerate(history)]
    return value, written, c["c_in"] * value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trial", range(6))
def test_against_numpy_in_float64(backend, trial):
    device = skip_unless_available("sampler_step_out", backend)
    generator = torch.Generator().manual_seed(trial)
    branches, registers, shape = 1 + trial % 3, trial % 4, (2, 3, 5, 7)
    table = random_table(generator, 2, 2, branches, registers)
    x, z, *outputs = (torch.randn(shape, generator=generator) for _ in range(2 + branches))
    history = torch.randn(max(registers, 1), *shape, generator=generator)
    step = torch.tensor([1, 0], dtype=torch.int32)
    to = lambda tensor: tensor.to(device)  # noqa: E731
    new_history, x_in = to(history).clone(), torch.zeros(4, *shape[1:], device=device)
    got = sampler_step(
        to(x), [to(o) for o in outputs], to(table), to(step), new_history, noise=to(z), x_in=x_in, backend=backend
    )
    for b in range(2):
        row = table[step[b], b].double().numpy()
        wide = [o[b].double().numpy() for o in outputs]
        registers_in = [h[b].double().numpy() for h in history][:registers]
        value, written, model_input = numpy_row(x[b].double().numpy(), wide, row, registers_in, z[b].double().numpy())
        bound = 1e-5 * max(1.0, np.abs(value).max())
        assert np.abs(got[b].cpu().numpy() - value).max() < bound
        for j, expected in enumerate(written):
            assert np.abs(new_history[j, b].cpu().numpy() - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
        for copy in x_in.unflatten(0, (2, 2))[:, b]:
            assert np.abs(copy.cpu().numpy() - model_input).max() < bound * max(1.0, abs(row[COLUMN["c_in"]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_branches_stacked_in_one_tensor(backend, branches):
    device = skip_unless_available("sampler_step_out", backend)
    x, stacked = torch.randn(2, 3, 5, device=device), torch.randn(branches * 2, 3, 5, device=device)
    table = row_table(a=0.5, b=1.0, g1=2.0, g2=-1.0).to(device)
    run = lambda outputs: sampler_step(x, outputs, table, steps(2).to(device), backend=backend)  # noqa: E731
    assert torch.equal(run(stacked), run(stacked.split(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_that_of_the_specification(backend):
    device = skip_unless_available("sampler_step_out", backend)
    table, ids = row_table(s=1.0).repeat(4, 1, 1).to(device), torch.tensor([3, 2**32 - 1], device=device)
    x = torch.zeros(2, 3, 5, 5, device=device)
    step = torch.tensor([2, 0], dtype=torch.int32, device=device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        got = sampler_step(x, x, table, step, seed=2**64 - 1, sample_ids=ids, backend=backend)
        for b, (sample, row) in enumerate(((3, 2), (2**32 - 1, 0))):
            expected = random.normal(75, seed=2**64 - 1, sample=sample, step=row, stream="step").reshape(3, 5, 5)
            assert torch.equal(got[b].cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_learned_variance_against_float64(backend, dtype, given):
    """x' = a x + b m + s exp(l v) z, with mean and v as halves of the channels of two stacked branches."""
    device = skip_unless_available("sampler_step_out", backend)
    x, both = torch.randn(3, 2, 5, 7), torch.randn(6, 4, 5, 7).to(dtype)
    tables = [row_table(a=0.9, b=0.2, g1=2.0, s=0.7, l=scale) for scale in (1.5, 0.0, -0.8)]
    table, z = torch.cat(tables, 1).to(device), random_noise(x.shape, seed=5)
    run = lambda both: sampler_step(  # noqa: E731
        x.to(device), both[:, :2], table, steps(3).to(device), variance=both[3:, 2:], backend=backend,
        **({"noise": z.to(device)} if given else {"seed": 5}),
    ).cpu()  # fmt: skip
    u, c = both[:, :2].double().chunk(2)
    spread = 0.7 * torch.exp(torch.tensor([1.5, 0.0, -0.8], dtype=torch.float64).reshape(3, 1, 1, 1) * both[3:, 2:])
    exact = 0.9 * x.double() + 0.2 * (u + 2 * (c - u)) + spread * z.double()
    assert (run(both.to(device)) - exact).abs().max() < 4e-7 * exact.abs().max()
    channels_last = both.to(device).contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(channels_last), run(both.to(device)))


def random_noise(shape, seed):
    """The noise of row 0, from the specification."""
    draws = [
        random.normal(int(np.prod(shape[1:])), seed=seed, sample=b, step=0, stream="step") for b in range(shape[0])
    ]
    return torch.from_numpy(np.stack(draws)).reshape(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_exponential_errs_by_less_than_two_units_in_the_last_place(backend):
    """On all of [-80, 80]; beyond -87 and 88 it stays as there."""
    device = skip_unless_available("sampler_step_out", backend)
    v = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([-1e4, 1e4])])[None].to(device)
    one, table = torch.ones_like(v), row_table(s=1.0, l=1.0).to(device)
    got = sampler_step(0 * v, one, table, steps(1).to(device), noise=one, variance=v, backend=backend).double()
    exact = v.double().clamp(-87, 88).exp()
    ulp = 2.0 ** (exact.log2().floor() - 23)
    assert ((got - exact).abs() / ulp).max() < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_l_or_without_noise_reads_no_variance(backend):
    device = skip_unless_available("sampler_step_out", backend)
    x, nan = torch.randn(2, 9, device=device), torch.full((2, 9), float("nan"), device=device)
    for columns in ({"s": 0.5}, {"l": 3.0}):
        table, step = row_table(a=1.0, **columns).to(device), steps(2).to(device)
        got = sampler_step(x, x, table, step, seed=1, variance=nan, backend=backend)
        assert torch.equal(got, sampler_step(x, x, table, step, seed=1, backend=backend))
    both = row_table(a=1.0, s=0.5, l=3.0).to(device)
    assert sampler_step(x, x, both, step, seed=1, variance=nan, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_coefficients_let_no_nan_through(backend):
    """Uninitialised history, an unused branch and an unused state are skipped, not multiplied by 0."""
    device = skip_unless_available("sampler_step_out", backend)
    good, nan = torch.randn(2, 9, device=device), torch.full((2, 9), float("nan"), device=device)
    run = lambda x, outputs, table, history=None: sampler_step(  # noqa: E731
        x, outputs, table.to(device), steps(2).to(device), history, noise=nan, backend=backend
    )
    history = nan.expand(3, 2, 9).clone()
    assert torch.equal(run(good, [good, nan, nan], row_table(a=1.0, b=1.0), history), good + good)
    assert torch.equal(run(nan, [good], row_table(b=2.0)), 2 * good)
    assert torch.equal(run(good, [nan], row_table(a=2.0)), 2 * good)
    stored = row_table(b=1.0, p=1.0, flags=8.0)  # H1 <- x, while x itself has coefficient 0
    history = nan.expand(1, 2, 9).clone()
    assert torch.equal(run(good, [good], stored, history), good) and torch.equal(history[0], good)
    assert run(good, [nan], row_table(a=1.0, b=1.0)).isnan().all()
    clamped = row_table(c=1.0, q=1.0, r=1.0, flags=1.0)
    assert run(good, [nan], clamped).isnan().all(), "a clamp keeps NaN"


@pytest.mark.parametrize("backend", BACKENDS)
def test_finished_samples_are_left_alone(backend):
    device = skip_unless_available("sampler_step_out", backend)
    x, history = torch.randn(2, 7, device=device), torch.randn(1, 2, 7, device=device)
    table = row_table(a=0.5, c_in=1.0, flags=8.0).to(device)
    x_in, before = torch.full((4, 7), 3.0, device=device), history.clone()
    step = torch.tensor([1, 0], dtype=torch.int32, device=device)
    out = sampler_step(x, x, table, step, history, x_in=x_in, backend=backend)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1], 0.5 * x[1])
    assert torch.equal(history[0, 0], before[0, 0]) and torch.equal(history[0, 1], x[1])
    assert (x_in[[0, 2]] == 3).all() and torch.equal(x_in[1], out[1]) and torch.equal(x_in[3], out[1])


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set_has_the_same_bits(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        assert _verify.run(_registry.OPS["sampler_step_out"], "cpu", torch.device("cpu")) == []


def test_large_outputs_take_the_streaming_path_with_the_same_bits():
    x, u, c = (torch.randn(2, 3, 1201, 1201) for _ in range(3))  # past the size at which stores bypass the caches
    table = row_table(a=1.0, b=-0.1, g1=2.0, c_in=0.5)
    x_in = torch.empty(4, 3, 1201, 1201)
    got = sampler_step(x, [u, c], table, steps(2), x_in=x_in)
    expected = x * 1.0 + -0.1 * (u + 2.0 * (c - u))
    assert torch.equal(got, sampler_step(x, [u, c], table, steps(2), backend="reference"))
    assert (got - expected).abs().max() < 1e-5 and torch.equal(x_in, (0.5 * got).repeat(2, 1, 1, 1))


def test_in_place_and_thread_count():
    x, u, c = (torch.randn(3, 2, 130, 131) for _ in range(3))
    table = row_table(a=0.9, b=-0.1, g1=2.0, s=0.3)
    expected = sampler_step(x, [u, c], table, steps(3), seed=1)
    torch.set_num_threads(2)
    try:
        state = x.clone()
        assert sampler_step(state, [u, c], table, steps(3), seed=1, out=state) is state
    finally:
        torch.set_num_threads(1)
    assert torch.equal(state, expected)


def test_views_and_odd_layouts_equal_contiguous_inputs():
    both = torch.randn(4, 8, 6, 6)  # a model that returns 8 channels for 2 branches: views with a larger batch stride
    x, (u, c) = torch.randn(2, 4, 6, 6), both[:, :4].chunk(2)
    table = row_table(a=1.0, b=0.5, g1=3.0)
    expected = sampler_step(x, [u.contiguous(), c.contiguous()], table, steps(2))
    assert torch.equal(sampler_step(x, [u, c], table, steps(2)), expected)
    permuted = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(sampler_step(permuted, [u, c], table, steps(2)), expected)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(sampler_step(transposed, [u, c], table, steps(2)), expected)
    shifted = torch.randn(1 + x.numel())[1:].view(x.shape).copy_(x)  # not aligned to 16 bytes
    assert torch.equal(sampler_step(shifted, [u, c], table, steps(2)), expected)


@pytest.mark.fuzz
@given(
    batch=st.integers(0, 3),
    inner=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    branches=st.integers(1, 3),
    registers=st.integers(0, 3),
    noise=st.sampled_from(["none", "drawn", "given"]),
    learned=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(batch, inner, branches, registers, noise, learned, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *inner)
    x, z, *outputs = (torch.randn(shape, generator=generator) for _ in range(2 + branches))
    table = random_table(generator, 3, max(batch, 1), branches, registers)
    step = torch.randint(0, 4, (batch,), generator=generator, dtype=torch.int32)
    draw = {"none": {}, "drawn": {"seed": seed}, "given": {"noise": z}}[noise]
    draw["variance"] = torch.randn(shape, generator=generator) if learned else None
    results = []
    for backend in ("cpu", "reference"):
        skip_unless_available("sampler_step_out", backend)
        history = torch.ones(registers, *shape) if registers else None
        x_in = torch.zeros(2 * batch, *inner) if batch else None
        out = sampler_step(x, outputs, table, step, history, x_in=x_in, backend=backend, **draw)
        results.append([t for t in (out, history, x_in) if t is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _opcheck_arguments(shape=(2, 3, 4, 4), memory_format=torch.contiguous_format, registers=1, branches=2):
    fresh = lambda batch: torch.randn(batch, *shape[1:]).contiguous(memory_format=memory_format)  # noqa: E731
    history = fresh(registers * shape[0]).unflatten(0, (registers, shape[0])) if registers else None
    return (
        fresh(shape[0]), [fresh(shape[0]) for _ in range(branches)], row_table(a=1.0, b=1.0, s=0.5, g1=2.0),
        steps(shape[0]), history, torch.tensor(3), None, None, fresh(shape[0]), fresh(shape[0]), fresh(2 * shape[0]),
    )  # fmt: skip


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branches": 3, "registers": 0},
        {"memory_format": torch.channels_last},
        {"shape": (0, 3, 4, 4), "registers": 0},
    ],
    ids=["plain", "three branches", "channels_last", "empty"],
)
def test_opcheck(namespace, options):
    opcheck(getattr(torch.ops, namespace).sampler_step_out.default, _opcheck_arguments(**options))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_opcheck_advance(namespace):
    opcheck(getattr(torch.ops, namespace).advance.default, (steps(2), row_table(a=1.0), torch.zeros(4)))


def test_fullgraph_compile_once_for_all_rows():
    """The table is a tensor and the step lives on the device: twenty rows, two compilations at the most."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def loop_body(x, output, table, step, t):
        state = sampler_step(x, output, table, step, seed=3)
        advance(step, table, t)
        return state

    compiled = torch.compile(loop_body, fullgraph=True, backend=counter)
    table = random_table(torch.Generator().manual_seed(0), 20, 1, 1, 0)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    eager_step, step = steps(2), steps(2)
    with torch.no_grad():
        for _ in range(20):
            expected = loop_body(x, output, table, eager_step, torch.zeros(2))
            assert torch.equal(compiled(x, output, table, step, torch.zeros(2)), expected)
    assert counter.frame_count <= 2 and torch.equal(step, eager_step)


def test_no_silent_zero_gradient():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="sampler_step: has no backward"):
        sampler_step(x, x, row_table(a=1.0), steps(2))
    with torch.no_grad():
        assert not sampler_step(x, x, row_table(a=1.0), steps(2)).requires_grad


def test_a_named_backend_does_not_fall_back():
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="sampler_step: backend 'cuda' cannot run here: it runs on cuda tensors"):
        sampler_step(x, x, row_table(a=1.0), steps(2), backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: its kernels take torch.float32"):
        sampler_step(x.double(), x.double(), row_table(a=1.0), steps(2), backend="cpu")


X = torch.zeros(2, 3, 4, 4)
BAD = [
    ({"x": X.long()}, TypeError, "x must have dtype torch.float32, torch.float16, torch.bfloat16, torch.float64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must be \\(B, ...\\)"),
    ({"outputs": []}, ValueError, "outputs must hold 1 to 3 tensors, got 0"),
    ({"outputs": [X] * 4}, ValueError, "outputs must hold 1 to 3 tensors, got 4"),
    ({"outputs": torch.zeros(8, 3, 4, 4)}, ValueError, "outputs\\[0\\] must be x's shape"),
    ({"outputs": [X[:1]]}, ValueError, "outputs\\[0\\] must be x's shape = \\(2, 3, 4, 4\\), got \\(1, 3, 4, 4\\)"),
    ({"outputs": [X.double()]}, TypeError, "outputs must have x's dtype torch.float32"),
    ({"outputs": [X, X.half()]}, TypeError, "outputs must share one dtype"),
    ({"outputs": [X.to("meta")]}, ValueError, "outputs\\[0\\] must be on cpu like x, got meta"),
    ({"table": torch.zeros(1, 1, 15)}, ValueError, "table must be \\(R, B or 1, 16\\) with R >= 1, got \\(1, 1, 15\\)"),
    ({"table": torch.zeros(0, 1, 16)}, ValueError, "table must be"),
    ({"table": torch.zeros(1, 3, 16)}, ValueError, "with B = 2, got \\(1, 3, 16\\)"),
    (
        {"x": torch.zeros(4, 3), "outputs": [torch.zeros(4, 3)], "step": steps(4), "table": torch.zeros(1, 2, 16)},
        ValueError,
        "with B = 4, got \\(1, 2, 16\\)",
    ),  # fmt: skip
    ({"table": torch.zeros(1, 1, 16).half()}, TypeError, "table must have dtype"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, TypeError, "step must have dtype torch.int32"),
    ({"step": steps(3)}, ValueError, "step must be \\(B,\\) = \\(2,\\), got \\(3,\\)"),
    ({"history": X}, ValueError, "history must be \\(K, 2, 3, 4, 4\\)"),
    ({"history": X.expand(4, *X.shape)}, ValueError, "1 <= K <= 3"),
    ({"seed": 1, "noise": X}, ValueError, "seed and noise exclude each other"),
    ({"seed": -1}, ValueError, "seed must be in"),
    ({"noise": X[:1]}, ValueError, "noise must be x's shape"),
    ({"variance": X[:, :1]}, ValueError, "variance must be x's shape = \\(2, 3, 4, 4\\), got \\(2, 1, 4, 4\\)"),
    ({"variance": X.half()}, TypeError, "variance must have dtype torch.float32 like outputs"),
    ({"out": X.double()}, TypeError, "out must have dtype torch.float32 like x"),
    ({"out": X.clone().transpose(2, 3)}, ValueError, "out must be contiguous or channels_last"),
    ({"x_in": torch.zeros(3, 3, 4, 4)}, ValueError, "x_in must be \\(k B, ...\\)"),
    ({"x_in": X.half()}, TypeError, "x_in must have dtype torch.float32 like outputs"),
    ({"x_in": X.clone().transpose(2, 3)}, ValueError, "x_in must be laid out like out"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    good = {"x": X, "outputs": [X], "table": row_table(a=1.0), "step": steps(2)}
    with pytest.raises(error, match=f"sampler_step: .*{message}"):
        sampler_step(**(good | arguments))


def test_overlapping_out_is_refused():
    memory = torch.randn(5, 3, 4, 4)
    x, table = memory[:2], row_table(a=1.0)
    with pytest.raises(ValueError, match="out must not overlap x; pass a tensor of its own, or x itself"):
        sampler_step(x, memory[2:4], table, steps(2), out=memory[1:3])
    with pytest.raises(ValueError, match="out must not overlap outputs\\[0\\]"):
        sampler_step(x, memory[2:4], table, steps(2), out=memory[3:5])


def test_what_is_written_overlaps_nothing():
    memory = torch.randn(4, 3, 4, 4)
    x, table = memory[:2], row_table(a=1.0, flags=4.0, q=1.0)
    with pytest.raises(ValueError, match="x_in must not overlap x"):
        sampler_step(x, X, table, steps(2), x_in=x)
    with pytest.raises(ValueError, match="history must not overlap outputs\\[0\\]"):
        sampler_step(X, x, table, steps(2), memory[None, :2])
    with pytest.raises(ValueError, match="out must not be expanded"):
        sampler_step(X, X, table, steps(2), out=torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_step_is_outside_the_table_too(backend):
    device = skip_unless_available("sampler_step_out", backend)
    x, table = torch.randn(2, 5, device=device), row_table(a=0.5, t_model=9.0).to(device)
    step = torch.tensor([-1, 0], dtype=torch.int32, device=device)
    out = sampler_step(x, x, table, step, backend=backend)
    assert torch.equal(out, torch.stack([x[0], 0.5 * x[1]]))
    t = torch.zeros(2, device=device)
    advance(step, table, t, backend=backend)
    assert step.tolist() == [-1, 1] and t.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_step_and_a_float64_table(backend):
    device = skip_unless_available("sampler_step_out", backend)
    x, table = torch.randn(2, 5, device=device), torch.cat([row_table(a=0.5), row_table(a=2.0)]).double().to(device)
    step = torch.tensor([0, 7, 1, 7], dtype=torch.int32, device=device)[::2]
    assert torch.equal(sampler_step(x, x, table, step, backend=backend), torch.stack([0.5 * x[0], 2 * x[1]]))


def test_advance_errors():
    with pytest.raises(ValueError, match="advance: step must be contiguous"):
        advance(torch.zeros(4, dtype=torch.int32)[::2], row_table(a=1.0), torch.zeros(2))
    with pytest.raises(ValueError, match="advance: t must be float32 \\(k B,\\) with B = 2"):
        advance(steps(2), row_table(a=1.0), torch.zeros(3))
    with pytest.raises(TypeError, match="advance: step must have dtype torch.int32"):
        advance(steps(2).long(), row_table(a=1.0), torch.zeros(2))
