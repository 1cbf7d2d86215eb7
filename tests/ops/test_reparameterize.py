"""reparameterize: z, both KLs and their gradients against float64, with the noise of the specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import random, testing
from genengine.ops import EXTENSION, _registry, _verify, normal, reparameterize
from genengine.testing.reparameterize import gradient_slack, kl_slack

NAMES = ("reparameterize", "reparameterize_backward")
NAMESPACES = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
KINDS = ({}, {"free_bits": 0.3}, {"kl": "monte_carlo"})
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")


def make(*shape, dtype=F32, device="cpu"):
    return [torch.randn(shape).to(device, dtype) for _ in range(2)]


def eps_of(shape, seed, **place):
    return normal(shape, seed=seed, stream="reparameterize", backend="reference", **place)


def check(backend, mean, logvar, **arguments):
    """Forward and backward through the public function, against the same-dtype and the float64 reference."""
    grads = torch.randn(mean.shape).to(mean), torch.randn(mean.shape[0]).to(mean.device)
    results = {}
    for name, dtype in ((backend, mean.dtype), ("reference", mean.dtype), ("oracle", F64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (mean, logvar)]
        z, kl = reparameterize(*leaves, **arguments, backend="reference" if name == "oracle" else name)
        outer = [g.to(out.dtype) for g, out in zip(grads, (z, kl), strict=True)]
        results[name] = [z.detach(), kl.detach(), *torch.autograd.grad((z, kl), leaves, outer)]
    oracle = results["oracle"]
    slack = (0.0, kl_slack(mean, logvar), *gradient_slack(*grads, mean, logvar, oracle[0]))
    for i, (got, plain, exact) in enumerate(zip(results[backend], results["reference"], oracle, strict=True)):
        assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape
        if (
            arguments.get("free_bits") and i > 1
        ):  # an element within a rounding of the threshold may fall on either side
            got, plain, exact = (
                torch.where(near_threshold(mean, logvar, arguments["free_bits"]), 0, t) for t in (got, plain, exact)
            )
        allowed = testing.tolerance(plain, exact) + slack[i]
        assert testing.error(got, exact) <= allowed, f"output {i}: {testing.error(got, exact)} > {allowed}"
    return results[backend]


def near_threshold(mean, logvar, free_bits):
    m, v = mean.double(), logvar.double()
    return (0.5 * (m.square() + v.exp() - 1 - v) - free_bits).abs() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    device = skip_unless_available("reparameterize", backend)
    for name in NAMES:
        assert _verify.run(_registry.OPS[name], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_against_float64(backend, dtype, kind):
    device = skip_unless_available("reparameterize", backend)
    for shape in ((3, 17), (2, 4, 6, 6), (1, 5, 29, 29), (2,)):
        check(backend, *make(*shape, dtype=dtype, device=device), seed=7, **kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_is_the_specification(backend):
    device = skip_unless_available("reparameterize", backend)
    shape, ids = (3, 2, 5, 7), torch.tensor([5, 0, 2**32 - 1], device=device)
    zero = torch.zeros(shape, device=device)
    for layout in ("plain", "channels_last"):
        z, _ = reparameterize(laid_out(zero, layout), zero, seed=3, sample_ids=ids, step=9, backend=backend)
        assert torch.equal(z, eps_of(shape, 3, sample_ids=ids, step=9, device=device))
        given_too, _ = reparameterize(laid_out(zero, layout), zero, noise=z, backend=backend)
        assert torch.equal(given_too, z)
    oracle = random.normal(70, seed=3, sample=5, step=9, stream="reparameterize")
    assert torch.equal(z[0].flatten().cpu(), torch.from_numpy(oracle))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend):
    device = skip_unless_available("reparameterize", backend)
    mean, logvar = make(4, 3, 9, device=device)
    ids = torch.tensor([3, 1, 4, 1], device=device)
    z, kl = reparameterize(mean, logvar, seed=1, sample_ids=ids, backend=backend)
    for b in range(4):
        alone = reparameterize(mean[b : b + 1], logvar[b : b + 1], seed=1, sample_ids=ids[b : b + 1], backend=backend)
        assert torch.equal(alone[0][0], z[b]) and torch.equal(alone[1][0], kl[b])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    device = skip_unless_available("reparameterize", backend)
    mean, logvar = (laid_out(t, layout) for t in make(3, 4, 5, 6, device=device))
    z, kl, *grads = check(backend, mean, logvar, seed=5)
    plain = reparameterize(mean.contiguous(), logvar.contiguous(), seed=5, backend=backend)
    assert torch.equal(z, plain[0])
    torch.testing.assert_close(kl, plain[1])  # in another order
    noise = laid_out(torch.randn(mean.shape, device=device), layout)
    check(backend, mean, logvar, noise=noise, kl="monte_carlo")


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_an_encoder_are_not_copied(backend):
    device = skip_unless_available("reparameterize", backend)
    mean, logvar = torch.randn(3, 8, 5, 6, device=device).chunk(2, dim=1)
    check(backend, mean, logvar, seed=5)
    z, _ = reparameterize(mean, logvar, seed=5, backend=backend)
    assert z.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4, 4)])
def test_empty(backend, shape):
    device = skip_unless_available("reparameterize", backend)
    for kind in KINDS:
        z, kl, dmean, dlogvar = check(backend, *make(*shape, device=device), seed=1, **kind)
        assert z.shape == dmean.shape == dlogvar.shape == shape and torch.equal(kl, torch.zeros_like(kl))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_and_not_finite_values(backend):
    device = skip_unless_available("reparameterize", backend)
    mean = torch.zeros(6, 2, device=device)
    logvar = torch.tensor([-300.0, -150, 0, 80, 200, float("nan")], device=device)[:, None].expand(6, 2)
    for kind in KINDS:
        z, kl = reparameterize(mean, logvar, seed=1, **kind, backend=backend)
        expected = reparameterize(mean, logvar, seed=1, **kind, backend="reference")
        for got, wanted in zip((z, kl), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-37, equal_nan=True)
    mean[3, 0] = float("nan")
    z, kl = reparameterize(mean, torch.zeros_like(mean), seed=1, backend=backend)
    assert z.isnan().sum() == 1 and kl.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kl_by_its_definition(backend):
    """Against torch.distributions; the Monte-Carlo estimate is unbiased, exact for a standard normal."""
    device = skip_unless_available("reparameterize", backend)
    mean, logvar = make(2, 30, device=device)
    _, kl = reparameterize(mean, logvar, seed=1, backend=backend)
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, standard).sum(1))
    _, floored = reparameterize(mean, logvar, seed=1, free_bits=0.5, backend=backend)
    torch.testing.assert_close(floored, torch.distributions.kl_divergence(posterior, standard).clamp_min(0.5).sum(1))
    draws = 60 if backend == "triton" else 4000
    many = [t[:1].expand(draws, -1) for t in (mean, logvar)]
    _, estimates = reparameterize(*many, seed=2, kl="monte_carlo", backend=backend)
    error = (estimates.mean() - kl[0]).abs() / (estimates.std() / draws**0.5)
    assert error < 4
    zero = torch.zeros_like(mean)
    assert reparameterize(zero, zero, seed=1, kl="monte_carlo", backend=backend)[1].abs().max() == 0


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape_and_strides(data):
    skip_unless_available("reparameterize", "cpu")
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4), label="shape")
    if data.draw(st.booleans(), label="long"):
        shape[-1] += data.draw(st.integers(500, 1100))
    dtype = data.draw(st.sampled_from([F32, F16, BF16]), label="dtype")
    layouts = st.sampled_from(LAYOUTS)
    mean, logvar = (laid_out(t, data.draw(layouts)) for t in make(*shape, dtype=dtype))
    draw = {"seed": data.draw(st.integers(0, 2**64 - 1))}
    if data.draw(st.booleans(), label="given"):
        draw = {"noise": laid_out(torch.randn(shape), data.draw(layouts))}
    check("cpu", mean, logvar, **draw, **data.draw(st.sampled_from(KINDS)))


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for name in NAMES:
            assert _verify.run(_registry.OPS[name], "cpu", torch.device("cpu")) == []


@needs_extension
def test_threads_and_streaming_stores_change_no_bit():
    mean, logvar = make(2, 3_300_000)  # more than the caches hold
    grad_z, grad_kl = torch.randn_like(mean), torch.randn(2)
    options = (torch.tensor(1), None, 0, None, 0.0, False)

    def run(part):
        forward = _registry.OPS["reparameterize"].overloads["cpu"](mean[part], logvar[part], *options)
        backward = _registry.OPS["reparameterize_backward"].overloads["cpu"]
        return [*forward, *backward(grad_z[part], grad_kl[part], mean[part], logvar[part], *options)]

    whole = run(slice(None))
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None)), strict=True))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a[:1], b) for a, b in zip(whole, run(slice(1)), strict=True))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradcheck(kind):
    leaves = [t.requires_grad_() for t in make(2, 3, 4, dtype=F64)]
    assert torch.autograd.gradcheck(lambda m, v: reparameterize(m, v, seed=3, **kind), leaves)


def test_the_backward_keeps_nothing_but_its_inputs():
    mean, logvar = (t.requires_grad_() for t in make(2, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        reparameterize(mean, logvar, seed=torch.tensor(3))
    assert {mean.data_ptr(), logvar.data_ptr()} <= set(saved) and len(saved) == 3  # and the seed


@pytest.mark.parametrize("unused", [0, 1])
def test_an_unused_output_counts_as_zero(unused):
    leaves = [t.requires_grad_() for t in make(2, 3, dtype=F64)]
    got = torch.autograd.grad(reparameterize(*leaves, seed=1)[1 - unused].sum(), leaves)
    z = leaves[0] + torch.exp(0.5 * leaves[1]) * eps_of((2, 3), 1)
    kl = 0.5 * (leaves[0].square() + leaves[1].exp() - 1 - leaves[1])
    expected = torch.autograd.grad((z, kl)[1 - unused].sum(), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))


def test_second_derivatives_are_refused():
    leaves = [t.requires_grad_() for t in make(2, 3)]
    with pytest.raises(RuntimeError, match="reparameterize_backward: has no backward, .*drop create_graph=True"):
        torch.autograd.grad(reparameterize(*leaves, seed=1)[1].sum(), leaves, create_graph=True)


# ---- torch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "sliced", "channels_last", "empty", "requires_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, kind, name):
    skip_unless_available(name, NAMESPACES[namespace])
    mean, logvar = make(0, 3, 4, 4) if kind == "empty" else torch.randn(2, 6, 4, 4).chunk(2, 1)
    if kind == "channels_last":
        mean, logvar = (laid_out(t, kind) for t in (mean, logvar))
    args = [mean, logvar]
    if name == "reparameterize_backward":
        args = [torch.randn_like(mean), torch.randn(mean.shape[0]), mean, logvar]
        if kind == "requires_grad":
            pytest.skip("the backward has no backward; second derivatives are refused")
    elif kind == "requires_grad":
        args = [t.clone().requires_grad_() for t in args]
    op = getattr(getattr(torch.ops, namespace), name).default
    opcheck(op, (*args, torch.tensor(3), None, 2, None, 0.0, False))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda m, v, s: reparameterize(m, v, seed=s), fullgraph=True, backend=counter)
    for seed in range(20):
        leaves = [t.requires_grad_() for t in make(2 + seed % 3, 3, 4)]
        got, expected = (
            f(*leaves, torch.tensor(seed)) for f in (compiled, lambda m, v, s: reparameterize(m, v, seed=s))
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        grads = [torch.autograd.grad([t.sum() for t in out], leaves) for out in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mean": torch.zeros(2, 3).int()}, TypeError, "mean must have dtype"),
        ({"mean": torch.zeros(())}, ValueError, "mean must be \\(B, ...\\), got a tensor without dimensions"),
        ({"logvar": torch.zeros(2, 4)}, ValueError, "logvar must be mean's shape = \\(2, 3\\), got \\(2, 4\\)"),
        ({"logvar": torch.zeros(2, 3).half()}, TypeError, "logvar must have dtype torch.float32 like mean"),
        ({"kl": "exact"}, ValueError, "kl must be one of analytic, monte_carlo, got 'exact'"),
        ({"free_bits": -1}, ValueError, "free_bits must be finite and at least 0, got -1"),
        ({"free_bits": "1"}, TypeError, "free_bits must be a float, got str"),
        ({"free_bits": 1, "kl": "monte_carlo"}, ValueError, "free_bits must be 0 with kl='monte_carlo'"),
        ({"seed": None}, ValueError, "exactly one of seed and noise must be given, got neither"),
        ({"noise": torch.zeros(2, 3)}, ValueError, "exactly one of seed and noise must be given, got both"),
        ({"seed": None, "noise": torch.zeros(2, 4)}, ValueError, "noise must be mean's shape"),
        ({"seed": None, "noise": torch.zeros(2, 3, requires_grad=True)}, RuntimeError, "detach the noise"),
        ({"step": 2**32}, ValueError, "step must be in"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"mean": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), "seed": 0}
    with pytest.raises(error, match=f"reparameterize: .*{message}"):
        reparameterize(**(good | change))
