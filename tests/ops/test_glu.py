"""geglu, swiglu: every backend within the reference's error of float64, forward and backward, rows with gaps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, as_tuple, laid_out, luck, skip_unless_available
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, geglu, swiglu

NAMES = ("glu", "glu_backward")
NAMESPACES = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
KINDS = ("gelu", "gelu_tanh", "silu")


def make(batch, tokens, dim, dtype=F32, narrow=F32, device="cpu", biased=True):
    draw = lambda kind, *size: torch.randn(*size).to(device, kind)  # noqa: E731
    tensors = {"grad": draw(dtype, batch, tokens, dim), "x": draw(dtype, batch, tokens, 2 * dim)}
    return tensors | {"bias": draw(narrow, 2 * dim) if biased else None}


def magnitude(args):
    """The largest |gate| |value|, times the gradient's largest."""
    *grad, x, bias = (t if t is None else t.double().abs() for t in args)
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return (gate * value).max().item() if not grad else (gate + value).max().item() * grad[0].max().item()


def check(name, backend, tensors, *options, few=False):
    """One op against the same-dtype reference and the float64 one; few: of a property test, see `luck`."""
    run = _registry.OPS[name].overloads
    args = [tensors[key] for key in (("x", "bias") if name == "glu" else ("grad", "x", "bias"))]
    wide = [t if t is None else t.double() for t in args]
    got, eager = (as_tuple(run[which](*args, *options)) for which in (backend, "reference"))
    oracle = as_tuple(run["reference"](*wide, *options))
    for i, (value, plain, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        assert value.is_contiguous() and value.dtype == plain.dtype and value.shape == exact.shape
        allowed = testing.tolerance(plain, exact) + (luck(exact) if few else 0.0)
        if exact.numel() and exact.dim() == 1:  # a sum, which may cancel: float32 roundings of the sum of its |terms|
            allowed += 2 * torch.finfo(F32).eps * oracle[0].abs().sum((0, 1)).max().item()
        if few and i == 0 and exact.numel():  # x Phi(x): Phi errs by roundings of 1, eager maybe not
            allowed += torch.finfo(F32).eps * magnitude(args)
        if backend == "triton" and _registry.triton_interpreted() and value.dtype == BF16 and exact.numel():
            allowed += torch.finfo(BF16).eps * exact.abs().max().item()  # the interpreter truncates
        found = testing.error(value, exact)
        assert found <= allowed, f"{name}, output {i}, {options}: {found} > {allowed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_case_set(backend, name):
    device = skip_unless_available(name, backend)
    assert testing.cases(name, device)
    assert _verify.run(_registry.OPS[name], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["plain", "sliced", "permuted", "expanded", "unaligned"])
def test_strides(backend, kind, layout):
    device = skip_unless_available("glu", backend)
    for dtype, narrow in ((F32, F32), (BF16, F32), (F16, F16)):
        tensors = {key: laid_out(t, layout) for key, t in make(2, 5, 9, dtype, narrow, device).items()}
        for name in NAMES:
            check(name, backend, tensors, kind, layout != "sliced")


@pytest.mark.parametrize("gate_first", [True, False])
def test_against_torch(gate_first):
    x, bias = torch.randn(3, 4, 5, 16), torch.randn(16)

    def parts(t, b):
        first, second = (t + b.to(t.dtype)).chunk(2, -1)
        return (first, second) if gate_first else (second, first)

    for run, act in (
        (lambda x, b: geglu(x, b, gate_first=gate_first), F.gelu),
        (lambda x, b: geglu(x, b, approximate="tanh", gate_first=gate_first), lambda g: F.gelu(g, approximate="tanh")),
        (lambda x, b: swiglu(x, b, gate_first=gate_first), F.silu),
    ):
        eager = lambda t, b: act(parts(t, b)[0]) * parts(t, b)[1]  # noqa: B023, E731
        testing.assert_as_good_as_eager(run(x, bias), eager(x, bias), eager(x.double(), bias.double()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(backend, shape):
    device = skip_unless_available("glu", backend)
    for name in NAMES:
        check(name, backend, make(*shape, device=device), "silu", True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    device = skip_unless_available("glu", backend)
    x = torch.randn(2, 3, 20, device=device)
    x[1, 2, 4] = x[0, 0, 15] = float("nan")
    y = geglu(x, backend=backend)
    assert y[1, 2, 4].isnan() and y[0, 0, 5].isnan() and y.isnan().sum() == 2


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape_and_strides(data):
    skip_unless_available("glu", "cpu")
    batch, tokens, dim = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 50), st.integers(0, 70)))
    dtype, narrow = data.draw(st.sampled_from([(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]))
    tensors = make(batch, tokens, dim, dtype, narrow, biased=data.draw(st.booleans()))
    kinds = st.sampled_from(["plain", "sliced", "permuted", "expanded", "unaligned"])
    tensors = {key: t if t is None else laid_out(t, data.draw(kinds)) for key, t in tensors.items()}
    kind, gate_first = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    for name in NAMES:
        check(name, "cpu", tensors, kind, gate_first, few=True)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for name in NAMES:
            assert _verify.run(_registry.OPS[name], "cpu", torch.device("cpu")) == []


@needs_extension
def test_the_threads_change_no_bit():
    tensors = make(2, 700, 96)
    run = _registry.OPS["glu_backward"].overloads["cpu"]
    once = run(*tensors.values(), "gelu", True)
    torch.set_num_threads(2)
    try:
        again = run(*tensors.values(), "gelu", True)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("op", [geglu, swiglu])
def test_gradcheck(op, gate_first):
    leaves = [torch.randn(2, 3, 8, dtype=F64, requires_grad=True), torch.randn(8, dtype=F64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda x, b: op(x, b, gate_first=gate_first), leaves)
    assert torch.autograd.gradcheck(lambda x: op(x, gate_first=gate_first), leaves[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_go_through_the_backend(backend):
    device = skip_unless_available("glu", backend)
    tensors = make(2, 3, 8, F32, F32, device)
    leaves = [tensors[key].requires_grad_() for key in ("x", "bias")]
    grads = torch.autograd.grad(swiglu(*leaves, backend=backend), leaves, tensors["grad"])
    run = _registry.OPS["glu_backward"].overloads[backend]
    expected = run(tensors["grad"], *(t.detach() for t in leaves), "silu", True)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_second_derivatives_are_refused():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="glu_backward: has no backward, .*drop create_graph=True"):
        torch.autograd.grad(swiglu(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "permuted", "expanded", "empty", "requires_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, kind, name):
    skip_unless_available(name, NAMESPACES[namespace])
    tensors = make(2, 0 if kind == "empty" else 3, 6)
    args = [laid_out(tensors[key], kind) for key in (("x", "bias") if name == "glu" else ("grad", "x", "bias"))]
    if kind == "requires_grad":
        if name == "glu_backward":
            pytest.skip("it has no backward; glu refuses second derivatives")
        args = [t.clone().requires_grad_() for t in args]
    opcheck(getattr(getattr(torch.ops, namespace), name).default, (*args, "gelu", True))


def test_fullgraph_compile():
    torch._dynamo.reset()
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8)
        assert torch.equal(compiled(x), geglu(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(2, 7)}, ValueError, r"x must be \(..., 2 D\), got \(2, 7\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(C,\) = \(8,\), got \(4,\)"),
        ({"bias": torch.ones(8, dtype=F16)}, TypeError, "bias must have dtype torch.float32 like x"),
        ({"gate_first": 1}, TypeError, "gate_first must be a bool, got int"),
        ({"approximate": "fast"}, ValueError, "approximate must be 'none' or 'tanh', got 'fast'"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        geglu(**({"x": torch.ones(2, 8)} | change))
