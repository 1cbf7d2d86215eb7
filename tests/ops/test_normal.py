"""normal, uniform: the same bits on every backend, instruction set, split and thread count."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from genengine import random, testing
from genengine.ops import EXTENSION, normal, uniform

KINDS = {"normal": (normal, random.normal), "uniform": (uniform, random.uniform)}
IDS = [0, 9, 2**32 - 1]
SEED = 2**63 + 12345


def oracle(kind, shape, *, seed=SEED, step=7, stream="step", ids=IDS):
    count = math.prod(shape[1:])
    draw = KINDS[kind][1]
    samples = [draw(count, seed=seed, sample=i, step=step, stream=stream) for i in ids]
    return torch.from_numpy(np.stack(samples).reshape(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 1), (3, 5), (3, 63), (3, 64), (3, 65), (3, 2, 7, 11), (3, 4099)])
def test_bits_equal_the_specification(backend, kind, shape):
    device = skip_unless_available(f"{kind}_out", backend)
    ids = torch.tensor(IDS, device=device)
    got = KINDS[kind][0](shape, seed=SEED, sample_ids=ids, step=7, stream="step", device=device, backend=backend)
    assert torch.equal(got.cpu(), oracle(kind, shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_per_sample_and_extreme_counters(backend):
    device = skip_unless_available("normal_out", backend)
    seeds = torch.tensor([-1, 0, 5], device=device)
    got = normal((3, 9), seed=seeds, step=2**32 - 1, stream=2**32 - 1, device=device, backend=backend)
    for b, seed in enumerate((2**64 - 1, 0, 5)):
        expected = random.normal(9, seed=seed, sample=b, step=2**32 - 1, stream=2**32 - 1)
        assert torch.equal(got[b].cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_batch_is_the_same_batch(backend):
    device = skip_unless_available("normal_out", backend)
    draw = lambda ids: normal((len(ids), 3, 7, 5), seed=4, sample_ids=torch.tensor(ids, device=device), backend=backend)  # noqa: E731
    whole = draw([0, 1, 2, 3, 4])
    assert torch.equal(torch.cat([draw([0, 1]), draw([2]), draw([3, 4])]), whole)


@pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
@pytest.mark.parametrize("isa", testing.ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_has_the_same_bits(isa, kind):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        got = KINDS[kind][0]((3, 10_007), seed=SEED, sample_ids=torch.tensor(IDS), step=7, stream="step")
    assert torch.equal(got, oracle(kind, (3, 10_007)))


def test_thread_count_changes_nothing():
    shape = (2, 3, 257, 129)
    single = normal(shape, seed=8)
    torch.set_num_threads(2)
    try:
        double = normal(shape, seed=8)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(single, double)


def test_moments_and_fit_on_ten_million_draws():
    """Bounds are six standard errors of each statistic; the fit is a chi-square over 1,000 equally likely cells."""
    n = 10_000_000
    z = normal((1, n), seed=2024).double()[0]
    assert abs(z.mean().item()) < 6 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 6 * math.sqrt(2 / n)
    assert abs((z**3).mean().item()) < 6 * math.sqrt(15 / n)
    assert abs((z**4).mean().item() - 3) < 6 * math.sqrt(96 / n)
    pairs = z.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean().item()) < 6 / math.sqrt(n / 2)  # cos and sin of one angle
    cells = torch.histc(torch.special.ndtr(z), bins=1000, min=0, max=1)
    chi_square = ((cells - n / 1000) ** 2 / (n / 1000)).sum().item()
    assert abs(chi_square - 999) < 6 * math.sqrt(2 * 999)
    assert z.abs().max().item() <= math.sqrt(48 * math.log(2)) + 1e-6


def test_uniform_fit_on_ten_million_draws():
    n = 10_000_000
    u = uniform((1, n), seed=77)[0]
    cells = torch.histc(u.double(), bins=1000, min=0, max=1)
    assert abs(((cells - n / 1000) ** 2 / (n / 1000)).sum().item() - 999) < 6 * math.sqrt(2 * 999)
    assert u.min().item() > 0 and u.max().item() < 1


COUNTER = st.integers(0, 2**32 - 1)


@pytest.mark.fuzz
@given(
    shape=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**64 - 1),
    step=COUNTER,
    data=st.data(),
)
def test_any_shape_and_place(shape, layout, seed, step, data):
    """A backend against the specification, which knows one sample at a time."""
    skip_unless_available("normal_out", "cpu")
    shape[0] = min(shape[0], 4)
    ids = data.draw(st.lists(COUNTER, min_size=shape[0], max_size=shape[0]))
    stream = data.draw(st.sampled_from(sorted(random.STREAMS)))
    arguments = {"seed": seed, "sample_ids": torch.tensor(ids, dtype=torch.int64), "step": step, "stream": stream}
    for kind, (draw, _) in KINDS.items():
        out = laid_out(torch.zeros(shape), layout if layout != "expanded" else "plain")
        assert draw(shape, **arguments, out=out, backend="cpu") is out
        if out.numel():
            assert torch.equal(out, oracle(kind, shape, seed=seed, step=step, stream=stream, ids=ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_float32_draw_converted(dtype):
    assert torch.equal(normal((2, 33), seed=1, dtype=dtype), normal((2, 33), seed=1).to(dtype))


def test_out_is_written_through_its_strides():
    out = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert normal(out.shape, seed=1, out=out) is out
    assert torch.equal(out, normal((2, 3, 4, 5), seed=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(backend, shape):
    device = skip_unless_available("normal_out", backend)
    assert normal(shape, seed=0, device=device, backend=backend).shape == shape


@pytest.mark.parametrize("namespace", ["genengine", "genengine_triton", "genengine_reference"])
@pytest.mark.parametrize("op", ["normal_out", "uniform_out"])
def test_opcheck(namespace, op):
    overload = getattr(getattr(torch.ops, namespace), op).default
    for shape in ((2, 7), (0, 3)):
        opcheck(overload, (torch.zeros(shape), torch.tensor(3), torch.arange(shape[0]), 5, 1))


def test_fullgraph_compile_does_not_recompile_over_steps():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda step: normal((2, 8), seed=5, step=step) * 2, fullgraph=True, backend=counter)
    for step in range(20):
        assert torch.equal(compiled(step), normal((2, 8), seed=5, step=step) * 2)
    assert counter.frame_count <= 3  # 0 and 1 are special to torch.compile, then the step is symbolic


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "normal: seed must be in \\[0, 2\\*\\*64\\), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"seed": torch.tensor(1.0)}, TypeError, "int64 tensor, got a tensor of torch.float32"),
        (
            {"seed": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "seed must be \\(\\) or \\(B,\\) = \\(2,\\), got \\(3,\\)",
        ),
        (
            {"sample_ids": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "sample_ids must be \\(B,\\) = \\(2,\\), got \\(3,\\)",
        ),
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be an int64 tensor"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"step": np.int64(-1)}, ValueError, "step must be in"),
        ({"step": 1.5}, TypeError, "step must be an int"),
        ({"stream": "weather"}, ValueError, "stream must be one of"),
        ({"shape": ()}, ValueError, "shape must be \\(B, ...\\)"),
        ({"dtype": torch.int32}, TypeError, "out must have dtype"),
        ({"out": torch.zeros(3, 4)}, ValueError, "out must have shape"),
        ({"backend": "cude"}, ValueError, "backend must be one of reference, cpu, triton, cuda"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        normal(**({"shape": (2, 4), "seed": 0} | arguments))
