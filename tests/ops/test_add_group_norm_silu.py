"""add_group_norm_silu: the sum of a residual branch and the norm of it, forward and backward, any layout."""

import pytest
import torch
from group_norm_silu_support import ADDS, BF16, F32, F64, NAMES, NAMESPACES, make
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch.library import opcheck

from genengine import testing
from genengine.ops import _registry, add_group_norm_silu, group_norm_silu


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_may_be_its_own_branch(backend):
    """As one tensor, which is what a compiler makes of two equal views."""
    device = skip_unless_available(ADDS[0], backend)
    x, _, rows = make((2, 8, 5), device=device)
    total, y, _, _ = _registry.OPS[ADDS[0]].overloads[backend](x, x, *rows, 2, 1e-5, True, False)
    expected, _, _ = _registry.OPS[NAMES[0]].overloads[backend](2 * x, *rows, 2, 1e-5, True, False)
    assert torch.equal(total, 2 * x) and torch.equal(y, expected)


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


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
def test_leaves_accumulate_gradients_of_their_own(layout):
    x, branch, (weight, bias, *_) = make((2, 8, 3, 5))
    leaves = [laid_out(t, layout).detach().requires_grad_() for t in (x, branch)]
    for _ in range(2):
        total, y = add_group_norm_silu(*leaves, weight, bias, 2)
        (total * x + y).sum().backward()
    total, y = add_group_norm_silu(*leaves, weight, bias, 2)
    once = torch.autograd.grad((total * x + y).sum(), leaves[0])[0]
    for leaf in leaves:
        torch.testing.assert_close(leaf.grad, 2 * once)


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
