"""attention's block of threads on Hopper (csrc/cuda/hopper/attention_forward.h), run without a GPU: TMA, wgmma and
barriers as the PTX manual has them, at drawn times (tests/emulated)."""

import ctypes

import pytest
import torch
from emulated_support import Guarded, build, tensors

from genengine import testing
from genengine.ops.attention import HOPPER_HEAD_DIMS, reference_attention
from genengine.testing.attention import roundings

pytestmark = pytest.mark.emulated

FEW_DIMS = (64, 72)  # that have a form for few queries
DTYPES = [torch.bfloat16, torch.float16]
FORMS = [
    (dim, form) for dim in HOPPER_HEAD_DIMS for form in ("full", "causal", "few") if form != "few" or dim in FEW_DIMS
]


class Call(ctypes.Structure):
    """AttentionCall of tests/emulated/hopper_attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "lse")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in "qkvo"),
        *((name, ctypes.c_int) for name in ("batch", "heads", "queries", "keys", "dim", "half", "causal", "few")),
        ("section", ctypes.c_int), ("blocks", ctypes.c_int), ("scale", ctypes.c_float), ("seed", ctypes.c_uint64),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return ctypes.CDLL(build("hopper_attention.cpp", tmp_path_factory.mktemp("attention")))


def run(block, q, k, v, form, scale, *, blocks=1, section=1, seed=0):
    """o and lse of a grid of blocks."""
    batch, queries, heads, dim = q.shape
    o, lse = Guarded(q.shape, q.dtype), Guarded((batch, heads, queries), torch.float32)
    strides = [(ctypes.c_int64 * 3)(t.stride(2), t.stride(1), t.stride(0)) for t in (q, k, v, o.tensor)]
    call = Call(
        *(t.data_ptr() for t in (q, k, v, o.tensor, lse.tensor)), *strides, batch, heads, queries, k.shape[1], dim,
        q.dtype == torch.float16, form == "causal", form == "few", section, blocks, scale, seed,
    )  # fmt: skip
    block.attention(ctypes.byref(call))
    return o.checked(), lse.checked()


def check(block, q, k, v, form, scale, **how):
    o, lse = run(block, q, k, v, form, scale, **how)
    compare(o, lse, q, k, v, form == "causal", scale)
    return o, lse


def compare(o, lse, q, k, v, causal, scale):
    eager = reference_attention(q, k, v, causal, scale)
    oracle = reference_attention(q.double(), k.double(), v.double(), causal, scale)
    extra = roundings(q, k, v, torch.zeros_like(q), causal, scale)
    for name, value, plain, exact in zip(("o", "lse"), (o, lse), eager, oracle, strict=True):
        error, allowed = testing.error(value, exact), testing.tolerance(plain, exact) + extra[name]
        assert error <= allowed, f"{name}, {tuple(q.shape)}, {k.shape[1]} keys: {error} > {allowed}"


# Around every tile's: 64 rows of a warpgroup, 64 to 176 keys; one, two and several tiles of both.
LENGTHS = (1, 7, 64, 65, 127, 129, 300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "form"), FORMS)
def test_against_float64(block, dim, form, dtype):
    for index, queries in enumerate(LENGTHS):
        keys = queries if form == "causal" else LENGTHS[(3 * index + 2) % len(LENGTHS)]
        scale = (dim**-0.5, 0.3, 1.5)[index % 3]
        check(block, *tensors(queries, keys, dim, dtype), form, scale, blocks=index % 3 + 1, seed=index)


@pytest.mark.parametrize(("dim", "form"), FORMS)
def test_batches_heads_and_blocks(block, dim, form):
    """Every schedule, every number of blocks and every order of the tiles gives the same bits."""
    q, k, v = tensors(130, 130 if form == "causal" else 200, dim, torch.bfloat16, batch=2, heads=3)
    expected = check(block, q, k, v, form, 0.2)
    for seed, (blocks, section) in enumerate([(2, 2), (3, 4), (20, 6)]):
        found = run(block, q, k, v, form, 0.2, blocks=blocks, section=section, seed=seed + 1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (blocks, section)


@pytest.mark.parametrize(("dim", "form"), [(64, "full"), (64, "causal"), (72, "few"), (128, "full")])
def test_schedules(block, dim, form):
    """Stages used many times over, at many a schedule."""
    q, k, v = tensors(100, 100 if form == "causal" else 1300, dim, torch.float16)
    expected = check(block, q, k, v, form, 0.2)
    for seed in range(1, 7):
        found = run(block, q, k, v, form, 0.2, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed


@pytest.mark.parametrize(("dim", "form"), FORMS)
def test_infinite_and_nan_scores(block, dim, form):
    """A NaN stays in its query; a key of -inf scores counts for nothing, whichever tile it is in."""
    q, k, v = (t.clone() for t in tensors(70, 70, dim, torch.bfloat16, heads=2))
    whole = run(block, q, k, v, form, 0.2)
    q[0, 3, 1, 0] = float("nan")
    found = run(block, q, k, v, form, 0.2)
    assert found[0][0, 3, 1].isnan().all() and found[1][0, 1, 3].isnan()
    found[0][0, 3, 1], found[1][0, 1, 3] = whole[0][0, 3, 1], whole[1][0, 1, 3]
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    q, k, v = tensors(70, 70 if form == "causal" else 300, dim, torch.bfloat16)
    q[..., 0], k[:, -60:, :, 0] = 1, -float("inf")
    compare(*run(block, q, k, v, form, 0.2), q, k[:, :-60], v[:, :-60], form == "causal", 0.2)
