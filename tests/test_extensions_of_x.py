"""Extensions that change the state, or where it starts, or its rows: each equal to a textbook loop in float64."""

import numpy as np
import pytest
import torch
from extension_cases import FLOW_GRID, MASK, SHAPE, VP, VP_GRID, branches, denoiser, each, guided, initial, times

import genengine
from genengine import extensions as ext
from genengine import paths, schedules, solvers
from genengine.ops import normal
from genengine.table import CoefficientTable

# ---- inpainting, and starting from an image ------------------------------------------------------------------------


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
