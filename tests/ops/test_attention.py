"""attention: every backend within the reference's error of float64, forward and backward, any strides; torch agrees."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import _registry, attention
from genengine.testing.attention import LSE_SLACK, roundings

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = [F32, F16, BF16]
NAMESPACES = ("genengine", "genengine_triton", "genengine_reference")
BACKEND_OF = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}


def make(batch=2, queries=5, keys=5, heads=3, dim=8, dtype=F32, device="cpu"):
    """q, k, v and the gradient of o; views into one packed projection where queries and keys are as many."""
    draw = lambda *shape: torch.randn(*shape).to(device, dtype)  # noqa: E731
    q = draw(batch, queries, 3, heads, dim)
    k, v = q.unbind(2)[1:] if keys == queries else draw(batch, keys, 2, heads, dim).unbind(2)
    return q[:, :, 0], k, v, draw(batch, queries, heads, dim)


def wide(arguments):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]


def check(backend, q, k, v, grad_o, causal=False, scale=None):
    """Forward and backward against the same-dtype reference and the float64 one."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forward, backward = (_registry.OPS[name].overloads for name in ("attention", "attention_backward"))
    extra = roundings(q, k, v, grad_o, causal, scale)
    args = (q, k, v, causal, scale)
    eager, oracle = forward["reference"](*args), forward["reference"](*wide(args))
    compare(backend, ("o", "lse"), forward[backend](*args), eager, oracle, extra)
    args = (grad_o, q, k, v, *eager, causal, scale)
    eager, oracle = backward["reference"](*args), backward["reference"](*wide(args))
    compare(backend, ("dq", "dk", "dv"), backward[backend](*args), eager, oracle, extra)


def compare(backend, names, got, eager, oracle, extra):
    dtype = eager[0].dtype
    for name, value, plain, exact in zip(names, got, eager, oracle, strict=True):
        assert value.is_contiguous() and value.dtype == plain.dtype and value.shape == exact.shape
        allowed = testing.tolerance(plain, exact) + extra[name]
        if backend == "cpu" and name == "lse" and dtype.itemsize == 2:
            allowed += LSE_SLACK
        if dtype == BF16 and _registry.triton_interpreted() and backend == "triton" and exact.numel():
            allowed += torch.finfo(BF16).eps * exact.abs().max().item()  # the interpreter truncates to bfloat16
        assert testing.error(value, exact) <= allowed, f"{name}: {testing.error(value, exact)} > {allowed}"


# N, M, causal: one key, one query, cut and whole blocks, several blocks of both, all with a head dim of their own
SHAPES = [(1, 1, True), (1, 9, False), (9, 1, False), (7, 33, False), (70, 33, False), (64, 64, True), (70, 70, True)]
DIMS = [1, 8, 16, 40, 64, 72, 80, 96, 128, 160, 192, 256]


@pytest.mark.parametrize("backend", BACKENDS[1:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_against_float64(backend, dtype, dim):
    device = skip_unless_available("attention", backend)
    for index, (queries, keys, causal) in enumerate(SHAPES):
        if backend == "cpu" or (index + DIMS.index(dim) + 2 * DTYPES.index(dtype)) % 7 == 0:  # the interpreter is slow
            tensors = make(1, queries, keys, 2, dim, dtype, device)
            check(backend, *tensors, causal, [None, 0.3, 1.5][index % 3])


@pytest.mark.triton
@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(33, 33, True), (64, 64, True), (17, 90, False), (90, 17, False), (48, 64, False)]
)
def test_any_blocks(blocks, queries, keys, causal, monkeypatch):
    """Blocks of queries longer and shorter than those of keys, and sizes that they divide and do not."""
    device = skip_unless_available("attention", "triton")
    from genengine.kernels import attention as kernels

    monkeypatch.setattr(kernels, "config", lambda *where: (*blocks, 4, 1))
    check("triton", *make(1, queries, keys, 1, 24, F32, device), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [8, 72])
def test_the_reference_is_the_formula_and_torch_agrees(causal, dim):
    """softmax(q k^T * scale) v, its log-sum-exp, and autograd's gradients, all in float64."""
    q, k, v, grad_o = (t.double() for t in make(dim=dim))
    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
    scores = 0.3 * leaves[0] @ leaves[1].mT
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    o = (scores.softmax(-1) @ leaves[2]).transpose(1, 2)
    grads = [g.transpose(1, 2) for g in torch.autograd.grad(o, leaves, grad_o)]
    got, lse = attention(q, k, v, causal=causal, scale=0.3, return_lse=True, backend="reference")
    torch.testing.assert_close((got, lse), (o, scores.logsumexp(-1)), rtol=1e-12, atol=1e-12)
    found = _registry.OPS["attention_backward"].overloads["reference"](grad_o, q, k, v, got, lse, causal, 0.3)
    torch.testing.assert_close(list(found), grads, rtol=1e-12, atol=1e-12)
    torchs = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS[:2], BACKENDS[3]])
def test_case_set(backend):
    """The case set of the Triton kernels takes the interpreter minutes: its shapes are those of this file."""
    from genengine.ops import _verify

    device = skip_unless_available("attention", backend, BF16)
    for name in ("attention", "attention_backward"):
        assert _verify.run(_registry.OPS[name], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_large_scores_do_not_overflow(backend):
    device = skip_unless_available("attention", backend)
    q, k, v, _ = make(1, 6, 6, 1, 16, F32, device)
    for causal in (False, True):
        o, lse = attention(q * 300, k * 300, v, causal=causal, return_lse=True, backend=backend)
        scores = torch.einsum("bnhd,bmhd->bhnm", q.double() * 300, k.double() * 300) / 4
        if causal:
            scores = scores.masked_fill(torch.ones(6, 6, device=device).triu(1).bool(), -math.inf)
        assert scores.abs().amax() > 1e4 and o.isfinite().all()
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_nan_stays_in_its_query(backend):
    device = skip_unless_available("attention", backend)
    q, k, v, _ = (t.clone() for t in make(1, 5, 5, 2, 8, F32, device))
    whole = attention(q, k, v, backend=backend)
    q[0, 3, 1, 0] = float("nan")
    o = attention(q, k, v, backend=backend)
    changed = o[0, 3, 1].clone()
    assert (changed == 0).all() if backend == "cpu" else changed.isnan().all()  # torch's own kernel gives zeros
    o[0, 3, 1] = whole[0, 3, 1]
    assert torch.equal(o, whole)


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"queries": 0, "keys": 0}, {"heads": 0}], ids=str)
def test_empty(backend, shape):
    device = skip_unless_available("attention", backend)
    leaves = [t.clone().requires_grad_() for t in make(**shape, device=device)[:3]]
    o, lse = attention(*leaves, return_lse=True, backend=backend)
    batch, queries, heads, _ = leaves[0].shape
    assert o.shape == leaves[0].shape and lse.shape == (batch, heads, queries)
    grads = torch.autograd.grad(o.sum(), leaves)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:3])
@pytest.mark.parametrize("kind", ["sliced", "permuted", "expanded", "unaligned"])
@pytest.mark.parametrize("dim", [8, 17])
def test_strides(backend, kind, dim):
    device = skip_unless_available("attention", backend)
    for dtype in (F32, F16):
        q, k, v, grad_o = (laid_out(t, kind) for t in make(2, 5, 7, 3, dim, dtype, device))
        check(backend, q, k, v, grad_o)


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_views_are_read_and_not_copied(backend, monkeypatch):
    device = skip_unless_available("attention", backend)
    q, k, v, grad_o = make(2, 6, 6, 4, 8, F32, device)
    assert not q.is_contiguous()
    contiguous = torch.Tensor.contiguous

    def refuse(tensor):
        assert tensor.stride(-1) == 1 and contiguous(tensor).data_ptr() == tensor.data_ptr(), "an input was copied"
        return tensor

    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: refuse(t) if t.dim() == 4 else contiguous(t))
    o, lse = _registry.OPS["attention"].overloads[backend](q, k, v, True, 0.5)
    _registry.OPS["attention_backward"].overloads[backend](grad_o, q, k, v, o, lse, True, 0.5)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape_and_strides(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, heads, dim, queries = draw(0, 3), draw(0, 3), draw(1, 100), draw(0, 70)
    causal = data.draw(st.booleans())
    keys = queries if causal else draw(1, 70)
    tensors = make(batch, queries, keys, heads, dim, data.draw(st.sampled_from(DTYPES)))
    kinds = st.sampled_from(["plain", "sliced", "permuted", "expanded", "unaligned"])
    tensors = [laid_out(t, data.draw(kinds)) for t in tensors]
    check("cpu", *tensors, causal, data.draw(st.sampled_from([None, 0.1, 1.0])))


@pytest.mark.parametrize("backend", BACKENDS[1:3])
def test_reruns_threads_and_batch_splits_agree_bit_for_bit(backend):
    device = skip_unless_available("attention", backend)
    q, k, v, grad_o = make(3, 40, 40, 2, 24, F32, device)
    forward, backward = (_registry.OPS[name].overloads[backend] for name in ("attention", "attention_backward"))

    def all_of(*tensors):
        q, k, v, grad_o = tensors
        o, lse = forward(q, k, v, True, 0.2)
        return [o, lse, *backward(grad_o, q, k, v, o, lse, True, 0.2)]

    once = all_of(q, k, v, grad_o)
    torch.set_num_threads(2)
    try:
        again = all_of(q, k, v, grad_o)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    alone = all_of(*(t[1:2] for t in (q, k, v, grad_o)))
    assert all(torch.equal(a[1:2], b) for a, b in zip(once, alone, strict=True))


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    leaves = [t.double().requires_grad_() for t in make(queries=3, keys=3, dim=2)[:3]]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, causal=causal), leaves)


@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_go_through_the_backend(backend, dtype):
    device = skip_unless_available("attention", backend)
    *tensors, grad_o = make(dtype=dtype, device=device)
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, lse = attention(*leaves, return_lse=True, backend=backend)
    assert o.requires_grad and not lse.requires_grad
    grads = torch.autograd.grad(o, leaves, grad_o)
    expected = _registry.OPS["attention_backward"].overloads[backend](grad_o, *tensors, o.detach(), lse, False, 8**-0.5)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(grads, expected, strict=True))


def test_training_does_not_run_the_forward_again(monkeypatch):
    op = torch.ops.genengine.attention.default
    calls = []
    monkeypatch.setitem(_registry.OPS["attention"].overloads, "cpu", lambda *a: calls.append(1) or op(*a))
    leaves = [t.detach().requires_grad_() for t in make()[:3]]
    attention(*leaves, return_lse=True)[0].sum().backward()
    assert calls == [1] and all(t.grad is not None for t in leaves)


def test_without_its_lse_the_cpu_runs_torchs_own_op():
    """As torch differentiates, compiles and exports it: nothing of ours stands in between."""
    leaves = [t.detach().requires_grad_() for t in make()[:3]]
    o = attention(*leaves)
    assert torch.equal(o, attention(*leaves, return_lse=True)[0])
    nodes, names = [o.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert any(name.startswith("ScaledDotProduct") for name in names), names


def test_second_derivatives_are_refused():
    leaves = [t.detach().requires_grad_() for t in make()[:3]]
    with pytest.raises(RuntimeError, match="attention_backward: has no backward, .*drop create_graph=True"):
        torch.autograd.grad(attention(*leaves, return_lse=True)[0].square().sum(), leaves, create_graph=True)


# ---- torch's own checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "permuted", "expanded", "empty", "requires_grad"])
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_opcheck(namespace, kind, name):
    skip_unless_available(name, BACKEND_OF[namespace])
    q, k, v, grad_o = (laid_out(t, kind) for t in make(0 if kind == "empty" else 2, 4, 6))
    if kind == "empty":  # opcheck cannot copy an empty view of an empty tensor
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    args = (q, k, v, False, 0.5)
    if name == "attention_backward":
        if kind == "requires_grad":
            pytest.skip("attention_backward has no backward; attention refuses second derivatives")
        args = (grad_o, q, k, v, *_registry.OPS["attention"].overloads["reference"](*args), False, 0.5)
    elif kind == "requires_grad":
        args = (*(t.clone().requires_grad_() for t in (q, k, v)), False, 0.5)
    opcheck(getattr(getattr(torch.ops, namespace), name).default, args)


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5):
        leaves = [t.detach().requires_grad_() for t in make(batch=batch)[:3]]
        got, expected = compiled(*leaves), attention(*leaves)
        assert torch.equal(got, expected)
        grads = [torch.autograd.grad(o, leaves, torch.ones_like(o)) for o in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_nothing(backend):
    q, k, v, _ = make()
    with torch.autocast("cpu", dtype=BF16):
        o = attention(q, k, v, backend=backend)
    assert torch.equal(o, attention(q, k, v, backend=backend))


# ---- arguments -----------------------------------------------------------------------------------------------------

Q = torch.ones(2, 3, 4, 8)
MESSAGES = [
    ({"q": None}, TypeError, "attention: q must be a tensor, got NoneType"),
    ({"v": Q.long()}, TypeError, "attention: v must have dtype .*got torch.int64"),
    ({"k": Q[0]}, ValueError, r"attention: k must be \(B, N, H, D\), got \(3, 4, 8\)"),
    ({"q": torch.ones(2, 3, 4, 257)}, ValueError, "attention: q must have a head dim D in 1..256, got 257"),
    ({"k": torch.ones(2, 3, 2, 8)}, ValueError, r"attention: k must be \(B, M, H, D\) = \(2, 3, 4, 8\), got"),
    ({"v": torch.ones(2, 5, 4, 8)}, ValueError, r"attention: v must be \(B, M, H, D\) = \(2, 3, 4, 8\), got"),
    ({"k": Q.half()}, TypeError, "attention: k must have dtype torch.float32 like q, got torch.float16"),
    ({"k": Q.to("meta")}, ValueError, "attention: k must be on cpu like q, got meta"),
    ({"causal": 1}, TypeError, "attention: causal must be a bool, got int"),
    ({"return_lse": None}, TypeError, "attention: return_lse must be a bool, got NoneType"),
    ({"q": Q[:, :2], "causal": True}, ValueError, "causal needs as many keys as queries, N = 2, got M = 3"),
    ({"k": Q[:, :0], "v": Q[:, :0]}, ValueError, "attention: k must hold at least one key, got M = 0"),
    ({"scale": "big"}, TypeError, "attention: scale must be a float or None, got str"),
    ({"scale": -0.5}, ValueError, r"attention: scale must be in 1e-30 .. 1e\+30, got -0.5; put a sign into q"),
    ({"scale": math.nan}, ValueError, r"attention: scale must be in 1e-30 .. 1e\+30, got nan"),
    (
        {"backend": "cuda"},
        RuntimeError,
        "attention: backend 'cuda' cannot run here: it runs on cuda tensors",
    ),
    ({"backend": "gpu"}, ValueError, "attention: backend must be one of reference, cpu, triton, cuda or None"),
]


@pytest.mark.parametrize(("change", "error", "message"), MESSAGES)
def test_error_messages(change, error, message):
    with pytest.raises(error, match=message):
        attention(**({"q": Q, "k": Q, "v": Q} | change))


def test_float64_has_no_kernel():
    q = Q.double()
    o, lse = attention(q, q, q, return_lse=True)
    assert o.dtype == lse.dtype == F64
    with pytest.raises(RuntimeError, match="attention: backend 'cpu' cannot run here: its kernels take"):
        attention(q, q, q, backend="cpu")
