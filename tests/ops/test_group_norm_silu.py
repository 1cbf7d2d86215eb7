"""group_norm_silu, add_group_norm_silu: within the reference's error of float64, forward and backward, any layout."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, add_group_norm_silu, group_norm_silu

NAMES = ("group_norm_silu", "group_norm_silu_backward")
ADDS = ("add_group_norm_silu", "add_group_norm_silu_backward")
NAMESPACES = {"cpu": "genengine", "triton": "genengine_triton", "reference": "genengine_reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]  # of x; of the rows
# (B, C, S), groups: odd sizes; whole vectors; one pixel; one group; a channel per group; several blocks of rows
SIZES = [((3, 12, 35), 4), ((2, 64, 48), 8), ((4, 40, 1), 5), ((2, 20, 50), 1), ((2, 6, 7), 6), ((1, 1, 9), 1),
         ((1, 24, 1111), 3)]  # fmt: skip
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")


def make(shape, dtype=F32, narrow=F32, *, parameters=True, modulated=True, device="cpu"):
    """x, the gradient of y, and the four rows; scale and shift are views into one table."""
    draw = lambda *size, kind: torch.randn(*size).to(device, kind)  # noqa: E731
    batch, channels = shape[:2]
    weight, bias = (draw(channels, kind=narrow) for _ in range(2)) if parameters else (None, None)
    scale, shift = draw(batch, 3 * channels, kind=narrow).split(channels, dim=1)[1:] if modulated else (None, None)
    return 2 * draw(*shape, kind=dtype) + 1, draw(*shape, kind=dtype), (weight, bias, scale, shift)


def widened(args):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]


def check(backend, x, grad, rows, groups, *, eps=1e-5, silu=True, last=False):
    """Both ops against the same-dtype reference and the float64 one; x and grad (B, C, S), or (B, S, C) if last."""
    run, run_backward = (_registry.OPS[name].overloads for name in NAMES)
    args = (x, *rows, groups, eps, silu, last)
    eager = run["reference"](*args)
    merged = merge_rounding(*eager[1:]) if backend in ("triton", "cuda") else 0.0
    allowances = (mean_rounding(rows, *eager[1:]), 0.0, merged)
    compare(run[backend](*args), eager, run["reference"](*widened(args)), allowances)
    backward = (grad, x, *rows, *eager[1:], groups, silu, last)
    allowances = backward_roundings(backward)
    compare(run_backward[backend](*backward), run_backward["reference"](*backward),
            run_backward["reference"](*widened(backward)), allowances)  # fmt: skip


def compare(got, eager, oracle, allowances):
    for i, (value, plain, exact, more) in enumerate(zip(got, eager, oracle, allowances, strict=True)):
        assert value.is_contiguous() and value.dtype == plain.dtype and value.shape == exact.shape
        allowed = testing.tolerance(plain, exact) + more
        assert testing.error(value, exact) <= allowed, f"output {i}: {testing.error(value, exact)} > {allowed}"


def mean_rounding(rows, mean, rstd):
    """What a unit in the last place of the float32 mean does to y, |silu'| <= 1.1: eager's own mean errs by luck."""
    if mean.numel() == 0:
        return 0.0
    weight, _, scale, _ = rows
    gain = 1.1 * (1 if weight is None else weight.abs().max().item())
    gain *= 1 if scale is None else (1 + scale).abs().max().item()
    return torch.finfo(F32).eps * (mean.abs() * rstd).max().item() * gain


def merge_rounding(mean, rstd):
    """What merging chunks may cost rstd: their means are rounded, by eps |mean|, and lie up to 1 / rstd apart."""
    return torch.finfo(F32).eps * (mean.abs() * rstd**2).max().item() if mean.numel() else 0.0


def backward_roundings(args):
    """What cancellation may cost beside eager's own error, which is then a matter of luck: four float32 roundings.

    Of a sum: of its |terms|. Of dx: of the terms that cancel in rstd (g - mean(g) - x^ mean(g x^)), of the order of
    rstd |g| (1 + |x^|), |x^| at most the root of the group's size.
    """
    grad, x, weight, bias, scale, shift, mean, rstd, groups, silu, last = widened(args)
    if x.numel() == 0:
        return (0.0,) * 5
    x, grad = (t.transpose(1, 2) if last else t for t in (x, grad))
    batch, channels, _ = x.shape
    spread = lambda t: t.repeat_interleave(channels // groups, 1)[:, :, None]  # noqa: E731
    unit = 4 * torch.finfo(F32).eps
    x_hat = (x - spread(mean)) * spread(rstd)
    condition = 1 + x.abs() * spread(rstd)  # x - mean errs by this many roundings of x^
    factor = torch.ones(batch, channels, 1, dtype=F64) if scale is None else 1 + scale[:, :, None]
    gain = factor if weight is None else factor * weight[:, None]
    offset = 0 if shift is None else shift[:, :, None].abs()
    offset = offset + (0 if bias is None else (bias[:, None] * factor).abs())
    dv = (
        1.2 * grad.abs() * (1 + (condition * gain.abs() + offset))
    )  # |silu'| <= 1.1, |silu''| <= 0.5, and v's own error
    terms = dv * (condition + x_hat.abs())
    dx = unit * ((gain.abs() * terms).amax((1, 2)) * rstd.amax(1)).max().item()
    per_channel = terms.sum(2)
    rows = 1 if weight is None else (1 + weight.abs() + bias.abs()).max()
    total = unit * (per_channel * factor[:, :, 0].abs()).sum(0).max().item()
    single = unit * (per_channel * rows).max().item()
    return dx, total, total, single, single


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SIZES)
def test_against_float64(backend, dtypes, shape, groups):
    device = skip_unless_available(NAMES[0], backend)
    options = [
        (False, True, True, True),
        (True, True, False, True),
        (True, False, True, False),
        (False, False, False, True),
    ]
    if backend == "triton" and _registry.triton_interpreted():  # slow: two of them, in turn
        options = options[DTYPES.index(dtypes) % 2 :: 2]
    for last, parameters, modulated, silu in options:
        x, grad, rows = make(shape, *dtypes, parameters=parameters, modulated=modulated, device=device)
        if last:
            x, grad = (t.transpose(1, 2).contiguous() for t in (x, grad))
        check(backend, x, grad, rows, groups, silu=silu, last=last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", (*NAMES, *ADDS))
def test_case_set(backend, name):
    device = skip_unless_available(name, backend)
    assert testing.cases(name, device)
    assert _verify.run(_registry.OPS[name], backend, device) == []


def test_the_reference_is_group_norm():
    x, _, (weight, bias, scale, shift) = make((2, 12, 5, 7), F64, F64)
    expected = F.group_norm(x, 4, weight, bias, 1e-3)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4, eps=1e-3, silu=False), expected)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4, eps=1e-3), F.silu(expected))
    modulated = F.silu(expected * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4, scale, shift, 1e-3), modulated)
    torch.testing.assert_close(group_norm_silu(x, None, None, 4), F.silu(F.group_norm(x, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)])
def test_empty(backend, shape):
    device = skip_unless_available(NAMES[0], backend)
    x, grad, rows = make(shape, device=device)
    y, mean, rstd = _registry.OPS[NAMES[0]].overloads[backend](x, *rows, 2, 1e-5, True, False)
    assert y.shape == shape and mean.shape == rstd.shape == (shape[0], 2)
    grads = _registry.OPS[NAMES[1]].overloads[backend](grad, x, *rows, mean, rstd, 2, True, False)
    for value, like in zip(grads, (x, *rows), strict=True):
        assert value.shape == like.shape and not value.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [16, 15])
def test_layouts(backend, layout, channels):
    """Any strides give the values of the contiguous tensor, and y keeps channels_last."""
    device = skip_unless_available(NAMES[0], backend)
    x, _, (weight, bias, scale, shift) = make((3, channels, 6, 5), device=device)
    x, scale, shift = laid_out(x, layout), laid_out(scale, layout), laid_out(shift, layout)
    args = (weight, bias, 5 if channels == 15 else 4, scale, shift)
    y = group_norm_silu(x, *args, backend=backend)
    oracle = group_norm_silu(x.double(), *widened(args), backend="reference")
    testing.assert_as_good_as_eager(y, group_norm_silu(x, *args, backend="reference"), oracle)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 2, 3, 2)])
def test_any_number_of_dimensions(backend, shape):
    device = skip_unless_available(NAMES[0], backend)
    x, _, (weight, bias, *_) = make(shape, device=device)
    flat = group_norm_silu(x.reshape(2, 6, -1), weight, bias, 3, backend=backend)
    assert torch.equal(group_norm_silu(x, weight, bias, 3, backend=backend), flat.view(shape))
    if len(shape) == 5:
        y = group_norm_silu(x.contiguous(memory_format=torch.channels_last_3d), weight, bias, 3, backend=backend)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(y, flat.view(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
def test_constant_groups_and_large_means_do_not_cancel(backend, last):
    device = skip_unless_available(NAMES[0], backend)
    x, grad, rows = make((2, 8, 300), device=device)
    x = x + 4096
    x[0, :, :1] = 0.0  # a first pixel far from the mean of the others
    turn = lambda t: t.transpose(1, 2).contiguous() if last else t  # noqa: E731
    check(backend, turn(x), turn(grad), rows, 2, last=last)
    run = _registry.OPS[NAMES[0]].overloads[backend]
    y, mean, _ = run(turn(torch.full_like(x, 7.0)), None, None, *rows[2:], 2, 1e-5, False, last)
    assert torch.equal(mean, torch.full_like(mean, 7.0))
    assert torch.equal(y, turn(rows[3][:, :, None].expand_as(x)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_stays_in_its_group(backend, last, dtype):
    device = skip_unless_available(NAMES[0], backend)
    x, _, rows = make((2, 12, 9), dtype, device=device)
    x[1, 5, 8] = float("nan")
    y, *_ = _registry.OPS[NAMES[0]].overloads[backend](
        x.transpose(1, 2).contiguous() if last else x, *rows, 4, 1e-5, True, last
    )
    y = y.transpose(1, 2) if last else y
    assert y[1, 3:6].isnan().all() and y.isnan().sum() == 27


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_activations(backend, dtype):
    """silu far out: v itself on the right, towards zero on the left, no overflow between."""
    device = skip_unless_available(NAMES[0], backend)
    x, _, _ = make((1, 2, 40), dtype, device=device)
    scale = torch.zeros(1, 2, dtype=dtype, device=device)
    for far in (200.0, 3000.0):
        shift = torch.tensor([[far, -far]], dtype=dtype, device=device)
        y = group_norm_silu(x, None, None, 1, scale, shift, backend=backend)
        plain = group_norm_silu(x, None, None, 1, scale, shift, silu=False, backend=backend)
        assert torch.equal(y[:, 0], plain[:, 0]) and y[:, 1].abs().max().item() < 1e-30


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for dtypes in DTYPES:
            for shape, groups in SIZES:
                for last in (False, True):
                    x, grad, rows = make(shape, *dtypes)
                    if last:
                        x, grad = (t.transpose(1, 2).contiguous() for t in (x, grad))
                    check("cpu", x, grad, rows, groups, last=last)
        for name in ADDS:
            assert _verify.run(_registry.OPS[name], "cpu", torch.device("cpu")) == []


@needs_extension
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_bits_do_not_depend_on_threads_or_batch(last, batch):
    x, grad, rows = make((batch, 96, 1100))
    if last:
        x, grad = (t.transpose(1, 2).contiguous() for t in (x, grad))
    run, run_backward = (_registry.OPS[name].overloads["cpu"] for name in NAMES)

    def everything(x, grad, rows):
        forward = run(x, *rows, 8, 1e-5, True, last)
        return *forward, *run_backward(grad, x, *rows, *forward[1:], 8, True, last)

    once, again = everything(x, grad, rows), everything(x, grad, rows)
    torch.set_num_threads(2)
    try:
        threaded = everything(x, grad, rows)
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(once, again, threaded, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    alone = everything(x[-1:], grad[-1:], (*rows[:2], rows[2][-1:], rows[3][-1:]))
    for i in (0, 1, 2, 3, 6, 7):  # all but dweight and dbias
        assert torch.equal(once[i][-1:], alone[i])


@needs_extension
@pytest.mark.parametrize("last", [False, True])
def test_streaming_stores(last):
    x, _, rows = make((1, 64, 110_000))
    if last:
        x = x.transpose(1, 2).contiguous()
    run = _registry.OPS[NAMES[0]].overloads
    args = (x, *rows, 16, 1e-5, True, last)
    for value, plain in zip(run["cpu"](*args), run["reference"](*args), strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.fuzz
@given(data=st.data())
@pytest.mark.parametrize("backend", ["cpu"])
def test_any_shape_dtype_and_option(backend, data):
    skip_unless_available(NAMES[0], backend)
    draw = lambda strategy: data.draw(strategy)  # noqa: E731
    groups, last = draw(st.integers(1, 6)), draw(st.booleans())
    shape = (draw(st.integers(0, 3)), groups * draw(st.integers(1, 9)), draw(st.integers(0, 90)))
    x, grad, rows = make(
        shape, *draw(st.sampled_from(DTYPES)), parameters=draw(st.booleans()), modulated=draw(st.booleans())
    )
    layouts = st.sampled_from(["plain", "sliced", "permuted", "expanded", "unaligned"])
    turn = lambda t: laid_out(t.transpose(1, 2).contiguous() if last else t, draw(layouts))  # noqa: E731
    x, grad = turn(x), turn(grad)
    rows = [t if t is None else laid_out(t, draw(layouts)) for t in rows]
    if 0 in shape:
        y, mean, rstd = _registry.OPS[NAMES[0]].overloads[backend](x, *rows, groups, 1e-5, True, last)
        assert y.shape == x.shape and mean.shape == rstd.shape == (shape[0], groups)
        return
    eps, silu = draw(st.sampled_from([1e-6, 1e-5, 1e-3])), draw(st.booleans())
    check(backend, x, grad, rows, groups, eps=eps, silu=silu, last=last)


# ---- the sum of a residual branch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 16, 6, 5), (2, 12, 20, 40), (2, 15, 7, 1)], ids=str)
def test_the_sum_and_then_the_norm(backend, layout, shape):
    """With sums that need no rounding (an interpreter truncates), bit for bit; whatever the branch's strides."""
    device = skip_unless_available(ADDS[0], backend)
    x, _, (weight, bias, scale, shift) = make(shape, device=device)
    eighths = lambda t: laid_out((8 * t).round() / 8, layout)  # noqa: E731
    x, branch, rest = eighths(x), eighths(torch.randn_like(x)), (weight, bias, 1, scale, shift)
    total, y = add_group_norm_silu(x, branch, *rest, backend=backend)
    expected = x + branch
    assert torch.equal(total, expected) and torch.equal(y, group_norm_silu(total, *rest, backend=backend))
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert total.is_contiguous(memory_format=wanted) and y.is_contiguous(memory_format=wanted)
    again, _ = add_group_norm_silu(x, branch.contiguous(memory_format=torch.channels_last), *rest, backend=backend)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_sixteen_bit_sum_is_rounded_once_and_then_normed(backend):
    skip_unless_available(ADDS[0], backend)
    x, branch, (weight, bias, *_) = make((2, 8, 5, 7), BF16)
    total, y = add_group_norm_silu(x, branch, weight.bfloat16(), bias.bfloat16(), 2, backend=backend)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, group_norm_silu(total, weight.bfloat16(), bias.bfloat16(), 2, backend=backend))


@pytest.mark.parametrize("uses", ["both", "the sum", "the norm"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck_of_the_sum(uses, channels_last):
    x, branch, rows = make((2, 4, 2, 3), F64, F64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = [t.clone().requires_grad_() for t in (x, branch, *rows)]

    def run(x, branch, weight, bias, scale, shift):
        total, y = add_group_norm_silu(x, branch, weight, bias, 2, scale, shift)
        return {"both": (total, y), "the sum": total, "the norm": y}[uses]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_gradients_of_the_sum(backend, layout):
    device = skip_unless_available(ADDS[0], backend)
    x, branch, rows = make((2, 8, 3, 5), BF16, F32, device=device)
    x, branch = ((8 * t).round() / 8 for t in (x, branch))  # whose sum an interpreter does not truncate
    grads = torch.randn_like(x), torch.randn_like(x)

    def found(kind, backend):
        leaves = [laid_out(t, layout) for t in (x, branch)] + [t.clone() for t in rows]
        leaves = [(t.double() if kind == F64 else t).detach().requires_grad_() for t in leaves]
        results = add_group_norm_silu(*leaves[:4], 2, *leaves[4:], backend=backend)
        return torch.autograd.grad(results, leaves, [grad.to(results[0].dtype) for grad in grads])

    oracle, eager = found(F64, None), found(BF16, "reference")
    for value, plain, exact in zip(found(BF16, backend), eager, oracle, strict=True):
        allowed = testing.tolerance(plain, exact) + 1e-5 * exact.abs().max().item()
        assert value.dtype == plain.dtype and testing.error(value, exact) <= allowed


@pytest.mark.parametrize("backend", list(NAMESPACES))
@pytest.mark.parametrize("name", ADDS)
@pytest.mark.parametrize("kind", ["plain", "permuted", "empty", "requires_grad"])
def test_opcheck_of_the_sum(backend, name, kind):
    skip_unless_available(name, backend)
    x, other, rows = make((2, 4, 0 if kind == "empty" else 6))
    x, other = laid_out(x, kind), laid_out(other, kind)
    args = (x, other, *rows, 2, 1e-5, True, False)
    if name == ADDS[1]:
        if kind == "requires_grad":
            pytest.skip(f"{name} has no backward; {ADDS[0]} refuses second derivatives")
        args = (other, other, x, *rows, *_registry.OPS[ADDS[0]].overloads["reference"](*args)[2:], 2, True, False)
    if kind == "requires_grad":
        args = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    opcheck(getattr(getattr(torch.ops, NAMESPACES[backend]), name).default, tuple(args))


def test_errors_of_the_sum():
    x, weight = torch.ones(2, 4, 3), torch.ones(4)
    for branch, error, message in (
        (torch.ones(2, 4, 2), ValueError, r"branch must be x's shape = \(2, 4, 3\), got \(2, 4, 2\)"),
        (x.half(), TypeError, "branch must have dtype torch.float32 like x, got torch.float16"),
        (x.to("meta"), ValueError, "branch must be on cpu like x, got meta"),
    ):
        with pytest.raises(error, match=f"add_group_norm_silu: {message}"):
            add_group_norm_silu(x, branch, weight, weight, 2)
    with pytest.raises(ValueError, match="add_group_norm_silu: num_groups must be at least 1 and divide C = 4, got 3"):
        add_group_norm_silu(x, x, weight, weight, 3)
    total, _ = add_group_norm_silu(x.requires_grad_(), x, weight, weight, 2)
    with pytest.raises(RuntimeError, match="add_group_norm_silu_backward: has no backward"):
        torch.autograd.grad(total.square().sum(), x, create_graph=True)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("parameters", "modulated"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradcheck(channels_last, parameters, modulated):
    x, _, (weight, bias, scale, shift) = make((2, 4, 2, 3), F64, F64, parameters=parameters, modulated=modulated)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, scale, shift)]
    run = lambda x, w, b, s, t: group_norm_silu(x, w, b, 2, s, t, silu=parameters)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_gradients_through_the_public_function(backend, layout):
    device = skip_unless_available(NAMES[0], backend)
    x, grad, rows = make((2, 8, 3, 5), BF16, F32, device=device)
    leaves = [laid_out(x, layout), *(t.clone() for t in rows)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = group_norm_silu(*leaves[:3], 2, *leaves[3:], backend=backend)
    found = torch.autograd.grad(y, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    plain = [t.detach().requires_grad_() for t in leaves]
    oracle = torch.autograd.grad(group_norm_silu(*wide[:3], 2, *wide[3:]), wide, grad.double())
    eager = torch.autograd.grad(group_norm_silu(*plain[:3], 2, *plain[3:], backend="reference"), plain, grad)
    for value, expected, exact, leaf in zip(found, eager, oracle, leaves, strict=True):
        assert value.dtype == leaf.dtype and value.shape == leaf.shape
        allowed = testing.tolerance(expected, exact) + 1e-5 * exact.abs().max().item()
        assert testing.error(value, exact) <= allowed


def test_second_derivatives_are_refused():
    x, _, (weight, bias, *_) = make((2, 4, 3))
    x.requires_grad_()
    y = group_norm_silu(x, weight, bias, 2)
    with pytest.raises(RuntimeError, match="group_norm_silu_backward: has no backward, .*drop create_graph=True"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_statistics_are_not_differentiable():
    x, _, rows = make((2, 4, 3))
    y, mean, rstd = torch.ops.genengine_reference.group_norm_silu(x.requires_grad_(), *rows, 2, 1e-5, True, False)
    assert y.requires_grad and not mean.requires_grad and not rstd.requires_grad


# ---- torch's own checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", list(NAMESPACES))
@pytest.mark.parametrize("kind", ["plain", "permuted", "expanded", "empty", "requires_grad", "bare", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, kind, name):
    skip_unless_available(name, backend)
    bare = kind == "bare"
    x, grad, rows = make((2, 4, 0 if kind == "empty" else 6), parameters=not bare, modulated=not bare)
    x, grad = (t.transpose(1, 2) if kind == "last" else laid_out(t, kind) for t in (x, grad))
    flags = (True, kind == "last")
    groups = 2
    args = (x, *rows, groups, 1e-5, *flags)
    if name == NAMES[1]:
        if kind == "requires_grad":
            pytest.skip(f"{name} has no backward; {NAMES[0]} refuses second derivatives")
        statistics = _registry.OPS[NAMES[0]].overloads["reference"](*args)[1:]
        args = (grad, x, *rows, *statistics, groups, *flags)
    if kind == "requires_grad":
        args = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
    opcheck(getattr(getattr(torch.ops, NAMESPACES[backend]), name).default, tuple(args))


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_fullgraph_compile(layout):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5):
        x, grad, (weight, bias, scale, shift) = make((batch, 8, 4, 6))
        leaves = [laid_out(x, layout), weight, bias, scale.clone(), shift.clone()]
        leaves = [t.detach().requires_grad_() for t in leaves]
        got, expected = (f(*leaves[:3], 4, *leaves[3:]) for f in (compiled, group_norm_silu))
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        grads = [torch.autograd.grad(y, leaves, grad) for y in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


def test_autocast_casts_nothing():
    x, _, (weight, bias, *_) = make((2, 4, 6), BF16, F32)
    with torch.autocast("cpu", dtype=BF16):
        assert group_norm_silu(x, weight, bias, 2).dtype == BF16
        assert group_norm_silu(x.float(), weight, bias, 2).dtype == F32


# ---- arguments -----------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 4)
MESSAGES = [
    ({"x": None}, TypeError, "group_norm_silu: x must be a tensor, got NoneType"),
    ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "x must have dtype .*got torch.int64"),
    ({"x": torch.ones(4)}, ValueError, r"x must be \(B, C, ...\), got \(4,\); add a batch dimension"),
    ({"num_groups": 3}, ValueError, "num_groups must be at least 1 and divide C = 4, got 3"),
    ({"num_groups": 0}, ValueError, "num_groups must be at least 1 and divide C = 4, got 0"),
    ({"num_groups": 2.0}, TypeError, "num_groups must be an int, got float"),
    ({"weight": None}, ValueError, "weight and bias must both be given or both be None, got no weight"),
    ({"scale": ONES}, ValueError, "scale and shift must both be given or both be None, got no shift"),
    ({"weight": torch.ones(5)}, ValueError, r"weight must be \(C,\) = \(4,\), got \(5,\)"),
    ({"scale": torch.ones(4), "shift": ONES}, ValueError, r"scale must be \(B, C\) = \(2, 4\), got \(4,\)"),
    ({"bias": torch.ones(4, device="meta")}, ValueError, "bias must be on cpu like x, got meta; move it"),
    ({"bias": torch.ones(4, dtype=F16)}, TypeError, "bias must have dtype torch.float32 like weight, got"),
    ({"scale": ONES.half(), "shift": ONES.half()}, TypeError, "scale must have dtype torch.float32 with an x of"),
    ({"x": torch.ones(2, 4, dtype=F64)}, TypeError, "weight must have dtype torch.float64 with an x of"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ({"eps": "small"}, TypeError, "eps must be a float, got str"),
    ({"silu": 1}, TypeError, "silu must be True or False, got int"),
    ({"backend": "fast"}, ValueError, "group_norm_silu: backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), MESSAGES)
def test_error_messages(change, error, message):
    arguments = {"x": torch.ones(2, 4, 3), "weight": torch.ones(4), "bias": torch.ones(4), "num_groups": 2} | change
    with pytest.raises(error, match=message):
        group_norm_silu(**arguments)


def test_float64_has_no_kernel():
    x, _, (weight, bias, *_) = make((2, 4, 3), F64, F64)
    with pytest.raises(RuntimeError, match="group_norm_silu: backend 'cpu' cannot run here: its kernels take"):
        group_norm_silu(x, weight, bias, 2, backend="cpu")
