"""ema_update: the same bits on every backend, any mixture of dtypes, strides and sizes, and nothing else touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, ema_update

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
NAMESPACES = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}
SHAPES = [(3, 5), (7,), (), (0, 2), (2, 3, 4, 5), (4099,)]


def make(device, dtype=F32, layout="plain"):
    return [laid_out(torch.randn(shape), layout).to(device, dtype) for shape in SHAPES]


def expected(averages, values, decay):
    """In float64, rounded once."""
    return [
        (a.double() + (1 - decay) * (v.double() - a.double())).to(a.dtype)
        for a, v in zip(averages, values, strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_set(backend):
    device = skip_unless_available("ema_update", backend)
    assert _verify.run(_registry.OPS["ema_update"], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_the_formula(backend, decay):
    device = skip_unless_available("ema_update", backend)
    averages, values = make(device), make(device)
    wanted = expected(averages, values, decay)
    before = [t.clone() for t in values]
    ema_update(averages, values, decay, backend=backend)
    for got, exact in zip(averages, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=3e-7, atol=3e-7)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    """Of the averages, of the values, and of both; an average keeps its strides, and its holes what they hold."""
    if layout == "expanded":
        pytest.skip("an expanded average would be written several times; see test_expanded_values")
    device = skip_unless_available("ema_update", backend)
    for of_averages, of_values in ((layout, "plain"), ("plain", layout), (layout, layout)):
        averages = [laid_out(t, of_averages) for t in make(device)]
        values = [laid_out(t, of_values) for t in make(device)]
        wanted, strides = expected(averages, values, 0.9), [t.stride() for t in averages]
        holes = [t._base.isnan().sum() for t in averages if t._base is not None]
        ema_update(averages, values, 0.9, backend=backend)
        for got, exact in zip(averages, wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=3e-7, atol=3e-7)
        assert strides == [t.stride() for t in averages]
        assert holes == [t._base.isnan().sum() for t in averages if t._base is not None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_values(backend):
    device = skip_unless_available("ema_update", backend)
    average, value = torch.randn(4, 6, device=device), torch.randn(6, device=device).expand(4, 6)
    wanted = expected([average], [value], 0.3)[0]
    ema_update([average], [value], 0.3, backend=backend)
    torch.testing.assert_close(average, wanted, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tensors_and_again(backend):
    """More tensors than one CUDA launch takes; Triton's table of addresses is used again, and not for other tensors."""
    device = skip_unless_available("ema_update", backend)
    count = 1100 if backend != "triton" else 30
    for _ in range(2):
        averages, values = ([torch.randn(1 + i % 3, device=device) for i in range(count)] for _ in range(2))
        for _ in range(2):
            wanted = expected(averages, values, 0.75)
            ema_update(averages, values, 0.75, backend=backend)
            for got, exact in zip(averages, wanted, strict=True):
                torch.testing.assert_close(got, exact, rtol=3e-7, atol=3e-7)
    ema_update([], [], 0.5, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_element(backend):
    device = skip_unless_available("ema_update", backend)
    averages, values = make(device), make(device)
    values[0][1, 2] = float("nan")
    ema_update(averages, values, 0.9, backend=backend)
    assert averages[0].isnan().nonzero().tolist() == [[1, 2]] and not any(t.isnan().any() for t in averages[1:])


def test_float64_and_mixtures():
    averages = [torch.randn(3, dtype=dtype) for dtype in (F32, F64, BF16)]
    values = [torch.randn(3, dtype=dtype) for dtype in (F64, F32, F16)]
    wanted = expected(averages, values, 0.9)
    ema_update(averages, values, 0.9)
    for got, exact in zip(averages, wanted, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_list(data):
    skip_unless_available("ema_update", "cpu")
    layouts = st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"])
    dtypes, averages, values = st.sampled_from([F32, F16, BF16]), [], []
    for _ in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(0, 9), max_size=4))
        if data.draw(st.booleans()):
            shape = [*shape, data.draw(st.integers(1, 300))]
        averages.append(laid_out(torch.randn(shape), data.draw(layouts)).to(data.draw(dtypes)))
        values.append(laid_out(torch.randn(shape), data.draw(layouts)).to(data.draw(dtypes)))
    decay = data.draw(st.floats(0, 1))
    again = [t.clone() for t in averages]
    ema_update(averages, values, decay, backend="cpu")
    ema_update(again, values, decay, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(averages, again, strict=True))


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set_has_the_same_bits(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        assert _verify.run(_registry.OPS["ema_update"], "cpu", torch.device("cpu")) == []


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
def test_threads_change_no_bit():
    averages, values = [torch.randn(100_003), torch.randn(5)], [torch.randn(100_003), torch.randn(5)]
    again = [t.clone() for t in averages]
    ema_update(averages, values, 0.9)
    torch.set_num_threads(2)
    try:
        ema_update(again, values, 0.9)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(averages, again, strict=True))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("layout", ["plain", "permuted", "channels_last"])
def test_opcheck(namespace, layout):
    skip_unless_available("ema_update", NAMESPACES[namespace])
    averages, values = ([laid_out(t, layout) for t in make("cpu")] for _ in range(2))
    opcheck(getattr(torch.ops, namespace).ema_update.default, (averages, values, 0.25))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a, v: ema_update(a, v, 0.9), fullgraph=True, backend=counter)
    for _ in range(20):
        averages, values = make("cpu"), make("cpu")
        again = [t.clone() for t in averages]
        compiled(averages, values)
        ema_update(again, values, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(averages, again, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": []}, ValueError, "values must be as many as averages = 1, got 0"),
        (
            {"values": [torch.zeros(2)]},
            ValueError,
            "values\\[0\\] must be averages\\[0\\]'s shape = \\(3,\\), got \\(2,\\)",
        ),
        ({"values": [torch.zeros(3).int()]}, TypeError, "values\\[0\\] must have dtype"),
        ({"averages": [torch.zeros(3, requires_grad=True)]}, RuntimeError, "has no backward, .*torch.no_grad"),
        ({"decay": 1.5}, ValueError, "decay must be in \\[0, 1\\], got 1.5"),
        ({"decay": float("nan")}, ValueError, "decay must be in \\[0, 1\\], got nan"),
        ({"decay": None}, TypeError, "decay must be a float, got NoneType"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"averages": [torch.zeros(3)], "values": [torch.zeros(3)], "decay": 0.9}
    with pytest.raises(error, match=f"ema_update: .*{message}"):
        ema_update(**(good | change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_count_the_update(backend):
    """By which autograd, and caches of what is made of weights, know that they changed."""
    device = skip_unless_available("ema_update", backend)
    averages, values = ([torch.randn(3, 4, device=device) for _ in range(2)] for _ in range(2))
    before = [average._version for average in averages]
    ema_update(averages, values, 0.9, backend=backend)
    assert all(average._version > old for average, old in zip(averages, before, strict=True))
    with torch.inference_mode():
        ema_update([torch.zeros(2, device=device)], [torch.ones(2, device=device)], 0.9, backend=backend)
