"""Extensions of the loop: each equal to a textbook loop in float64, batch splits bit for bit, nothing read back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import genengine
from genengine import extensions as ext
from genengine import paths, schedules, solvers
from genengine.extensions.threshold import _quantile
from genengine.ops import normal
from genengine.table import CoefficientTable

FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
FLOW_GRID, VP_GRID = schedules.uniform(6), schedules.uniform(5, t_max=0.99, t_min=0.01)
SHAPE = (3, 2, 6, 5)
W = 4.0
Y = torch.tensor([1.0, 2.0, 3.0])


def denoiser(x, t, y=None):
    """Elementwise, and different for every branch."""
    column = lambda v: v.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)  # noqa: E731
    y = torch.zeros_like(t) if y is None else y
    return torch.tanh(0.8 * x + column(t) + 0.3 * column(y) * x) + 0.1 * column(y)


def branches(ids=slice(None)):
    return {"cond": {"y": Y[ids]}, "uncond": {"y": 0 * Y[ids]}, "guidance": W}


def flow_table(**options):
    return solvers.euler(FLOW, FLOW_GRID, prediction="velocity", **options)


def initial(shape=SHAPE, seed=7):
    return normal(shape, seed=seed).double()


def each(samples, value):
    """(B,) as something that broadcasts against samples."""
    return value.reshape(-1, *[1] * (samples.dim() - 1))


def times(t, batch=3):
    return torch.full((batch,), float(t), dtype=torch.float64)


# ---- guidance ----------------------------------------------------------------------------------------------------


def plain(u, c, row):
    return u + W * (c - u)


def rescaled(u, c, row, phi=0.7):
    """Lin 2024, eqs. 14-16."""
    m, dims = plain(u, c, row), list(range(1, u.dim()))
    factor = c.std(dims, keepdim=True) / m.std(dims, keepdim=True)
    return phi * m * factor + (1 - phi) * m


def zero_star(u, c, row, steps=2):
    """Fan 2025."""
    s = (u * c).flatten(1).sum(1) / (u * u).flatten(1).sum(1)
    su = each(u, s) * u
    return su + W * (c - su) if row >= steps else 0 * u


def projected(u, c, row, eta=0.25, threshold=2.5):
    """Sadat 2024, Alg. 1, without momentum."""
    diff = c - u
    norm = diff.flatten(1).norm(dim=1)
    diff = diff * each(u, torch.minimum(torch.ones_like(norm), threshold / norm))
    unit = c / each(u, c.flatten(1).norm(dim=1))
    parallel = each(u, (diff * unit).flatten(1).sum(1)) * unit
    return c + (W - 1) * (diff - parallel + eta * parallel)


def per_channel(u, c, row):
    return torch.cat([u[:, :1] + 3 * (c[:, :1] - u[:, :1]), c[:, 1:]], 1)


def in_interval(u, c, row):
    return plain(u, c, row) if 0.2 < FLOW_GRID[row] <= 0.7 else c


GUIDANCE = [
    (ext.Rescale(0.7), rescaled),
    (ext.CFGZeroStar(zero_init_steps=2), zero_star),
    (ext.Projected(eta=0.25, norm_threshold=2.5), projected),
    (ext.Projected(eta=1.0), plain),
    (ext.PerChannelGuidance([3.0, 1.0]), per_channel),
    (ext.GuidanceInterval(0.2, 0.7), in_interval),
]


@pytest.mark.parametrize(("extension", "combine"), GUIDANCE, ids=[type(e).__name__ for e, _ in GUIDANCE])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_guidance_against_the_textbook(extension, combine, layout):
    x = initial()
    got = genengine.sample(
        denoiser, flow_table(), x=x.float().contiguous(memory_format=layout), extensions=(extension,), **branches()
    )
    for row, (t, t_next) in enumerate(zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True)):
        u, c = (denoiser(x, times(t), y.double()) for y in (0 * Y, Y))
        x = x + (t_next - t) * combine(u, c, row)
    assert (got - x).abs().max() < 1e-5 and got.is_contiguous(memory_format=layout)
    assert (got - genengine.sample(denoiser, flow_table(), x=initial().float(), **branches())).abs().max() > (
        -1 if combine is plain else 1e-2
    )


@pytest.mark.parametrize("name", ["Rescale", "Projected"])
def test_guidance_of_close_branches_keeps_its_digits(name):
    """c differs from u by a thousandth: its length and the spread of m come from differences, not from sums."""
    close = lambda x, t, y: torch.sin(x) + 0.5 + 1e-3 * y.reshape(-1, 1, 1, 1).to(x.dtype) * torch.sin(9 * x)  # noqa: E731
    extension = {"Rescale": ext.Rescale(1.0), "Projected": ext.Projected(1.0, norm_threshold=1e-3)}[name]
    x = initial()
    got = genengine.sample(close, flow_table(), x=x.float(), extensions=(extension,), **branches())
    combine = {
        "Rescale": lambda u, c: rescaled(u, c, 0, 1.0),
        "Projected": lambda u, c: projected(u, c, 0, 1.0, 1e-3),
    }[name]
    for t, t_next in zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True):
        x = x + (t_next - t) * combine(*(close(x, times(t), y.double()) for y in (0 * Y, Y)))
    assert (got - x).abs().max() < 3e-6


def test_weights_that_cancel_leave_finite_numbers():
    """phi = 1 and a constant conditional output: std(c) is 0, and so is m."""
    constant = lambda x, t, y: torch.where(y.reshape(-1, 1, 1, 1) > 0, 0.5, torch.tanh(x))  # noqa: E731
    x = genengine.sample(constant, flow_table(), SHAPE, seed=7, extensions=(ext.Rescale(1.0),), **branches())
    assert (x - initial()).abs().max() < 1e-3
    zero = lambda x, t, y: torch.zeros_like(x)  # noqa: E731
    for extension in (ext.CFGZeroStar(0), ext.Projected(0.0, 1.0), ext.Rescale()):
        x = genengine.sample(zero, flow_table(), SHAPE, seed=7, extensions=(extension,), **branches())
        assert torch.equal(x, normal(SHAPE, seed=7))


def test_per_channel_weights_per_sample_and_sixteen_bits():
    weights = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 5.0]])
    x = initial()
    run = lambda **options: genengine.sample(  # noqa: E731
        denoiser, flow_table(), x=x.float(), extensions=(ext.PerChannelGuidance(weights),), **branches(), **options
    )
    got, coarse = run(), run(model_dtype=torch.bfloat16)
    for t, t_next in zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True):
        u, c = (denoiser(x, times(t), y.double()) for y in (0 * Y, Y))
        x = x + (t_next - t) * (u + weights[:, :, None, None] * (c - u))
    assert (got - x).abs().max() < 1e-5 and (coarse - x).abs().max() < 0.1


# ---- thresholds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quantile": 0.5}, {"quantile": 0.9, "max_value": 1.5}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dynamic_threshold_against_the_textbook(options, layout):
    """DDIM on eps with x0 thresholded, eps derived again from it (Saharia 2022)."""
    table = solvers.ddim(VP, VP_GRID, prediction="eps", clip=1.0)
    x = 2 * initial()
    got = genengine.sample(
        denoiser, table, x=x.float().contiguous(memory_format=layout), extensions=(ext.DynamicThreshold(**options),),
        **branches(),
    )  # fmt: skip
    radii = []
    for t, t_next in zip(VP_GRID[:-1], VP_GRID[1:], strict=True):
        u, c = (denoiser(x, times(t), y.double()) for y in (0 * Y, Y))
        x0 = (x - VP.sigma(t) * plain(u, c, 0)) / VP.alpha(t)
        r = torch.quantile(x0.abs().flatten(1), options.get("quantile", 0.995), dim=1)
        r = r.clamp(1.0, options.get("max_value", np.inf))
        radii.append(r)
        y = torch.maximum(torch.minimum(x0, each(x, r)), -each(x, r)) / each(x, r)
        eps = (x - VP.alpha(t) * y) / VP.sigma(t)
        x = VP.alpha(t_next) * y + VP.sigma(t_next) * eps
    assert (got - x).abs().max() < 2e-5 and torch.stack(radii).max() > 1.2


@given(n=st.integers(1, 300), quantile=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_quantile_is_torch_s(n, quantile, seed):
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    expected = torch.quantile(values.double(), quantile, dim=1)
    assert (_quantile(values, quantile) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.94, 0.995, 1.0])
def test_quantile_of_many_values_and_ties(quantile):
    values = torch.randn(2, 5000).mul(4).round()
    expected = torch.quantile(values.double(), quantile, dim=1)
    assert (_quantile(values, quantile) - expected).abs().max() < 1e-6


# ---- inpainting, and starting from an image ------------------------------------------------------------------------


MASK = (torch.arange(30).reshape(6, 5) % 3 > 0).float()


@pytest.mark.parametrize("noise", ["fixed", "row"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inpainting_against_the_textbook(noise, layout):
    """Ancestral sampling in EDM's coordinates, where the model's input is scaled: c_in must follow the blend."""
    path = paths.EDM(3.0)
    scale = lambda t: 1 / np.hypot(0.5, path.sigma(t))  # noqa: E731
    table = solvers.euler_ancestral(path, FLOW_GRID, prediction="x0", input_scale=scale)
    x, known = 3 * initial(), torch.randn(SHAPE, dtype=torch.float64)
    extension = ext.Inpaint(MASK, known, path, noise=noise)
    got = genengine.sample(
        denoiser, table, x=x.float().contiguous(memory_format=layout), seed=7, extensions=(extension,)
    )
    for row, (t, t_next) in enumerate(zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True)):
        sigma, after = path.sigma(t), path.sigma(t_next)
        x0 = denoiser(scale(t) * x, times(t))
        up = min(after, np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        x = x0 + np.sqrt(after**2 - up**2) * (x - x0) / sigma
        x = x + up * normal(SHAPE, seed=7, step=row, stream="step").double()
        draw = {"step": table.num_rows + row, "stream": "step"} if noise == "row" else {"stream": "model"}
        x = MASK * x + (1 - MASK) * (known + after * normal(SHAPE, seed=7, **draw).double())
    assert (got - x).abs().max() < 1e-5 * x.abs().max() and got.is_contiguous(memory_format=layout)
    kept = (MASK == 0).expand(SHAPE)
    assert torch.equal(got[kept], known.float()[kept])


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "ddpm"])
@pytest.mark.parametrize("soft", [False, True])
def test_known_data_is_exact_at_the_end_with_every_kind_of_solver(solver, soft):
    table = solvers.SOLVERS[solver](VP, VP_GRID, prediction="eps")
    known, mask = torch.randn(1, *SHAPE[1:]), MASK.clone()
    if soft:
        mask[mask == 1] = torch.rand(int(mask.sum()))
    got = genengine.sample(
        denoiser, table, SHAPE, seed=7, extensions=(ext.Inpaint(mask.bool() if not soft else mask, known, VP),)
    )
    kept = (mask == 0).expand(SHAPE)
    assert torch.equal(got[kept], known.expand(SHAPE)[kept]) and got.isfinite().all()
    assert not torch.equal(got, genengine.sample(denoiser, table, SHAPE, seed=7))


def test_inpainting_with_a_model_time_needs_the_path_s():
    table = solvers.ddim(VP, VP_GRID, prediction="eps", model_time=lambda t: 1000 * t)
    rescaled_model = lambda x, t: denoiser(x, t / 1000)  # noqa: E731
    known = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="Inpaint: the table's t_model is not a path time .* pass times="):
        genengine.sample(rescaled_model, table, SHAPE, extensions=(ext.Inpaint(MASK, known, VP),))
    got = genengine.sample(rescaled_model, table, SHAPE, extensions=(ext.Inpaint(MASK, known, VP, times=VP_GRID[:-1]),))
    plain_time = solvers.ddim(VP, VP_GRID, prediction="eps")
    expected = genengine.sample(denoiser, plain_time, SHAPE, extensions=(ext.Inpaint(MASK, known, VP),))
    assert (got - expected).abs().max() < 1e-5


def test_image_to_image():
    x0 = torch.randn(SHAPE)
    ids = torch.tensor([4, 9, 2])
    x, tail = ext.image_to_image(VP, VP_GRID, x0, 0.6, seed=5, sample_ids=ids)
    assert np.array_equal(tail, VP_GRID[2:])
    eps = normal(SHAPE, seed=5, sample_ids=ids, stream="diffuse").double()
    assert (x - (VP.alpha(tail[0]) * x0 + VP.sigma(tail[0]) * eps)).abs().max() < 1e-6
    got = genengine.sample(denoiser, solvers.ddim(VP, tail, prediction="eps"), x=x)
    state = x.double()
    for t, t_next in zip(tail[:-1], tail[1:], strict=True):
        output = denoiser(state, times(t))
        state = VP.alpha(t_next) * (state - VP.sigma(t) * output) / VP.alpha(t) + VP.sigma(t_next) * output
    assert (got - state).abs().max() < 1e-5
    assert len(ext.image_to_image(VP, VP_GRID, x0, 1.0)[1]) == len(VP_GRID)
    assert len(ext.image_to_image(VP, VP_GRID, x0, 0.01)[1]) == 2


# ---- Langevin ----------------------------------------------------------------------------------------------------


def langevin_loop(path, grid, x, num_steps, norms, predict):
    """Song 2021, Alg. 3 with the corrections of Alg. 4 and 5, before the predictor as in its code; the score is
    -eps/sigma of the network's eps."""
    row, snr = 0, 0.2
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        ratio = (path.alpha(t) / path.alpha(t_next if t_next > grid[-1] else 0.0)) ** 2
        for _ in range(num_steps):
            score = -guided(x, t) / path.sigma(t)
            z = normal(x.shape, seed=7, step=row, stream="step").double()
            g, length = score.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1)
            if norms == "batch":
                g, length = g.mean(), length.mean()
            size = 2 * ratio * (snr * length / g) ** 2
            size = each(x, size.expand(len(x)))
            x = x + size * score + torch.sqrt(2 * size) * z
            row += 1
        x = predict(x, guided(x, t), t, t_next, row)
        row += 1
    return x


def guided(x, t):
    return plain(*(denoiser(x, times(t, len(x)), y.double()) for y in (0 * Y[: len(x)], Y[: len(x)])), 0)


@pytest.mark.parametrize("path", [VP, paths.VE(0.1, 4.0)], ids=["vp", "ve"])
@pytest.mark.parametrize(("num_steps", "norms"), [(1, "sample"), (2, "sample"), (1, "batch")])
def test_langevin_against_the_textbook(path, num_steps, norms):
    def ancestral(x, eps, t, t_next, row):
        a, s, a_next, s_next = path.alpha(t), path.sigma(t), path.alpha(t_next), path.sigma(t_next)
        k = a * s_next / (a_next * s)
        mean = a_next * (x - s * eps) / a + k * s_next * eps
        return mean + s_next * np.sqrt(1 - k * k) * normal(SHAPE, seed=7, step=row, stream="step").double()

    table = solvers.ddpm(path, VP_GRID, prediction="eps")
    extension = ext.Langevin(path, "eps", snr=0.2, num_steps=num_steps, norms=norms)
    x = initial() * float(path.sigma(VP_GRID[0]))
    got = genengine.sample(denoiser, table, x=x.float(), seed=7, extensions=(extension,), **branches())
    expected = langevin_loop(path, VP_GRID, x, num_steps, norms, ancestral)
    assert (got - expected).abs().max() < 3e-5 * expected.abs().max()


def test_langevin_keeps_the_input_scale_and_idle_rows():
    """Rows of the same time see the same c_in; a stacked table's shorter sample is not corrected at its end."""
    path = paths.EDM(3.0)
    scale = lambda t: 1 / np.hypot(0.5, path.sigma(t))  # noqa: E731
    options = {"prediction": "x0", "input_scale": scale}
    tables = [solvers.euler(path, schedules.uniform(n, t_min=0.1), **options) for n in (3, 5)]
    extension = ext.Langevin(path, "x0")
    both = genengine.sample(denoiser, CoefficientTable.stack(tables), (2, 3, 4), seed=7, extensions=(extension,))
    for b, table in enumerate(tables):
        ids = torch.tensor([b])
        alone = genengine.sample(denoiser, table, (1, 3, 4), seed=7, sample_ids=ids, extensions=(extension,))
        assert torch.equal(both[b : b + 1], alone)


# ---- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [4, 7])
def test_token_rows_against_a_loop_over_tokens(dim):
    """A solver on a grid of its own for each token, one that waits too; the noise is that of the sample."""
    batch, grids = 2, [schedules.uniform(n, t_max=0.99, t_min=0.01) for n in (4, 2, 3)]
    tables = [solvers.dpmpp_2m_sde(VP, grid, prediction="eps") for grid in grids]
    table = torch.from_numpy(CoefficientTable.stack(tables).astype_float32())[:, None]
    x, ids = normal((batch, 3, dim), seed=1), torch.tensor([5, 3])
    state, history = x.clone(), torch.full((1, batch, 3, dim), float("nan"))
    tokens, old = x.double(), torch.zeros(batch, 3, dim, dtype=torch.float64)
    for row in range(4):
        output = torch.tanh(state + table[row, ..., 0].reshape(1, 3, 1))
        state = ext.token_step(
            state, output, table, torch.full((batch,), row, dtype=torch.int32), history, seed=9, sample_ids=ids
        )
        z = normal((batch, 3, dim), seed=9, sample_ids=ids, step=row, stream="step").double()
        for n, grid in enumerate(grids):
            if row + 1 >= len(grid):
                continue
            c = dict(zip(genengine.table.COLUMNS, tables[n].rows[row, 0], strict=True))
            m = torch.tanh(tokens[:, n] + c["t_model"])
            y = c["p"] * tokens[:, n] + c["q"] * m
            new = c["a"] * tokens[:, n] + c["b"] * m + c["c"] * y + c["h1"] * old[:, n] + c["s"] * z[:, n]
            tokens[:, n], old[:, n] = new, y
    assert (state - tokens).abs().max() < 1e-6 * tokens.abs().max()
    assert torch.equal(history.isnan().any(-1)[0, 0], torch.tensor([False, False, False]))


def test_token_rows_with_branches_and_buffers_equal_one_row_for_all():
    """With the same row for every token it is `sampler_step`, bit for bit: out, x_in, stacked branches and noise."""
    table = torch.zeros(2, 1, 16)
    table[..., 6], table[..., 7], table[..., 12], table[..., 1], table[..., 14] = 0.9, 0.2, 0.5, 3.0, 0.7
    x, outputs, step = torch.randn(2, 5, 6), torch.randn(4, 5, 6), torch.tensor([1, 0], dtype=torch.int32)
    results = []
    for run, rows in ((ext.token_step, table[:, :, None].expand(-1, -1, 5, -1)), (genengine.ops.sampler_step, table)):
        out, x_in = torch.zeros(2, 5, 6), torch.zeros(4, 5, 6)
        assert run(x, outputs, rows, step, seed=3, out=out, x_in=x_in).data_ptr() == out.data_ptr()
        results.append((out, x_in))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- all together ------------------------------------------------------------------------------------------------


def every(ids=slice(None)):
    """Tables and extensions under a name, for the samples ids."""
    vp = {"clip": 1.0, "prediction": "eps"}
    known, weights = (
        torch.linspace(-1, 1, 180).reshape(SHAPE)[ids],
        torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 5.0]])[ids],
    )
    return {
        "rescale": (flow_table(), (ext.Rescale(),)),
        "zero star": (flow_table(), (ext.CFGZeroStar(),)),
        "projected": (flow_table(), (ext.Projected(0.2, 2.0),)),
        "per channel": (flow_table(), (ext.PerChannelGuidance(weights),)),
        "interval": (flow_table(), (ext.GuidanceInterval(0.2, 0.8),)),
        "threshold": (solvers.ddim(VP, VP_GRID, **vp), (ext.DynamicThreshold(0.9),)),
        "inpaint": (solvers.ddpm(VP, VP_GRID, **vp), (ext.Inpaint(MASK, known, VP),)),
        "inpaint by row": (
            solvers.heun(FLOW, FLOW_GRID, prediction="velocity"), (ext.Inpaint(MASK, known, FLOW, "row"),)
        ),
        "langevin": (solvers.ddpm(VP, VP_GRID, prediction="eps"), (ext.Langevin(VP, "eps"),)),
        "several": (
            solvers.ddpm(VP, VP_GRID, **vp),
            (
                ext.Rescale(), ext.DynamicThreshold(0.9), ext.Langevin(VP, "eps"), ext.GuidanceInterval(0.1, 0.9),
                ext.Inpaint(MASK, known, VP),
            ),
        ),
    }  # fmt: skip


NAMES = list(every())


def run(name, ids=(0, 1, 2), **options):
    ids = list(ids)
    table, extensions = every(ids)[name]
    return genengine.sample(
        denoiser, table, (len(ids), *SHAPE[1:]), seed=7, sample_ids=torch.tensor(ids), extensions=extensions,
        **branches(ids), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    whole = run(name)
    assert whole.isfinite().all()
    assert torch.equal(torch.cat([run(name, [0]), run(name, [1, 2])]), whole)
    assert torch.equal(run(name, [2, 0, 1]), whole[[2, 0, 1]])


@pytest.mark.parametrize("name", NAMES)
def test_rows_written_during_a_run_are_restored_by_a_rewind(name, monkeypatch):
    """As the warm-up of a CUDA graph does it: the first and the last row, then from the start."""
    expected, drive = run(name), genengine.sampler._drive

    def warmed_up(state, *args):
        initial = state.x.clone()
        state.row(0)
        state.row(state.num_rows - 1)
        state.x.copy_(initial)
        state.rewind()
        drive(state, *args)

    monkeypatch.setattr("genengine.sampler._drive", warmed_up)
    assert torch.equal(run(name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_back_to_the_host(name):
    """Between the model's calls no op needs a value of a tensor on the host."""
    log = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            log.append(func.name())
            return func(*args, **(kwargs or {}))

    def model(x, t, y):
        log.append("model")
        return output[: len(x)]

    output = torch.randn(2 * SHAPE[0], *SHAPE[1:])
    table, extensions = every()[name]
    with Recorder():
        genengine.sample(model, table, SHAPE, seed=7, extensions=extensions, **branches())
    rows = log[log.index("model") :]
    reading = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
    assert "genengine::sampler_step_out" in rows and not reading & set(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_the_user_s_objects_alone(name):
    table, extensions = every()[name]
    before, rows = [set(vars(extension)) for extension in extensions], table.rows.copy()
    outputs = []
    for _ in range(2):
        x = genengine.sample(denoiser, table, SHAPE, seed=7, extensions=extensions, **branches())
        outputs.append(x)
    assert torch.equal(*outputs) and np.array_equal(table.rows, rows)
    assert [set(vars(extension)) for extension in extensions] == before


def test_empty_batch():
    y = torch.zeros(0)
    for name in NAMES:
        if name == "per channel":
            continue
        table, extensions = every(slice(0, 0))[name]
        x = genengine.sample(
            denoiser, table, (0, *SHAPE[1:]), cond={"y": y}, uncond={"y": y}, guidance=2.0, extensions=extensions
        )
        assert x.shape == (0, *SHAPE[1:])


def test_an_extension_of_one_s_own():
    """The hooks in order, the current row's columns, and a state that the next input follows."""

    class Halve(ext.Extension):
        def __init__(self):
            self.log = []

        def extend(self, table):
            self.log.append("extend")
            return table

        def start(self, run):
            self.log.append(("start", run.num_branches, tuple(run.rows.shape)))

        def before_row(self, run, outputs):
            a, b = run.read("a", "b")
            assert len(outputs) == 2 and torch.equal(a, torch.ones(3))
            run.write(b=b * 0.5)

        def after_row(self, run):
            self.log.append(int(run.step[0]))
            run.x.mul_(0.5)

    extension, x = Halve(), initial()
    got = genengine.sample(denoiser, flow_table(), x=x.float(), extensions=(extension,), **branches())
    for t, t_next in zip(FLOW_GRID[:-1], FLOW_GRID[1:], strict=True):
        x = 0.5 * (x + 0.5 * (t_next - t) * guided(x, t))
    assert (got - x).abs().max() < 1e-6
    assert extension.log == ["extend", ("start", 2, (6, 3, 16)), 0, 1, 2, 3, 4, 5]


HEUN = solvers.heun(FLOW, FLOW_GRID, prediction="velocity")
BAD = [
    ({"extensions": (ext.Rescale,)}, TypeError, "extensions\\[0\\] must be .*Extension, got Rescale"),
    ({"extensions": (None,)}, TypeError, "extensions\\[0\\] must be .* got NoneType"),
    ({"extensions": (ext.Rescale(), ext.Projected())}, ValueError, "hold one that combines .* got Rescale, Projected"),
    ({"extensions": (ext.Rescale(),), "one": True}, ValueError, "Rescale: the model must have two branches, got 1"),
    ({"extensions": (ext.PerChannelGuidance([1.0]),)}, ValueError, "weights must be \\(C,\\) = \\(2,\\) or \\(B, C\\)"),
    ({"extensions": (ext.DynamicThreshold(),)}, ValueError, "must have rows that clamp .* none that clamps; make it"),
    (
        {"extensions": (ext.DynamicThreshold(),), "table": flow_table(clip=2.0)},
        ValueError,
        "must have rows that clamp x0 to \\[-1, 1\\], got radii 2",
    ),
    ({"extensions": (ext.Inpaint(MASK[:2], MASK, FLOW),)}, ValueError, "Inpaint: mask must broadcast to x"),
    ({"extensions": (ext.Inpaint(MASK, torch.zeros(4, 2, 6, 5), FLOW),)}, ValueError, "known must broadcast to x"),
    ({"extensions": (ext.Inpaint(MASK, MASK, FLOW, times=[0.5]),)}, ValueError, "times must be \\(6,\\) path times"),
    (
        {"extensions": (ext.Langevin(FLOW, "velocity"),), "table": HEUN},
        ValueError,
        "Langevin: the solver 'heun' evaluates the model more than once a step",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_runs(change, error, message):
    options = {"table": flow_table()} | ({} if change.pop("one", False) else branches()) | change
    with pytest.raises(error, match=message):
        genengine.sample(denoiser, shape=SHAPE, **options)


X = torch.zeros(2, 3, 4)
TABLE = torch.zeros(1, 1, 3, 16)
STEP = torch.zeros(2, dtype=torch.int32)
BAD_CALLS = [
    (lambda: ext.Rescale(1.5), "Rescale: phi must be in \\[0, 1\\], got 1.5"),
    (lambda: ext.CFGZeroStar(-1), "CFGZeroStar: zero_init_steps must be an int >= 0"),
    (lambda: ext.Projected(eta=-0.1), "Projected: eta must be in \\[0, 1\\]"),
    (lambda: ext.Projected(norm_threshold=0.0), "Projected: norm_threshold must be finite and above 0"),
    (lambda: ext.PerChannelGuidance(2.0), "PerChannelGuidance: weights must be finite, \\(C,\\) or \\(B, C\\)"),
    (lambda: ext.GuidanceInterval(0.8, 0.2), "GuidanceInterval: needs t_low < t_high"),
    (lambda: ext.DynamicThreshold(1.1), "DynamicThreshold: quantile must be in"),
    (lambda: ext.DynamicThreshold(max_value=0.5), "DynamicThreshold: max_value must be at least 1"),
    (lambda: ext.Inpaint(2 * MASK, MASK, FLOW), "Inpaint: mask must be within"),
    (lambda: ext.Inpaint(MASK, MASK, FLOW, "new"), "Inpaint: noise must be one of fixed, row, got 'new'"),
    (lambda: ext.Langevin(VP, "eps", snr=0.0), "Langevin: snr must be finite and above 0"),
    (lambda: ext.Langevin(VP, "eps", num_steps=0), "Langevin: num_steps must be an int >= 1"),
    (lambda: ext.Langevin(VP, "eps", norms="mean"), "Langevin: norms must be 'sample' or 'batch'"),
    (lambda: ext.image_to_image(VP, VP_GRID, X, 0.0), "image_to_image: strength must be in \\(0, 1\\]"),
    (lambda: ext.image_to_image(VP, [0.5], X, 0.5), "image_to_image: grid must be \\(N \\+ 1,\\) times"),
    (lambda: ext.token_step(X[0], X, TABLE, STEP), "token_step: x must be \\(B, N, D\\), got \\(3, 4\\)"),
    (lambda: ext.token_step(X, X, TABLE[:, :, :2], STEP), "token_step: table must be .* B = 2 and N = 3"),
    (lambda: ext.token_step(X, X, TABLE, STEP[:1]), "token_step: step must be \\(B,\\) = \\(2,\\)"),
    (lambda: ext.token_step(X, X.mT.contiguous().mT, TABLE, STEP), "outputs\\[0\\] must be contiguous"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
