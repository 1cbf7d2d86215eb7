"""adaln, gated_adaln: every backend within the reference's error of float64, forward and backward, any strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, as_tuple, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, adaln, gated_adaln

NAMES = ("adaln", "gated_adaln", "adaln_backward", "gated_adaln_backward")
NAMESPACES = ("genengine", "genengine_triton", "genengine_reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]  # of x; of everything else
DIMS = [1, 3, 17, 72, 100, 1152, 1153, 8192]
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")


def make(batch, tokens, dim, dtype=F32, narrow=F32, device="cpu"):
    """Arguments of all four ops by name; the modulations are views into one (B, 6 D) table."""
    draw = lambda *shape, kind: torch.randn(*shape).to(device, kind)  # noqa: E731
    table = draw(batch, 6 * dim, kind=narrow)
    gate, scale, shift = (table[:, i * dim : (i + 1) * dim] for i in range(3))
    token = lambda kind: draw(batch, tokens, dim, kind=kind)  # noqa: E731
    return {
        "x": 2 * token(dtype) + 1, "branch": token(narrow), "gate": gate, "scale": scale, "shift": shift,
        "grad_x": token(dtype), "grad_h": token(narrow),
    }  # fmt: skip


ARGUMENTS = {
    "adaln": ("x", "scale", "shift"),
    "gated_adaln": ("x", "branch", "gate", "scale", "shift"),
    "adaln_backward": ("grad_h", "x", "scale"),
    "gated_adaln_backward": ("grad_x", "grad_h", "x", "branch", "gate", "scale"),
}


def check(name, backend, tensors, eps=1e-6):
    """One op against the same-dtype reference and the float64 one."""
    run = _registry.OPS[name].overloads
    args = [tensors[key] for key in ARGUMENTS[name]]
    wide = [t.double() for t in args]
    got, eager = (as_tuple(run[which](*args, eps)) for which in (backend, "reference"))
    oracle = as_tuple(run["reference"](*wide, eps))
    for i, (value, plain, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        assert value.is_contiguous() and value.dtype == plain.dtype and value.shape == exact.shape
        allowed = testing.tolerance(plain, exact)
        if exact.dim() == 2:  # a sum over tokens, which may cancel: one float32 rounding of the sum of its |terms|
            allowed += torch.finfo(F32).eps * magnitudes(run["reference"], wide, eps, i)
        if 0 < exact.shape[-1] < 16:
            allowed += short_row_error(dict(zip(ARGUMENTS[name], wide, strict=True)), eps)
        assert testing.error(value, exact) <= allowed, f"{name}, output {i}: {testing.error(value, exact)} > {allowed}"


def short_row_error(tensors, eps):
    """What rows of a few elements may err: they are ill-conditioned, and eager's own error is a matter of luck.

    x - mean errs by u |x|, so x^ by u c, c = 1 + |x| rstd; a gradient cancels terms of size rstd |g|, each off by c u.
    Four such terms, in the gated backward times |gate| or |branch|, summed over the tokens.
    """
    if tensors["x"].numel() == 0:
        return 0.0
    x, gain = tensors["x"], 1 + tensors["scale"].abs().max()
    rstd = (x.var(-1, correction=0) + eps).rsqrt()
    condition = 1 + x.abs().amax(-1) * rstd
    if "grad_h" not in tensors:
        return 4 * torch.finfo(F32).eps * (condition * gain).max().item()
    outer = max([1.0] + [tensors[key].abs().max().item() for key in ("gate", "branch") if key in tensors])
    terms = condition * (1 + rstd) * gain * tensors["grad_h"].abs().amax(-1)
    return 4 * torch.finfo(F32).eps * outer * terms.sum(1).max().item()


def magnitudes(backward, args, eps, output):
    """The largest sum over tokens of |term| of one of the backward's sums, every token taken as a sample of its own."""
    batch, tokens, dim = args[0].shape
    if 0 in (batch, tokens, dim):
        return 0.0
    alone = [t.reshape(-1, 1, dim) if t.dim() == 3 else t.repeat_interleave(tokens, 0) for t in args]
    return backward(*alone, eps)[output].view(batch, tokens, dim).abs().sum(1).max().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_against_float64(backend, dtypes, dim):
    device = skip_unless_available("adaln", backend)
    for batch, tokens in ((3, 2), (1, 19)) if dim < 8192 else ((1, 2),):
        tensors = make(batch, tokens, dim, *dtypes, device=device)
        for name in NAMES:
            check(name, backend, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    device = skip_unless_available("adaln", backend)
    for name in NAMES:
        assert testing.cases(name, device)
        assert _verify.run(_registry.OPS[name], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(backend, shape):
    device = skip_unless_available("adaln", backend)
    tensors = make(*shape, device=device)
    for name in NAMES:
        run = _registry.OPS[name].overloads
        args = [tensors[key] for key in ARGUMENTS[name]]
        got, eager = as_tuple(run[backend](*args, 1e-6)), as_tuple(run["reference"](*args, 1e-6))
        for value, plain in zip(got, eager, strict=True):
            assert value.shape == plain.shape and torch.equal(value, plain)  # the sums over no token are zeros


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_and_large_means_do_not_cancel(backend):
    device = skip_unless_available("adaln", backend)
    tensors = make(2, 3, 96, device=device)
    tensors["x"] = torch.randn(2, 3, 96, device=device) + 4096
    check("adaln", backend, tensors)
    tensors["x"] = torch.full((2, 3, 96), 7.0, device=device)
    h = adaln(tensors["x"], tensors["scale"], tensors["shift"], backend=backend)
    assert torch.equal(h, tensors["shift"][:, None].expand_as(h))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    device = skip_unless_available("adaln", backend)
    tensors = make(2, 3, 33, BF16, BF16, device=device)
    tensors["x"][1, 1, 32] = float("nan")
    h = adaln(tensors["x"], tensors["scale"], tensors["shift"], backend=backend)
    assert h[1, 1].isnan().all() and h.isnan().sum() == 33


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sliced", "permuted", "expanded"])
@pytest.mark.parametrize("dim", [40, 41])
def test_strides(backend, kind, dim):
    device = skip_unless_available("adaln", backend)
    for dtypes in ((F32, F32), (F32, BF16), (F16, F16)):
        tensors = {key: laid_out(t, kind) for key, t in make(3, 5, dim, *dtypes, device=device).items()}
        for name in NAMES:
            check(name, backend, tensors)


@pytest.mark.fuzz
@given(data=st.data())
@pytest.mark.parametrize("backend", ["cpu"])
def test_any_shape_and_strides(backend, data):
    skip_unless_available("adaln", backend)
    size = st.integers(0, 5)
    batch, tokens, dim = data.draw(size), data.draw(st.integers(0, 40)), data.draw(st.integers(0, 200))
    tensors = make(batch, tokens, dim, *data.draw(st.sampled_from(DTYPES)))
    kinds = st.sampled_from(["plain", "sliced", "permuted", "expanded"])
    tensors = {key: laid_out(t, data.draw(kinds)) for key, t in tensors.items()}
    eps = data.draw(st.sampled_from([1e-6, 1e-3]))
    for name in NAMES:
        check(name, backend, tensors, eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 4, 7), (2, 3, 2, 2, 7)])
def test_any_number_of_middle_dimensions(backend, shape):
    device = skip_unless_available("adaln", backend)
    tensors = make(2, torch.Size(shape[1:-1]).numel(), 7, device=device)
    x, branch, rows = tensors["x"], tensors["branch"], [tensors[key] for key in ("gate", "scale", "shift")]
    folded = lambda *t: [entry.reshape(shape) for entry in t]  # noqa: E731
    for flat, full in zip(
        (adaln(x, *rows[1:], backend=backend), *gated_adaln(x, branch, *rows, backend=backend)),
        (adaln(*folded(x), *rows[1:], backend=backend), *gated_adaln(*folded(x, branch), *rows, backend=backend)),
        strict=True,
    ):
        assert full.shape == shape and torch.equal(flat.reshape(shape), full)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for dtypes in DTYPES:
            for dim in (5, 64, 100, 1152):
                tensors = make(2, 18, dim, *dtypes)
                for name in NAMES:
                    check(name, "cpu", tensors)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(isa):
    """Bit for bit, also where the whole batch is large enough for streaming stores and a row alone is not."""
    with testing.cpu_isa(isa):
        tensors = make(4, 1100, 1152)
        whole = gated_adaln(*(tensors[key] for key in ARGUMENTS["gated_adaln"]))
        grads = _registry.OPS["gated_adaln_backward"].overloads["cpu"]
        sums = grads(*(tensors[key] for key in ARGUMENTS["gated_adaln_backward"]), 1e-6)
        torch.set_num_threads(2)
        try:
            again = gated_adaln(*(tensors[key] for key in ARGUMENTS["gated_adaln"]))
            sums_again = grads(*(tensors[key] for key in ARGUMENTS["gated_adaln_backward"]), 1e-6)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(whole + tuple(sums), again + tuple(sums_again), strict=True))
        one = {key: t[2:3] for key, t in tensors.items()}
        alone = grads(*(one[key] for key in ARGUMENTS["gated_adaln_backward"]), 1e-6)
        assert all(torch.equal(a[2:3], b) for a, b in zip(sums, alone, strict=True))
        for key in ("x", "branch"):
            one[key] = one[key][:, 7:8]
        alone = gated_adaln(*(one[key] for key in ARGUMENTS["gated_adaln"]))
        assert all(torch.equal(a[2:3, 7:8], b) for a, b in zip(whole, alone, strict=True))


# ---- gradients -----------------------------------------------------------------------------------------------------


def leaves(name, **kind):
    tensors = make(2, 3, 5, **kind)
    return [tensors[key].clone().requires_grad_() for key in ARGUMENTS[name]]


@pytest.mark.parametrize("op", [adaln, gated_adaln])
def test_gradcheck(op):
    assert torch.autograd.gradcheck(op, leaves(op.__name__, dtype=F64, narrow=F64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_go_through_the_backend(backend):
    device = skip_unless_available("adaln", backend)
    tensors = {key: t.detach().requires_grad_() for key, t in make(2, 3, 24, F32, BF16, device=device).items()}
    args = [tensors[key] for key in ARGUMENTS["gated_adaln"]]
    x_out, h = gated_adaln(*args, backend=backend)
    grads = torch.autograd.grad((x_out, h), args, (tensors["grad_x"].detach(), tensors["grad_h"].detach()))
    inner = (tensors["grad_x"], tensors["grad_h"], x_out, *args[1:4])
    expected = _registry.OPS["gated_adaln_backward"].overloads[backend](*(t.detach() for t in inner), 1e-6)
    assert all(torch.equal(a, b) and a.dtype == t.dtype for a, b, t in zip(grads, expected, args, strict=True))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_unused_output_counts_as_zero(unused):
    args = leaves("gated_adaln", dtype=F64, narrow=F64)
    both = gated_adaln(*args)
    got = torch.autograd.grad(both[1 - unused].sum(), args)
    x_out = args[0] + args[2][:, None] * args[1]
    plain = (x_out, adaln(x_out, *args[3:]))[1 - unused]
    expected = torch.autograd.grad(plain.sum(), args, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("op", [adaln, gated_adaln])
def test_second_derivatives_are_refused(op):
    args = leaves(op.__name__)
    out = op(*args)
    out = out if op is adaln else out[1]
    with pytest.raises(RuntimeError, match="adaln_backward: has no backward, .*drop create_graph=True"):
        torch.autograd.grad(out.square().sum(), args, create_graph=True)


# ---- torch's own checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "permuted", "expanded", "empty", "requires_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, kind, name):
    backend = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}[namespace]
    skip_unless_available(name, backend)
    tensors = make(2, 0 if kind == "empty" else 3, 16)
    args = [laid_out(tensors[key], kind) for key in ARGUMENTS[name]]
    if kind == "requires_grad":
        if name.endswith("backward"):
            pytest.skip(f"{name} has no backward; {name.removesuffix('_backward')} refuses second derivatives")
        args = [t.clone().requires_grad_() for t in args]
    opcheck(getattr(getattr(torch.ops, namespace), name).default, (*args, 1e-6))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_adaln, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5):
        tensors = make(batch, 4, 24)
        args = [tensors[key].clone().requires_grad_() for key in ARGUMENTS["gated_adaln"]]
        got, expected = compiled(*args), gated_adaln(*args)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        grads = [torch.autograd.grad(found, args, [torch.ones_like(t) for t in found]) for found in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


def test_autocast_casts_nothing():
    tensors = make(2, 3, 8, F32, BF16)
    with torch.autocast("cpu", dtype=BF16):
        x_out, h = gated_adaln(*(tensors[key] for key in ARGUMENTS["gated_adaln"]))
        assert adaln(*(make(2, 3, 8)[key] for key in ARGUMENTS["adaln"])).dtype == F32
    assert (x_out.dtype, h.dtype) == (F32, BF16)


# ---- arguments -----------------------------------------------------------------------------------------------------

MESSAGES = [
    ({"x": None}, TypeError, "gated_adaln: x must be a tensor, got NoneType"),
    ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "gated_adaln: x must have dtype .*got torch.int64"),
    ({"x": torch.ones(4)}, ValueError, r"gated_adaln: x must be \(B, ..., D\), got \(4,\); add a batch dimension"),
    ({"branch": torch.ones(2, 4, 4)}, ValueError, r"branch must be .*= \(2, 3, 4\), got \(2, 4, 4\)"),
    ({"scale": torch.ones(2, 5)}, ValueError, r"gated_adaln: scale must be \(B, D\) = \(2, 4\), got \(2, 5\)"),
    ({"shift": torch.ones(4)}, ValueError, r"gated_adaln: shift must be \(B, D\) = \(2, 4\), got \(4,\)"),
    ({"gate": torch.ones(1, 4)}, ValueError, r"gated_adaln: gate must be \(B, D\) = \(2, 4\), got \(1, 4\)"),
    ({"scale": torch.ones(2, 4, device="meta")}, ValueError, "scale must be on cpu like x, got meta; move it"),
    ({"gate": torch.ones(2, 4, dtype=F16)}, TypeError, "gate must have dtype torch.float32 like scale, got"),
    ({"x": torch.ones(2, 3, 4, dtype=F16)}, TypeError, "scale must have dtype torch.float16 with an x of"),
    ({"x": torch.ones(2, 3, 4, dtype=F64)}, TypeError, "scale must have dtype torch.float64 with an x of"),
    ({"eps": -1.0}, ValueError, "gated_adaln: eps must be at least 0, got -1.0"),
    ({"eps": float("nan")}, ValueError, "gated_adaln: eps must be at least 0, got nan"),
    ({"eps": "small"}, TypeError, "gated_adaln: eps must be a float, got str"),
    ({"backend": "fast"}, ValueError, "gated_adaln: backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), MESSAGES)
def test_error_messages(change, error, message):
    tensors = make(2, 3, 4)
    arguments = {key: tensors[key] for key in ARGUMENTS["gated_adaln"]} | change
    with pytest.raises(error, match=message):
        gated_adaln(**arguments)


def test_rows_longer_than_the_kernels_hold_run_on_the_reference():
    tensors = make(1, 1, 8193)
    args = [tensors[key] for key in ARGUMENTS["adaln"]]
    assert torch.equal(adaln(*args), adaln(*args, backend="reference"))
    with pytest.raises(RuntimeError, match="adaln: backend 'cpu' cannot run here: D must be at most 8192, got 8193"):
        adaln(*args, backend="cpu")


def test_float64_has_no_kernel():
    args = leaves("adaln", dtype=F64, narrow=F64)
    with pytest.raises(RuntimeError, match="adaln: backend 'cpu' cannot run here: its kernels take"):
        adaln(*args, backend="cpu")
