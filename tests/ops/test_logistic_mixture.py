"""logistic_mixture: log-probabilities and gradients against float64, samples by their bits and by their frequencies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, luck, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import random, testing
from genengine.ops import (
    EXTENSION,
    _registry,
    _verify,
    logistic_mixture_log_prob,
    logistic_mixture_sample,
    uniform,
)
from genengine.ops.normal import exp_ieee, tanh_ieee
from genengine.testing.logistic_mixture import data, gradient_slack, log_prob_slack, parameters

NAMES = ("logistic_mixture_log_prob", "logistic_mixture_log_prob_backward", "logistic_mixture_sample")
NAMESPACES = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")


def make(batch=2, channels=3, k=2, pixels=(3, 5), bins=256, lowest=-3.0, dtype=F32, device="cpu"):
    x = data(None, batch, channels, pixels, bins).to(device)
    return x, parameters(None, batch, channels, k, pixels, lowest).to(device, dtype)


def check(backend, x, params, bins=256):
    """Forward and backward through the public function, against the same-dtype and the float64 reference."""
    grad = torch.randn(x.shape[0], *x.shape[2:]).to(x.device)
    results = {}
    for name, dtype in ((backend, params.dtype), ("reference", params.dtype), ("oracle", F64)):
        leaf = params.detach().to(dtype).requires_grad_()
        run = "reference" if name == "oracle" else name
        log_prob = logistic_mixture_log_prob(x, leaf, bins=bins, backend=run)
        results[name] = [log_prob.detach(), *torch.autograd.grad(log_prob, leaf, grad.to(log_prob.dtype))]
    slack = log_prob_slack(x.shape[1], params), gradient_slack(grad, x.shape[1], params)
    for i, (got, plain, exact) in enumerate(zip(*results.values(), strict=True) if backend != "reference" else ()):
        assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape
        allowed = testing.tolerance(plain, exact) + slack[i] + luck(exact)
        assert testing.error(got, exact) <= allowed, f"output {i}: {testing.error(got, exact)} > {allowed}"
    return results[backend]


def grid(bins):
    return 2 * torch.arange(bins, dtype=F64) / (bins - 1) - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_case_set(backend, name):
    device = skip_unless_available(name, backend)
    assert _verify.run(_registry.OPS[name], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition(backend):
    """log sum_k w_k prod_c (sigmoid(a) - sigmoid(b)), with the difference formed, where that loses nothing."""
    device = skip_unless_available(NAMES[0], backend)
    k, channels, bins = 2, 3, 16
    x, params = make(2, channels, k, (3, 5), bins, lowest=-2.5, device=device)
    index = torch.round((x.double() + 1) / 2 * (bins - 1))
    x64, p = 2 * index / (bins - 1) - 1, params.double()
    total = 0.0
    weights = torch.softmax(p[:, :k], 1)
    coupling = torch.tanh(p[:, k * 7 :].unflatten(1, (3, k)))
    for i in range(k):
        likelihood = weights[:, i]
        shift = (0.0, coupling[:, 0, i] * x64[:, 0], coupling[:, 1, i] * x64[:, 0] + coupling[:, 2, i] * x64[:, 1])
        for c in range(channels):
            centred = x64[:, c] - p[:, k * (1 + c) + i] - shift[c]
            inverse = torch.exp(-p[:, k * (1 + channels + c) + i])
            upper, lower = (torch.sigmoid((centred + side / (bins - 1)) * inverse) for side in (1, -1))
            upper[index[:, c] == bins - 1], lower[index[:, c] == 0] = 1, 0
            likelihood = likelihood * (upper - lower)
        total = total + likelihood
    got = logistic_mixture_log_prob(x, params, bins=bins, backend=backend)
    torch.testing.assert_close(got.double(), total.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("log_scale", [-9.0, -6.0, -2.0, 0.0, 4.0, 30.0, 100.0])
def test_bins_sum_to_one(backend, log_scale):
    device = skip_unless_available(NAMES[0], backend)
    params = torch.tensor([0.3, -1, 0.2, 0.1, log_scale, log_scale + 0.5], device=device)[None, :, None].expand(
        1, 6, 256
    )
    x = grid(256).to(device, F32)[None, None]
    log_prob = logistic_mixture_log_prob(x, params, backend=backend)
    assert log_prob.isfinite().all() and abs(log_prob.double().exp().sum().item() - 1) < 1e-4
    x = torch.cartesian_prod(*[grid(4).to(device, F32)] * 3).T[None]  # every pixel of 3 channels, and couplings
    params = make(1, 3, 2, (1,), device=device)[1].index_fill(1, torch.tensor([8, 9], device=device), log_scale)
    log_prob = logistic_mixture_log_prob(x, params.expand(1, 20, 64), bins=4, backend=backend)
    assert abs(log_prob.double().exp().sum().item() - 1) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, 2 * (F32, F16, BF16), strict=True)), ids=str)
def test_layouts(backend, layout, dtype):
    device = skip_unless_available(NAMES[0], backend)
    x, params = make(3, 2, 2, (4, 5), dtype=dtype, device=device)
    log_prob, grad = check(backend, laid_out(x, layout), laid_out(params, layout))
    plain = logistic_mixture_log_prob(
        laid_out(x, layout).contiguous(), laid_out(params, layout).contiguous(), backend=backend
    )
    assert torch.equal(log_prob, plain) and log_prob.is_contiguous()
    samples = [
        logistic_mixture_sample(t, channels=2, seed=1, backend=backend)
        for t in (laid_out(params, layout), laid_out(params, layout).contiguous())
    ]
    assert torch.equal(*samples) and samples[0].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "pixels"), [(0, (4, 4)), (2, (0, 3)), (0, ()), (3, ())])
def test_empty_and_without_pixels(backend, batch, pixels):
    device = skip_unless_available(NAMES[0], backend)
    x, params = make(batch, 3, 1, pixels, device=device)
    log_prob, grad = check(backend, x, params)
    assert log_prob.shape == (batch, *pixels) and grad.shape == params.shape
    assert logistic_mixture_sample(params, channels=3, seed=1, backend=backend).shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_values(backend):
    device = skip_unless_available(NAMES[0], backend)
    x, params = make(1, 1, 3, (20,), device=device)
    params[0, [0, 3, 6], [0, 1, 2]] = float("nan")  # a logit, a mean, a log-scale
    params[0, :2, 3] = -float("inf")
    params[0, 1:3, 4] = -float("inf")
    log_prob, grad = check(backend, x, params)
    assert log_prob.isnan().nonzero()[:, 1].tolist() == [0, 1, 2]
    assert grad[0, :, 3:].isfinite().all() and grad[0, [0, 3, 6], [0, 1, 2]].isnan().all()
    assert grad[0, [0, 3, 6, 1, 4, 7], 3].abs().max() == 0  # of components without weight
    alone = torch.cat([params[:, 2::3, 3:4], params[:, 0::3, 4:5]], 2)  # the only component left
    torch.testing.assert_close(
        log_prob[:, 3:5], logistic_mixture_log_prob(x[:, :, 3:5], alone, backend=backend), rtol=1e-5, atol=1e-5
    )
    sample = logistic_mixture_sample(params, channels=1, seed=1, backend=backend)
    expected = logistic_mixture_sample(params, channels=1, seed=1, backend="reference")
    assert torch.equal(sample.nan_to_num(7), expected.nan_to_num(7)) and sample[0, 0, 0].isnan()


@pytest.mark.parametrize("x_dtype", [F16, BF16, F32])
def test_x_may_be_16_bit(x_dtype):
    """Its bins are found all the same."""
    x, params = make(dtype=F32)
    x = (torch.round((x + 1) * 127.5) / 127.5 - 1).to(x_dtype)
    if x_dtype != F32:
        params = params.to(x_dtype)
    exact = (torch.round((x.double() + 1) * 127.5) / 127.5 - 1).float()
    assert torch.equal(logistic_mixture_log_prob(x, params), logistic_mixture_log_prob(exact, params))


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_the_quantiles_of_their_uniforms(backend):
    """With one component and one channel: x is the bin of mean + scale logit(u), by the specification's counters."""
    device = skip_unless_available(NAMES[2], backend)
    ids, bins = torch.tensor([4, 2**32 - 1], device=device), 4096
    params = make(2, 1, 1, (5, 7), device=device)[1]
    x = logistic_mixture_sample(params, channels=1, bins=bins, seed=3, sample_ids=ids, step=9, backend=backend)
    u = uniform((2, 70), seed=3, sample_ids=ids, step=9, backend="reference", device=device)
    oracle = torch.from_numpy(random.uniform(70, seed=3, sample=4, step=9, stream="uniform"))
    assert torch.equal(u[0].cpu(), oracle)
    exact = params[:, 1].double() + params[:, 2].double().exp() * torch.logit(u[:, 1::2].double()).view(2, 5, 7)
    assert (x[:, 0].double() - exact.clamp(-1, 1)).abs().max() < 1.01 / (bins - 1)
    assert torch.equal(x, (2 * torch.round((x.double() + 1) / 2 * (bins - 1)) / (bins - 1) - 1).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("channels", "bins"), [(1, 8), (3, 3)])
def test_frequencies_by_chi_square(backend, channels, bins):
    device = skip_unless_available(NAMES[2], backend)
    count = 3000 if backend == "triton" else 40_000
    params = make(1, channels, 3, (1,), lowest=-2.5, device=device)[1].expand(-1, -1, count)
    samples = logistic_mixture_sample(params, channels=channels, bins=bins, seed=11, backend=backend)
    index = torch.round((samples[0].double() + 1) / 2 * (bins - 1)).long()
    cell = sum(index[c] * bins ** (channels - 1 - c) for c in range(channels))
    observed = torch.bincount(cell, minlength=bins**channels).double()
    every = torch.cartesian_prod(*[grid(bins)] * channels).reshape(-1, channels).T[None].to(device)
    one = params[:, :, :1].double().expand(-1, -1, bins**channels)
    expected = count * logistic_mixture_log_prob(every, one, bins=bins, backend="reference").exp()[0]
    common = expected > 5
    rest = [(values[common], values[~common].sum()[None]) for values in (observed, expected)]
    observed, expected = (torch.cat(parts) for parts in rest)
    chi_square = ((observed - expected).square() / expected.clamp_min(1)).sum().item()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_its_batch(backend):
    device = skip_unless_available(NAMES[2], backend)
    params, ids = make(4, 3, 2, (3, 3), device=device)[1], torch.tensor([3, 1, 4, 1], device=device)
    together = logistic_mixture_sample(params, channels=3, seed=2**64 - 1, sample_ids=ids, backend=backend)
    for b in range(4):
        part = slice(b, b + 1)
        alone = logistic_mixture_sample(params[part], channels=3, seed=2**64 - 1, sample_ids=ids[part], backend=backend)
        assert torch.equal(alone[0], together[b])


def test_temperature():
    """Cold: the mean of the likeliest component, on its bin. Hot: far from it."""
    params = make(2, 1, 3, (6, 6), dtype=F32)[1]
    cold = logistic_mixture_sample(params, channels=1, seed=1, temperature=1e-6)
    mean = params[:, 3:6].gather(1, params[:, :3].argmax(1, keepdim=True)).clamp(-1, 1)
    assert (cold - mean).abs().max() < 1.01 / 255
    hot = logistic_mixture_sample(params, channels=1, seed=1, temperature=100.0)
    assert hot.abs().mean() > 0.8


def test_exponential_and_tanh_by_ieee_operations():
    x = torch.cat([torch.linspace(-87, 88, 20001), torch.tensor([-1e9, 1e9, 0.0, -0.0])])
    assert np.array_equal(exp_ieee(x).numpy(), random.exp_ieee(x.numpy()))
    bounded = x.double().clamp(-87, 88)
    assert (exp_ieee(x).double() / bounded.exp() - 1).abs().max() < 2e-7
    assert (tanh_ieee(x).double() - x.double().tanh()).abs().max() < 2e-7
    assert exp_ieee(torch.tensor([float("nan")])).isnan() and tanh_ieee(torch.tensor([float("nan")])).isnan()


# ---- any inputs, instruction sets and threads ------------------------------------------------------------------------


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape_and_strides(data):
    skip_unless_available(NAMES[0], "cpu")
    batch, channels, k = (data.draw(st.integers(*ends)) for ends in ((0, 4), (1, 4), (1, 6)))
    pixels = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3), label="pixels"))
    bins = data.draw(st.sampled_from([2, 3, 16, 256, 65536]), label="bins")
    dtype = data.draw(st.sampled_from([F32, F16, BF16]), label="dtype")
    lowest = data.draw(st.sampled_from([-9.0, -3.0]), label="lowest")
    layouts = st.sampled_from(LAYOUTS)
    x, params = make(batch, channels, k, pixels, bins, lowest, dtype)
    x, params = (laid_out(t, data.draw(layouts)) for t in (x, params))
    check("cpu", x, params, bins)
    options = {
        "channels": channels,
        "bins": bins,
        "seed": data.draw(st.integers(0, 2**64 - 1)),
        "step": data.draw(st.integers(0, 2**32 - 1)),
        "temperature": data.draw(st.floats(0.01, 10)),
    }
    samples = [logistic_mixture_sample(params, **options, backend=name) for name in ("cpu", "reference")]
    assert torch.equal(*samples)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for name in NAMES:
            assert _verify.run(_registry.OPS[name], "cpu", torch.device("cpu")) == []


@needs_extension
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_threads_change_no_bit(layout):
    x, params = make(4, 3, 5, (20, 21))
    params, grad = laid_out(params, layout), torch.randn(4, 20, 21)
    calls = [(x, params, 256), (grad, x, params, 256), (params, 3, 256, 1.0, torch.tensor(3), None, 0)]

    def run():
        return [_registry.OPS[name].overloads["cpu"](*args) for name, args in zip(NAMES, calls, strict=True)]

    one = run()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))
    finally:
        torch.set_num_threads(1)


# ---- gradients and torch's own checks --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gradcheck(channels):
    x, params = make(2, channels, 2, (2,), bins=16, lowest=-7.5, dtype=F64)
    assert torch.autograd.gradcheck(lambda p: logistic_mixture_log_prob(x, p, bins=16), params.requires_grad_())


def test_gradients_stop_where_they_must():
    x, params = make()
    params.requires_grad_()
    with pytest.raises(RuntimeError, match="has no backward, .*drop create_graph=True"):
        torch.autograd.grad(logistic_mixture_log_prob(x, params).sum(), params, create_graph=True)
    with pytest.raises(RuntimeError, match="logistic_mixture_log_prob: .*x is data"):
        logistic_mixture_log_prob(x.requires_grad_(), params)
    with pytest.raises(RuntimeError, match="logistic_mixture_sample: has no backward"):
        logistic_mixture_sample(params, channels=3, seed=1)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "channels_last", "empty", "requires_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, kind, name):
    skip_unless_available(name, NAMESPACES[namespace])
    x, params = make(0 if kind == "empty" else 2, 2, 1, (3, 2))
    params = laid_out(params, kind)
    if kind == "requires_grad":
        if name != NAMES[0]:
            pytest.skip(f"{name} has no backward: gradients are refused")
        params = params.clone().requires_grad_()
    args = {
        NAMES[0]: (x, params, 256),
        NAMES[1]: (torch.randn(x.shape[0], 3, 2), x, params, 256),
        NAMES[2]: (params, 2, 256, 0.9, torch.tensor(3), None, 2),
    }
    opcheck(getattr(getattr(torch.ops, namespace), name).default, args[name])


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x, params, seed):
        return logistic_mixture_log_prob(x, params), logistic_mixture_sample(params.detach(), channels=3, seed=seed)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for seed in range(20):
        x, params = make(2 + seed % 3, 3, 2, (4, 4))
        params.requires_grad_()
        got, expected = (f(x, params, torch.tensor(seed)) for f in (compiled, run))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        grads = [torch.autograd.grad(out[0].sum(), params)[0] for out in (got, expected)]
        assert torch.equal(*grads)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": torch.zeros(2, 10, 4).int()}, TypeError, "params must have dtype"),
        ({"x": torch.zeros(2, 3, 4).half()}, TypeError, "x must have dtype torch.float32, got torch.float16"),
        ({"x": torch.zeros(2, 3, 5)}, ValueError, "of the same batch and pixels, got \\(2, 3, 5\\) and \\(2, 10, 4\\)"),
        ({"x": torch.zeros(2)}, ValueError, "x must be \\(B, C, ...\\)"),
        ({"x": torch.zeros(2, 5, 4)}, ValueError, "C must be 1 to 4, got 5"),
        ({"params": torch.zeros(2, 11, 4)}, ValueError, "a multiple of 10 for C = 3, got P = 11"),
        ({"params": torch.zeros(2, 0, 4)}, ValueError, "a multiple of 10 for C = 3, got P = 0"),
        ({"bins": 1}, ValueError, "bins must be 2 to 65536, got 1"),
        ({"bins": 2.0}, TypeError, "bins must be an int, got float"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"x": torch.zeros(2, 3, 4), "params": torch.zeros(2, 10, 4)}
    with pytest.raises(error, match=f"logistic_mixture_log_prob: .*{message}"):
        logistic_mixture_log_prob(**(good | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": torch.zeros(10)}, ValueError, "params must be \\(B, P, ...\\)"),
        ({"channels": 0}, ValueError, "C must be 1 to 4, got 0"),
        ({"channels": 3.0}, TypeError, "channels must be an int, got float"),
        ({"channels": 4}, ValueError, "a multiple of 15 for C = 4, got P = 10"),
        ({"temperature": 0}, ValueError, "temperature must be in \\[1e-6, 1e6\\], got 0"),
        ({"temperature": "1"}, TypeError, "temperature must be a float, got str"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"step": 2**32}, ValueError, "step must be in"),
        ({"sample_ids": torch.zeros(3).long()}, ValueError, "sample_ids must be"),
    ],
)
def test_bad_sampling_arguments(change, error, message):
    good = {"params": torch.zeros(2, 10, 4), "channels": 3, "seed": 0}
    with pytest.raises(error, match=f"logistic_mixture_sample: .*{message}"):
        logistic_mixture_sample(**(good | change))
