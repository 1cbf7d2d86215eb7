"""bias_act, bias_gelu: every backend within the reference's error of float64, to the second derivative."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, as_tuple, laid_out, luck, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, bias_act, bias_gelu
from genengine.ops._activations import ACTIVATIONS

NAMES = ("bias_act", "bias_act_backward", "bias_act_backward_backward")
NAMESPACES = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
EAGER = {
    "linear": lambda u: u,
    "relu": F.relu,
    "lrelu": lambda u: F.leaky_relu(u, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def make(shape, dtype=F32, narrow=F32, device="cpu", biased=True):
    """Arguments of all three ops by name, x (outer, C, inner)."""
    draw = lambda kind, *size: torch.randn(*size).to(device, kind)  # noqa: E731
    tensors = {key: draw(dtype, *shape) for key in ("grad_dx", "grad", "x")}
    for key in ("grad_dbias", "bias"):
        tensors[key] = draw(narrow, shape[1]) if biased else None
    return tensors


ARGUMENTS = {
    "bias_act": ("x", "bias"),
    "bias_act_backward": ("grad", "x", "bias"),
    "bias_act_backward_backward": ("grad_dx", "grad_dbias", "grad", "x", "bias"),
}


def widened(args):
    return [t if t is None else t.double() for t in args]


def check(name, backend, tensors, *options, few=False):
    """One op against the same-dtype reference and the float64 one; few: of a property test, see `luck`."""
    run = _registry.OPS[name].overloads
    args = [tensors[key] for key in ARGUMENTS[name]]
    got, eager = (as_tuple(run[which](*args, *options)) for which in (backend, "reference"))
    oracle = as_tuple(run["reference"](*widened(args), *options))
    for i, (value, plain, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        assert value.is_contiguous() and value.dtype == plain.dtype and value.shape == exact.shape
        allowed = testing.tolerance(plain, exact) + (luck(exact) if few else 0.0)
        if exact.numel() and exact.dim() == 1:  # a sum, which may cancel: float32 roundings of the sum of its |terms|
            allowed += 2 * torch.finfo(F32).eps * oracle[i - 1].abs().sum((0, 2)).max().item()
        if few and name == "bias_act" and options[-1] is not None and exact.numel():  # a clamp hides the largest
            free = run["reference"](*widened(args), *options[:-1], None)
            allowed += torch.finfo(F32).eps * as_tuple(free)[0].abs().max().item()
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
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, activation):
    device = skip_unless_available("bias_act", backend)
    for dtype, narrow in ((F32, F32), (BF16, F32), (F16, F16)):
        for clamp in (None, 0.7):
            tensors = make((3, 5, 7), dtype, narrow, device)
            for name in NAMES:
                check(name, backend, tensors, activation, 0.2, 1.3, clamp)


@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_against_torch(activation, scale):
    x, bias = scale * torch.randn(2, 5, 33), scale * torch.randn(5)
    expected = lambda t: (1.5 * EAGER[activation](t + bias.to(t.dtype)[:, None])).clamp(-2, 2)  # noqa: E731
    got = bias_act(x, bias, activation=activation, gain=1.5, clamp=2.0)
    testing.assert_as_good_as_eager(got, expected(x), expected(x.double()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_on_a_grid(backend):
    """Every activation and its slope over all of its range, within a few 2^-24 times |x| of float64."""
    device = skip_unless_available("bias_act", backend)
    x = torch.linspace(-20, 20, 20001, device=device).view(1, 1, -1)
    scale = x.abs().clamp(min=1)  # silu'(u) = s (1 + u (1 - s)) holds 1 - s, which is off by 2^-24, times u
    for activation in ACTIVATIONS:
        for name, args in (("bias_act", (x,)), ("bias_act_backward", (torch.ones_like(x), x))):
            run = _registry.OPS[name].overloads
            got = as_tuple(run[backend](*args, None, activation, 0.2, 1.0, None))[0].double()
            exact = as_tuple(run["reference"](*widened(args), None, activation, 0.2, 1.0, None))[0]
            assert ((got - exact).abs() / scale).max() < 5e-7, (name, activation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    device = skip_unless_available("bias_act", backend)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        for name in NAMES:
            for activation in ("gelu", "relu"):
                check(name, backend, make(shape, device=device), activation, 0.2, 1.0, None)
    assert bias_act(torch.ones(0, 3), torch.ones(3), backend=backend if device.type == "cpu" else None).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_and_kinks_are_from_below(backend):
    device = skip_unless_available("bias_act", backend)
    x = torch.tensor([0.0, float("nan"), 2.0, -2.0, 3.0], device=device).view(1, 1, 5)
    run = _registry.OPS["bias_act"].overloads[backend]
    slope = _registry.OPS["bias_act_backward"].overloads[backend]
    for activation in ACTIVATIONS:
        for clamp in (None, 1.0):
            assert run(x, None, activation, 0.2, 1.0, clamp)[0, 0].isnan().tolist() == [
                False,
                True,
                False,
                False,
                False,
            ]
    grads = slope(torch.ones_like(x), x, None, "relu", 0.2, 1.0, 2.0)[0][0, 0]
    assert grads[0] == 0 and grads[2:].tolist() == [0, 0, 0]  # relu'(0) = 0; none at and beyond the clamp
    assert slope(torch.ones_like(x), x, None, "lrelu", 0.25, 1.0, None)[0][0, 0, 0] == 0.25


def test_the_oracle_has_the_slope_of_its_own_precision():
    """alpha as float64 has it: a slope of float32's 0.2 would be off by 1e-8 in every tolerance derived from it."""
    x = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(bias_act(x, activation="lrelu", alpha=0.2).sum(), x)
    assert grad.item() == 0.2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [1, -1, 0])
def test_layouts(backend, layout, dim):
    device = skip_unless_available("bias_act", backend)
    x = laid_out(torch.randn(2, 6, 5, 7, device=device), layout)
    bias = laid_out(torch.randn(x.shape[dim], device=device), "sliced")
    y = bias_act(x, bias, activation="lrelu", dim=dim, backend=backend)
    shape = [1] * 4
    shape[dim] = -1
    assert torch.allclose(y, F.leaky_relu(x + bias.view(shape), 0.2), atol=1e-6)
    if layout in ("plain", "channels_last", "permuted", "unaligned"):
        assert y.stride() == x.stride()  # dense memory keeps its order


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape_layout_and_option(data):
    skip_unless_available("bias_act", "cpu")
    shape = data.draw(
        st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 1, 2, 7, 16, 64, 300, 1030]))
    )
    if shape[0] * shape[1] * shape[2] > 60000:
        shape = (1, shape[1] % 5 + 1, shape[2])
    dtype, narrow = data.draw(st.sampled_from([(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]))
    tensors = make(shape, dtype, narrow, biased=data.draw(st.booleans()))
    kinds = st.sampled_from(["plain", "sliced", "permuted", "expanded", "unaligned"])
    tensors = {key: t if t is None else laid_out(t, data.draw(kinds)) for key, t in tensors.items()}
    options = data.draw(st.sampled_from(list(ACTIVATIONS))), 0.2, data.draw(st.sampled_from([1.0, 1.4, -0.5]))
    clamp = data.draw(st.sampled_from([None, 0.5, 2.0]))
    for name in NAMES:
        check(name, "cpu", tensors, *options, clamp, few=True)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for name in NAMES:
            assert _verify.run(_registry.OPS[name], "cpu", torch.device("cpu")) == []


@needs_extension
@pytest.mark.parametrize("shape", [(8, 64, 1024), (4100, 384, 1), (64, 48, 49)])
def test_the_threads_change_no_bit(shape):
    tensors = make(shape)
    run = _registry.OPS["bias_act_backward"].overloads["cpu"]
    once = run(*(tensors[key] for key in ARGUMENTS["bias_act_backward"]), "silu", 0.2, 1.0, None)
    torch.set_num_threads(2)
    try:
        again = run(*(tensors[key] for key in ARGUMENTS["bias_act_backward"]), "silu", 0.2, 1.0, None)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_gradcheck_and_gradgradcheck(activation, clamp):
    x = (0.3 + torch.rand(2, 3, 4, dtype=F64)) * torch.randint(0, 2, (2, 3, 4)).mul(2).sub(1)  # away from the kinks
    bias = 0.1 * torch.rand(3, dtype=F64)
    z = 1.7 * EAGER[activation](x + bias[:, None])
    x = torch.where((z.abs() - 1).abs() < 0.02, 2 * x, x) if clamp else x
    leaves = [x.requires_grad_(), bias.requires_grad_()]
    run = lambda x, b: bias_act(x, b, activation=activation, gain=1.7, clamp=clamp)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["lrelu", "gelu"])
def test_a_gradient_penalty_goes_through_the_backend(backend, activation):
    """R1: the squared gradient of the output by x, differentiated by x and the bias."""
    device = skip_unless_available("bias_act", backend)
    x, bias, weight = (
        torch.randn(2, 3, 8, device=device),
        torch.randn(3, device=device),
        torch.randn(2, 3, 8, device=device),
    )

    def penalty(function, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        (grad,) = torch.autograd.grad((function(*leaves) * weight).sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True)

    got = penalty(lambda x, b: bias_act(x * x, b, activation=activation, backend=backend), x, bias)
    expected = penalty(lambda x, b: EAGER[activation](x * x + b[:, None]), x, bias)
    for a, b in zip(got, expected, strict=True):
        assert (b is None or not b.any()) if a is None else torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_third_derivatives_are_refused():
    x = torch.randn(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(bias_act(x, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bias_act_backward_backward: has no backward, .*it is differentiable twice"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


# ---- torch's own checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "permuted", "expanded", "empty", "requires_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, kind, name):
    skip_unless_available(name, NAMESPACES[namespace])
    tensors = make((2, 0 if kind == "empty" else 3, 5))
    args = [laid_out(tensors[key], kind) for key in ARGUMENTS[name]]
    if kind == "requires_grad":
        if name == "bias_act_backward_backward":
            pytest.skip("it has no backward; bias_act_backward refuses third derivatives")
        args = [t.clone().requires_grad_() for t in args]
    opcheck(getattr(getattr(torch.ops, namespace), name).default, (*args, "gelu", 0.2, 1.0, 2.0))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = lambda x, b: bias_gelu(x, b, approximate="tanh")  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5):
        args = [torch.randn(batch, 4, 24, requires_grad=True), torch.randn(24, requires_grad=True)]
        got, expected = compiled(*args), run(*args)
        assert torch.equal(got, expected)
        grads = [torch.autograd.grad(found, args, torch.ones_like(found)) for found in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(2, 3).int()}, TypeError, "x must have dtype"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \(C,\) = \(3,\), got \(4,\)"),
        ({"bias": torch.ones(3, dtype=F16)}, TypeError, "bias must have dtype torch.float32 like x, got torch.float16"),
        ({"x": torch.ones(2, 3, dtype=F64)}, TypeError, "bias must have dtype torch.float64 like x"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must be on cpu like x, got meta"),
        ({"dim": 2}, ValueError, r"dim must be a dimension of x, which is \(2, 3\), got 2"),
        ({"dim": 1.0}, TypeError, "dim must be an int, got float"),
        ({"activation": "swish"}, ValueError, "activation must be one of linear, relu, .*, got 'swish'"),
        ({"clamp": -1.0}, ValueError, "clamp must be at least 0 or None, got -1.0"),
        ({"clamp": float("nan")}, ValueError, "clamp must be at least 0 or None, got nan"),
        ({"gain": "big"}, TypeError, "gain must be a number, got str"),
        ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=f"bias_act: {message}"):
        bias_act(**({"x": torch.ones(2, 3), "bias": torch.ones(3)} | change))


def test_bias_gelu_is_bias_act_along_the_last_dimension():
    x, bias = torch.randn(2, 3, 4), torch.randn(4)
    for approximate, activation in (("none", "gelu"), ("tanh", "gelu_tanh")):
        expected = bias_act(x, bias, activation=activation, dim=-1)
        assert torch.equal(bias_gelu(x, bias, approximate=approximate), expected)
    with pytest.raises(ValueError, match="bias_gelu: approximate must be 'none' or 'tanh', got 'fast'"):
        bias_gelu(x, approximate="fast")
    with pytest.raises(ValueError, match=r"bias_gelu: bias must be \(C,\) = \(4,\)"):
        bias_gelu(x, torch.ones(3))
