"""diffuse: the noised sample and the training target, with the specification's noise, on every backend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, skip_unless_available
from torch.library import opcheck

from genengine import random, testing
from genengine.ops import EXTENSION, _registry, _verify, diffuse

NAMESPACES = ["genengine", "genengine_triton", "genengine_reference"]


def coefficients(batch, dtype=torch.float32):
    return [torch.rand(batch, dtype=dtype) - 0.5 for _ in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    device = skip_unless_available("diffuse", backend)
    assert testing.cases("diffuse", device)
    assert _verify.run(_registry.OPS["diffuse"], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_formula_with_the_noise_of_the_specification(backend, memory_format):
    device = skip_unless_available("diffuse", backend)
    x0 = torch.randn(2, 3, 5, 7, device=device).contiguous(memory_format=memory_format)
    a, s, cx, ce = (c.to(device) for c in coefficients(2))
    ids = torch.tensor([11, 2**32 - 1], device=device)
    x_t, target = diffuse(x0, a, s, cx, ce, seed=2**63, sample_ids=ids, step=9, backend=backend)
    assert x_t.stride() == x0.stride()
    for b, sample in enumerate((11, 2**32 - 1)):
        eps = random.normal(105, seed=2**63, sample=sample, step=9, stream="diffuse").reshape(3, 5, 7)
        eps = torch.from_numpy(eps).double()
        clean = x0[b].cpu().double()
        assert (x_t[b].cpu() - (a[b].item() * clean + s[b].item() * eps)).abs().max() < 1e-6
        assert (target[b].cpu() - (cx[b].item() * clean + ce[b].item() * eps)).abs().max() < 1e-6


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set_has_the_same_bits(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        assert _verify.run(_registry.OPS["diffuse"], "cpu", torch.device("cpu")) == []


@pytest.mark.fuzz
@given(
    batch=st.integers(0, 3), inner=st.lists(st.integers(0, 9), max_size=3), drawn=st.booleans(), seed=st.integers(0, 99)
)
def test_any_shape(batch, inner, drawn, seed):
    skip_unless_available("diffuse", "cpu")
    x0, c = torch.randn(batch, *inner), coefficients(batch)
    draw = {"seed": seed} if drawn else {"noise": torch.randn(batch, *inner)}
    got, expected = (diffuse(x0, *c, **draw, backend=backend) for backend in ("cpu", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded", "unaligned"])
def test_views_equal_contiguous_inputs(view):
    x0 = {
        "sliced": torch.randn(3, 8, 6, 6)[:, 2:5],
        "transposed": torch.randn(3, 4, 6, 5).transpose(2, 3),
        "expanded": torch.randn(1, 4, 6, 5).expand(3, -1, -1, -1),
        "unaligned": torch.randn(3 * 4 * 25 + 1)[1:].view(3, 4, 5, 5),
    }[view]
    c = coefficients(3)
    expected = diffuse(x0.contiguous(), *c, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(diffuse(x0, *c, seed=1), expected, strict=True))


def test_float64_and_gradient():
    c = coefficients(2, torch.float64)
    x0 = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: diffuse(x, *c, seed=4), (x0,))
    x0 = torch.randn(2, 5, requires_grad=True)
    c = coefficients(2)
    x_t, target = diffuse(x0, *c, seed=4)
    x_t.sum().backward()  # the target's gradient is absent
    assert torch.allclose(x0.grad, c[0][:, None].expand(2, 5))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(namespace, shape, requires_grad):
    x0 = torch.randn(shape, requires_grad=requires_grad)
    arguments = (x0, *coefficients(shape[0]), torch.tensor(3), None, 2, None)
    opcheck(getattr(torch.ops, namespace).diffuse.default, arguments)


def test_fullgraph_compile():
    torch._dynamo.reset()
    x0, c = torch.randn(2, 3, 4, 4), coefficients(2)
    compiled = torch.compile(lambda x: diffuse(x, *c, seed=3)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x0), diffuse(x0, *c, seed=3)[0] * 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": torch.zeros(2, 3).int()}, TypeError, "x0 must have dtype"),
        ({"alpha": torch.zeros(3)}, ValueError, "alpha must be \\(B,\\) = \\(2,\\), got \\(3,\\)"),
        ({"sigma": torch.zeros(2).half()}, TypeError, "sigma must have dtype"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"step": 2**32}, ValueError, "step must be in"),
        ({"seed": None}, ValueError, "exactly one of seed and noise must be given, got neither"),
        ({"noise": torch.zeros(2, 3)}, ValueError, "exactly one of seed and noise must be given, got both"),
        ({"seed": None, "noise": torch.zeros(2, 4)}, ValueError, "noise must be x0's shape"),
        ({"c_eps": torch.zeros(2, requires_grad=True)}, RuntimeError, "only x0 is differentiable"),
    ],
)
def test_bad_arguments(change, error, message):
    names = ("alpha", "sigma", "c_x0", "c_eps")
    good = {"x0": torch.zeros(2, 3), **dict(zip(names, coefficients(2), strict=True)), "seed": 0}
    with pytest.raises(error, match=f"diffuse: .*{message}"):
        diffuse(**(good | change))
