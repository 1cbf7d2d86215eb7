"""Every extension in the loop: batch splits bit for bit, nothing read back to the host, rewinds; and the errors."""

import numpy as np
import pytest
import torch
from extension_cases import (
    FLOW,
    FLOW_GRID,
    MASK,
    SHAPE,
    VP,
    VP_GRID,
    branches,
    denoiser,
    flow_table,
    guided,
    initial,
)
from support import skip_unless_available

import genengine
from genengine import _loop, data, solvers
from genengine import extensions as ext
from genengine.models import FAMILIES


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
                ext.Rescale(), ext.Inpaint(MASK, known, VP), ext.DynamicThreshold(0.9), ext.Langevin(VP, "eps"),
                ext.GuidanceInterval(0.1, 0.9),
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
def test_rows_written_during_a_run_are_restored_by_another_start(name, monkeypatch):
    """As the warm-up of a CUDA graph does it: the first and the last row, then from the start."""
    expected, drive, load, requests = run(name), _loop.drive, _loop.Loop.load, []

    def loaded(loop, request):
        requests.append(request)
        return load(loop, request)

    def warmed_up(loop, *args):
        loop.row(0)
        loop.row(loop.num_rows - 1)
        loop.begin(requests[-1])
        drive(loop, *args)

    monkeypatch.setattr(_loop.Loop, "load", loaded)
    monkeypatch.setattr(_loop, "drive", warmed_up)
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


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_agrees(name, backend):
    """Up to the order in which a sample's moments are summed."""
    if skip_unless_available("guidance_moments", backend).type != "cpu":
        pytest.skip(
            "Triton compiles for the GPU here: tests/gpu/test_extensions.py compares its kernels with the CPU's"
        )
    expected = run(name)
    with genengine.backend(backend):
        found = run(name)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bit_models_and_states(name):
    table, extensions = every()[name]
    sample = lambda x, dtype: genengine.sample(  # noqa: E731
        denoiser, table, x=x, model_dtype=dtype, seed=7, extensions=extensions, **branches()
    )
    exact = sample(initial().float(), torch.float32)
    mixed, half = sample(initial().float(), torch.float16), sample(initial().bfloat16(), torch.bfloat16)
    assert mixed.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert (mixed - exact).abs().max() < 0.02 * exact.abs().max()
    assert (half.float() - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_states_without_pixels(name):
    """(B, C) has the bits of (B, C, 1, 1)."""
    table, extensions = every()[name]
    pieces = []
    for extension in extensions:
        if isinstance(extension, ext.Inpaint):
            mask, known = torch.tensor([1.0, 0.0]), torch.tensor([0.3, -0.4])
            extension = ext.Inpaint(mask[:, None, None], known[:, None, None], extension.path, extension.noise)
            flat = ext.Inpaint(mask, known, extension.path, extension.noise)
        else:
            flat = extension
        pieces.append((flat, extension))
    flat, deep = (
        genengine.sample(denoiser, table, shape, seed=7, extensions=chosen, **branches())
        for shape, chosen in zip(((3, 2), (3, 2, 1, 1)), zip(*pieces, strict=True), strict=True)
    )
    assert torch.equal(flat, deep[:, :, 0, 0])


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


def test_rows_that_a_later_extension_adds_are_inpainted_too():
    """Whichever comes first: the known part is put back after the corrections too."""
    known = torch.linspace(-1, 1, 180).reshape(SHAPE)
    table = solvers.ddpm(VP, VP_GRID, prediction="eps")
    pieces = [ext.Inpaint(MASK, known, VP), ext.Langevin(VP, "eps")]
    first, last = (
        genengine.sample(denoiser, table, SHAPE, seed=7, extensions=order, **branches())
        for order in (pieces, pieces[::-1])
    )
    assert torch.equal(first, last) and torch.equal(first[:, :, MASK == 0], known[:, :, MASK == 0])
    with pytest.raises(ValueError, match="Langevin: another extension adds rows after it"):
        genengine.sample(denoiser, table, SHAPE, extensions=[ext.Langevin(VP, "eps")] * 2)


@pytest.mark.parametrize("family", ["flow", "ddpm"])
def test_shipped_models_take_extensions(family):
    """Inpainting a digit of its own: the known half is kept exactly, the other stays an image."""
    model = FAMILIES[family].pretrained()
    known = data.digits("test")[0][:3]
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    pieces = [ext.Inpaint(mask, known, model.path)] + [ext.DynamicThreshold()] * (family == "ddpm")
    got = model.sample(3, steps=10, seed=1, extensions=pieces)
    assert torch.equal(got[..., :4], known[..., :4]) and got.abs().max() < 1.5
    assert not torch.equal(got, model.sample(3, steps=10, seed=1))


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
