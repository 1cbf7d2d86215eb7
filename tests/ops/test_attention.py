"""attention: the softmax formula in float64, self, cross and causal."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import attention


def formula(q, k, v, causal=False, scale=None):
    """softmax(q k^T * scale) v in float64, (B, N, H, D)."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))  # (B, H, N, D)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def make(batch=2, queries=5, keys=5, heads=3, dim=8, dtype=torch.float32):
    return tuple(torch.randn(batch, n, heads, dim).to(dtype) for n in (queries, keys, keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3}, {"causal": True, "scale": 2}], ids=str)
@pytest.mark.parametrize("dim", [1, 8, 72, 256])
def test_against_the_formula(dtype, options, dim):
    q, k, v = make(dim=dim, dtype=dtype)
    o = attention(q, k, v, **options)
    assert o.dtype == dtype and o.is_contiguous()
    # A score sums D products in float32 and errs by u scale |q|.|k|, its weight by as much relatively; a weight may
    # then be rounded to 16 bits, and the result is. Numerator and denominator each: twice.
    exact = formula(q, k, v, **options)
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    sizes = torch.einsum("bnhd,bmhd->bhnm", q.double().abs(), k.double().abs()).max() * options.get("scale", dim**-0.5)
    allowed = 2 * v.double().abs().max() * (torch.finfo(dtype).eps + arithmetic.eps * sizes)
    assert testing.error(o, exact) <= allowed.item()


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (9, 1), (7, 33)])
def test_cross(queries, keys):
    q, k, v = make(queries=queries, keys=keys)
    torch.testing.assert_close(attention(q, k, v).double(), formula(q, k, v), rtol=1e-5, atol=1e-6)


def test_views_into_one_projection():
    q, k, v = torch.randn(2, 6, 3, 4, 8).unbind(2)  # strided views of (B, N, 3, H, D)
    dense = [t.contiguous() for t in (q, k, v)]
    torch.testing.assert_close(attention(q, k, v), attention(*dense))


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"heads": 0}])
def test_empty(shape):
    q, k, v = make(**shape)
    assert attention(q, k, v).shape == q.shape


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    leaves = [t.requires_grad_() for t in make(queries=3, keys=3, dim=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, causal=causal), leaves)


def test_what_torch_cannot_differentiate_is_refused_by_torch():
    """Second derivatives and forward mode: torch's own errors, never a silent zero."""
    leaves = [t.requires_grad_() for t in make()]
    grads = torch.autograd.grad(attention(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(g.sum() for g in grads), leaves)
    q, k, v = (t.detach() for t in leaves)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda t: attention(t, k, v), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("namespace", ["genengine", "genengine_reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(namespace, grad):
    tensors = [t.requires_grad_(grad) for t in make(queries=4, keys=6)]
    opcheck(getattr(torch.ops, namespace).attention.default, (*tensors, False, 0.5))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for batch in (2, 3, 4):
        leaves = [t.requires_grad_() for t in make(batch=batch)]
        got, expected = compiled(*leaves), attention(*leaves)
        torch.testing.assert_close(got, expected)
        got.sum().backward()
    assert counter.frame_count <= 2


Q = torch.ones(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "attention: q must be a tensor, got NoneType"),
        ({"v": Q.long()}, TypeError, "attention: v must have dtype .*got torch.int64"),
        ({"k": Q[0]}, ValueError, r"attention: k must be \(B, N, H, D\), got \(3, 4, 8\)"),
        ({"q": torch.ones(2, 3, 4, 257)}, ValueError, "attention: q must have a head dim D in 1..256, got 257"),
        ({"k": torch.ones(2, 3, 2, 8)}, ValueError, r"attention: k must be \(B, M, H, D\) = \(2, 3, 4, 8\), got"),
        ({"v": torch.ones(2, 5, 4, 8)}, ValueError, r"attention: v must be \(B, M, H, D\) = \(2, 3, 4, 8\), got"),
        ({"k": Q.half()}, TypeError, "attention: k must have dtype torch.float32 like q, got torch.float16"),
        ({"k": Q.to("meta")}, ValueError, "attention: k must be on cpu like q, got meta"),
        ({"causal": 1}, TypeError, "attention: causal must be a bool, got int"),
        ({"q": Q[:, :2], "causal": True}, ValueError, "causal needs as many keys as queries, N = 2, got M = 3"),
        ({"k": Q[:, :0], "v": Q[:, :0]}, ValueError, "attention: k must hold at least one key, got M = 0"),
        ({"scale": "big"}, TypeError, "attention: scale must be a float or None, got str"),
        ({"backend": "cpu"}, RuntimeError, "attention: backend 'cpu' cannot run here: attention has no cpu kernel"),
    ],
)
def test_error_messages(change, error, message):
    with pytest.raises(error, match=message):
        attention(**({"q": Q, "k": Q, "v": Q} | change))
