"""guidance_moments: six sums of a sample's two branches against float64, with the same bits in any batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, guidance_moments
from genengine.ops.guidance_moments import MOMENTS
from genengine.testing.guidance_moments import moments_slack

KERNELS = [parameter for parameter in BACKENDS if parameter != "reference"]


def textbook(u, c):
    """The sums one by one in float64."""
    rows = []
    for a, b in zip(u.double().cpu(), c.double().cpu(), strict=True):
        a, b = a.reshape(-1), b.reshape(-1)
        rows.append([a.sum(), b.sum(), a @ a, a @ b, b @ b, (b - a) @ (b - a)])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(u), len(MOMENTS))


def check(got, u, c):
    assert got.dtype == torch.float32 and got.shape == (len(u), len(MOMENTS))
    assert testing.error(got.cpu(), textbook(u, c)) <= moments_slack(u.cpu(), c.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    device = skip_unless_available("guidance_moments", backend)
    assert _verify.run(_registry.OPS["guidance_moments"], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 17), (2, 4, 6, 6), (1, 5, 29, 29), (2,), (2, 3, 75, 75)], ids=str)
def test_against_float64(backend, dtype, shape):
    device = skip_unless_available("guidance_moments", backend)
    u, c = (torch.randn(shape).to(device, dtype) for _ in range(2))
    check(guidance_moments([u, c], backend=backend), u, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    device = skip_unless_available("guidance_moments", backend)
    u, c = torch.randn(3, 4, 5, 7).to(device), torch.randn(3, 4, 5, 7).to(device)
    u, plain = laid_out(u, layout), c.clone()
    check(guidance_moments([u, laid_out(c, layout)], backend=backend), u, laid_out(c, layout))
    check(guidance_moments([u, plain], backend=backend), u, plain)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(5, 3, 7, 5), (5, 4, 8, 8), (5, 3, 80, 80)], ids=str)
def test_a_sample_has_the_same_bits_in_any_batch(backend, shape):
    device = skip_unless_available("guidance_moments", backend)
    u, c = torch.randn(shape, device=device), torch.randn(shape, device=device)
    whole = guidance_moments([u, c], backend=backend)
    assert torch.equal(guidance_moments(torch.cat([u, c]), backend=backend), whole)
    for split in ((1, 4), (2, 3)):
        parts = zip(u.split(split), c.split(split), strict=True)
        assert torch.equal(torch.cat([guidance_moments([a, b], backend=backend) for a, b in parts]), whole)
    for b in range(5):  # a sample alone may be unaligned, as it is within the batch
        assert torch.equal(guidance_moments([u[b : b + 1], c[b : b + 1]], backend=backend)[0], whole[b])


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        assert _verify.run(_registry.OPS["guidance_moments"], "cpu", torch.device("cpu")) == []


def test_threads_change_no_bit():
    u, c = torch.randn(3, 4, 130, 131), torch.randn(3, 4, 130, 131)
    expected = guidance_moments([u, c])
    torch.set_num_threads(2)
    try:
        assert torch.equal(guidance_moments([u, c]), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_branches_keep_their_distance(backend):
    """(c - u)^2 is summed from the differences: from u^2, u c and c^2 it would be lost."""
    device = skip_unless_available("guidance_moments", backend)
    u = 100 + torch.randn(2, 4, 16, 16, device=device)
    c = u + 1e-3 * torch.randn(2, 4, 16, 16, device=device)
    distance = guidance_moments([u, c], backend=backend)[:, 5].cpu()
    assert ((distance - textbook(u, c)[:, 5]) / textbook(u, c)[:, 5]).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    device = skip_unless_available("guidance_moments", backend)
    for shape in ((0, 3, 4), (2, 0, 4)):
        x = torch.zeros(shape, device=device)
        assert torch.equal(guidance_moments([x, x], backend=backend), torch.zeros(shape[0], 6, device=device))


def test_float64_runs_on_the_reference():
    u, c = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    got = guidance_moments([u, c])
    assert got.dtype == torch.float64 and torch.allclose(got, textbook(u, c), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("namespace", ["genengine", "genengine_triton", "genengine_reference"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3)], ids=str)
def test_opcheck(namespace, shape):
    opcheck(getattr(torch.ops, namespace).guidance_moments.default, (torch.randn(shape), torch.randn(shape)))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(guidance_moments, fullgraph=True, backend=counter)
    for _ in range(20):
        outputs = torch.randn(4, 3, 5)
        assert torch.equal(compiled(outputs), guidance_moments(outputs))
    assert counter.frame_count <= 2


@pytest.mark.fuzz
@given(batch=st.integers(0, 4), inner=st.lists(st.integers(0, 40), max_size=3), seed=st.integers(0, 2**32))
def test_any_shape(batch, inner, seed):
    skip_unless_available("guidance_moments", "cpu")
    generator = torch.Generator().manual_seed(seed)
    u, c = (torch.randn(batch, *inner, generator=generator) for _ in range(2))
    check(guidance_moments([u, c], backend="cpu"), u, c)


X = torch.zeros(2, 3)
BAD = [
    ([X], ValueError, "outputs must hold 2 branches, unconditional first, got 1"),
    ([X, X, X], ValueError, "outputs must hold 2 branches, unconditional first, got 3"),
    (torch.zeros(3, 4), ValueError, "outputs must stack two branches \\(2 B, ...\\), got \\(3, 4\\)"),
    ([X.long(), X], TypeError, "outputs\\[0\\] must have dtype"),
    ([X, X.half()], TypeError, "outputs\\[1\\] must have dtype torch.float32 like outputs\\[0\\]"),
    ([X, X[:1]], ValueError, "outputs\\[1\\] must be the shape of outputs\\[0\\] = \\(2, 3\\), got \\(1, 3\\)"),
    ([X, X.to("meta")], ValueError, "outputs\\[1\\] must be on cpu"),
    ([torch.tensor(1.0)] * 2, ValueError, "outputs must be \\(B, ...\\), got tensors .*; add a batch with \\[None\\]"),
]


@pytest.mark.parametrize(("outputs", "error", "message"), BAD)
def test_bad_arguments(outputs, error, message):
    with pytest.raises(error, match=f"guidance_moments: {message}"):
        guidance_moments(outputs)


def test_no_silent_zero_gradient():
    with pytest.raises(RuntimeError, match="guidance_moments: has no backward"):
        guidance_moments([X.clone().requires_grad_(), X])
