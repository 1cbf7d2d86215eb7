"""What the benchmarks time is right: every quick row is built and passes its own check, baselines included; every
variant of every row runs at a small shape, and what eager computes is what ours computes."""

import pytest
import torch

from genengine.benchmarks import registry
from genengine.models import FAMILIES

QUICK = [pytest.param(entry, next(entry.cases("cpu", quick=True)), id=entry.name) for entry in registry.select("quick")]

LATENTS, MLP = (2, 4, 6, 6), (5, 24)
SMALL = {  # group or row -> a shape that takes no time; models keep their images, of a batch of four
    "adaln": (2, 5, 24), "gated_adaln": (2, 5, 24), "attention": (2, 9, 3, 8), "bias_act": MLP, "diffuse": LATENTS,
    "bias_act, lrelu": (2, 6, 5, 5), "bias_act, lrelu, forward and backward": (2, 6, 5, 5), "diffusers": LATENTS,
    "ema_update": (2, 32), "engine": (2, 1, 8, 8), "extensions": LATENTS, "glu": MLP, "group_norm_silu": (2, 64, 5, 5),
    "guidance_moments": LATENTS, "k_diffusion": (2, 4, 8, 8), "logistic_mixture": (2, 3, 4, 5, 5), "loop": LATENTS,
    "normal": (2, 37), "nearest codes": (64, 8, 4), "qk_norm_rope": (2, 5, 3, 2, 8), "reparameterize": LATENTS,
    "sampler_step": (3, 4, 6, 6), "trace": (10,), "pixelcnn_sample": (3, 2, 6),
    "patch_step": (2, 9, 24), "linear_epilogues": (5, 24, 36),
    "pixelcnn_sample against batch": (3, 2, 6), "transformer_sample": (2, 6, 16, 2, 5),
}  # fmt: skip
EAGER_NOISE = "eager draws noise of its own; shapes and dtypes are compared"
NO_RESULT = "a step returns nothing; its check compares losses and gradients"
ROTATED = "counting costs has rotated the rows that are rotated in place; these begin with the projection"
ONE_PASS = "one of its many passes is timed; test_pixelcnn_sample.py makes all of them"
DEVIATIONS = "standard deviations, which its check compares with those of our sums"
NOT_COMPARED = {  # row -> why, for every variant, or for some
    "logistic_mixture_sample": EAGER_NOISE, "logistic_mixture_sample, channels_last": EAGER_NOISE,
    "diffuse": EAGER_NOISE, "diffuse, forward and backward": EAGER_NOISE, "normal": EAGER_NOISE, "uniform": EAGER_NOISE,
    "reparameterize + KL": EAGER_NOISE, "reparameterize + KL, forward and backward": EAGER_NOISE,
    "CFG + DDPM row": EAGER_NOISE, "CFG + DDPM row with noise": EAGER_NOISE,
    "CFG + DDPM row with a learned variance": EAGER_NOISE, "loop DDPM, 20 steps, CFG": EAGER_NOISE,
    "loop overhead per step": EAGER_NOISE,
    "last layer + CFG + DDPM row with a learned variance": EAGER_NOISE, "gan sampler, digits": EAGER_NOISE,
    "pixelcnn training step, digits": EAGER_NOISE, "mlp VAE, digits, training step": EAGER_NOISE,
    "mlp VAE, digits, sampling": EAGER_NOISE, "conv VAE, 32x32 colour, training step": EAGER_NOISE,
    "conv VAE, 32x32 colour, sampling": EAGER_NOISE,
    "ddpm training step, U-Net": NO_RESULT, "flow training step, tiny DiT": NO_RESULT,
    "gan training iteration, digits": NO_RESULT, "gan training iteration, digits, R1": NO_RESULT,
    "qk_norm_rope_": {"eager, stacked": ROTATED, "eager, complex": ROTATED, "compiles": ROTATED},
    "pixelcnn_sample": {"eager, naive": ONE_PASS}, "pixelcnn_sample against batch": {"eager, naive": ONE_PASS},
    "moments of two branches": {"eager": DEVIATIONS, "eager, preallocated": DEVIATIONS, "compiles": DEVIATIONS},
}  # fmt: skip
LOOSE = {"logistic_mixture": 1e-2}  # eager's differences of sigmoids cancel; the rows' checks say what ours may err
TOLERANCE = 1e-5  # of the largest entry: rounding in float32


@pytest.mark.parametrize(("entry", "case"), QUICK)
def test_a_quick_row_is_right(entry, case):
    with torch.no_grad():
        work = entry.make(case)
        work.check()
        assert "fused" in work.variants
        if work.cost is not None:
            assert work.cost.bytes > 0 and work.cost.flops >= work.cost.exps >= 0
        if work.oracle is not None:
            work.oracle(*work.inputs)
        for goal in work.goals:
            named = {goal.over, goal.under} - {""}
            assert named <= set(work.variants) | {"torch.compile"}, f"{goal.describe()} names no variant"


def small(entry):
    shape = SMALL.get(entry.name) or SMALL.get(entry.group)
    if shape is None:
        assert entry.kind == "models", f"{entry.name}: no small shape; add one to SMALL"
        batch, *image = next(iter(entry.shapes.values()))
        shape = (min(batch, 4), *image)
    return registry.Case(shape, torch.float32, "cpu", next(iter(entry.shapes)))


def results_of(entry, case):
    """name -> what every variant returns, and "compiles", uncompiled; each with inputs of its own, all equal."""
    kept, found = [], {}  # kept: no buffer that a variant forgets to write is one that another wrote

    def make():
        torch.manual_seed(0)
        kept.append(entry.make(case))
        return kept[-1]

    for name in make().variants:
        if not name.startswith("torch.compile"):  # seconds each: its function is called as it is
            found[name] = make().variants[name]()
    if (compiles := make().compiles) is not None:
        function, arguments = compiles
        found["compiles"] = function(*arguments)
    return found


def flat(results):
    """Tensors of nested results."""
    if isinstance(results, (tuple, list)):
        return [tensor for part in results for tensor in flat(part)]
    return [results] if isinstance(results, torch.Tensor) else []


def check_same_work(entry):
    """Every variant runs, and what eager computes is what ours computes."""
    with torch.no_grad():
        found = results_of(entry, small(entry))
    ours, reasons = flat(found["fused"]), NOT_COMPARED.get(entry.name, {})
    tolerance = LOOSE.get(entry.group, TOLERANCE)
    for name, results in found.items():
        if not (name.startswith("eager") or name in ("compiles", "torch")):
            continue
        reason = reasons if isinstance(reasons, str) else reasons.get(name)
        theirs = flat(results)
        if entry.group in ("loop", "extensions"):
            theirs = theirs[:1]  # the loops by hand return the last model input too, which ours keeps to itself
        if reason not in (None, EAGER_NOISE):
            continue
        assert ours and len(theirs) == len(ours), f"{name}: {len(theirs)} results, ours has {len(ours)}"
        for got, want in zip(theirs, ours, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype, f"{name}: {got.shape}, {got.dtype}"
            if reason is None:
                gap, largest = (got - want).abs().max().item(), want.abs().max().item()
                assert gap <= tolerance * largest, f"{name} differs from fused by {gap}, of {largest}"


@pytest.mark.parametrize("entry", registry.select("all"), ids=lambda entry: entry.name)
def test_every_variant_runs_and_eager_computes_what_ours_does(entry):
    check_same_work(entry)


def test_the_exceptions_name_rows_and_variants_that_exist():
    entries = {entry.name: entry for entry in registry.select("all")}
    assert set(NOT_COMPARED) <= set(entries)
    assert set(SMALL) <= set(entries) | set(registry.groups())
    for row, reasons in NOT_COMPARED.items():
        if isinstance(reasons, dict):
            assert set(reasons) <= {*entries[row].make(small(entries[row])).variants, "compiles"}


def test_a_baseline_that_skips_work_is_noticed():
    x = torch.randn(3, 4)
    make = lambda case: registry.Benchmark(  # noqa: E731
        {"fused": lambda: x * 2 + 1, "eager": lambda: x * 2}, lambda: None
    )
    entry = registry.Entry("skips", "adaln", "ops", make, {"": (2, 5, 24)}, {}, ("float32",), (), False, {})
    with pytest.raises(AssertionError, match="eager differs from fused"):
        check_same_work(entry)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_compared_with_its_eager_twin_and_with_torch_compile(family):
    for entry in registry.groups()[family]:
        if entry.quick:
            work = entry.make(next(entry.cases("cpu", quick=True)))
            assert {"fused", "eager"} <= set(work.variants)
            assert "torch.compile" in work.variants or work.compiles is not None
