"""attention's backward on Hopper (csrc/cuda/hopper/attention_backward.h), its three launches, run without a GPU: as
test_hopper_attention.py runs the forward pass, with blocks at the same time."""

import ctypes

import pytest
import torch
from emulated_support import Guarded, build, packed, tensors

from genengine import testing
from genengine.ops.attention import HOPPER_HEAD_DIMS, reference_attention, reference_attention_backward
from genengine.testing.attention import roundings

pytestmark = pytest.mark.emulated

FORMS = [(dim, causal) for dim in HOPPER_HEAD_DIMS for causal in (False, True)]
# Around the tiles: 64 rows of a warpgroup, 64 queries, 128 keys; one, two and several of both.
LENGTHS = (1, 7, 64, 65, 127, 129, 300)


class Rows(ctypes.Structure):
    """Rows of tests/emulated/hopper_attention_backward.cpp."""

    _fields_ = [("base", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]

    @classmethod
    def of(cls, tensor):
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class Call(ctypes.Structure):
    """BackwardArguments of tests/emulated/hopper_attention_backward.cpp."""

    _fields_ = [
        *((name, Rows) for name in ("grad_o", "q", "k", "v", "o", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "stats", "sums", "turns")),
        *((name, ctypes.c_int) for name in ("batch", "heads", "queries", "keys", "dim", "half", "causal")),
        ("blocks", ctypes.c_int), ("together", ctypes.c_int), ("scale", ctypes.c_float), ("seed", ctypes.c_uint64),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return ctypes.CDLL(build("hopper_attention_backward.cpp", tmp_path_factory.mktemp("backward")))


def make(queries, keys, dim, dtype, causal, scale, batch=1, heads=1):
    """grad_o, q, k, v, o, lse: what the backward pass takes; beyond them memory is NaN."""
    q, k, v = tensors(queries, keys, dim, dtype, batch, heads)
    grad_o, o = packed(batch, queries, heads, dim, dtype, 2)
    found, lse = reference_attention(q, k, v, causal, scale)
    return grad_o, q, k, v, o.copy_(found), lse


def run(block, arguments, causal, scale, *, blocks=1, together=1, turns=False, seed=0):
    """dq, dk, dv, and dq's sums before they are rounded."""
    grad_o, q, k, v, o, lse = arguments
    batch, queries, heads, dim = q.shape
    tiles = -(-queries // 64)
    grads = [Guarded(t.shape, t.dtype) for t in (q, k, v)]
    stats = Guarded((batch, heads, tiles * 64, 2), torch.float32)
    sums = Guarded((batch, heads, tiles * 64, dim), torch.float32, 0.0)
    counters = Guarded((batch, heads, tiles), torch.int32, 0)
    call = Call(
        *(Rows.of(t) for t in (grad_o, q, k, v, o, *(g.tensor for g in grads))), lse.data_ptr(),
        stats.tensor.data_ptr(), sums.tensor.data_ptr(), counters.tensor.data_ptr() if turns else None, batch, heads,
        queries, k.shape[1], dim, q.dtype == torch.float16, causal, blocks, together, scale, seed,
    )  # fmt: skip
    block.attention_backward(ctypes.byref(call))
    for guarded in (stats, counters):
        guarded.checked()
    return [g.checked() for g in (*grads, sums)]


def check(block, arguments, causal, scale, **how):
    found = run(block, arguments, causal, scale, **how)
    eager = reference_attention_backward(*arguments, causal, scale)
    exact = reference_attention_backward(*(t.double() for t in arguments), causal, scale)
    grad_o, q, k, v, _, _ = arguments
    extra = roundings(q, k, v, grad_o, causal, scale)
    for name, value, plain, oracle in zip(("dq", "dk", "dv"), found[:3], eager, exact, strict=True):
        error, allowed = testing.error(value, oracle), testing.tolerance(plain, oracle) + extra[name]
        assert error <= allowed, f"{name}, {tuple(q.shape)}, {k.shape[1]} keys, {how}: {error} > {allowed}"
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "causal"), FORMS)
def test_against_float64(block, dim, causal, dtype):
    for index, queries in enumerate(LENGTHS):
        keys = queries if causal else LENGTHS[(3 * index + 2) % len(LENGTHS)]
        scale, blocks = (dim**-0.5, 0.3, 0.7)[index % 3], index % 3 + 1
        arguments = make(queries, keys, dim, dtype, causal, scale)
        check(block, arguments, causal, scale, blocks=blocks, together=blocks, turns=index % 2 == 0, seed=index)


@pytest.mark.parametrize(("dim", "causal"), FORMS)
def test_batches_heads_and_blocks(block, dim, causal):
    """In turns, every schedule and every number of blocks gives the same bits; else all but the order of dq's sums."""
    arguments = make(130, 130 if causal else 300, dim, torch.bfloat16, causal, 0.2, batch=2, heads=2)
    expected = check(block, arguments, causal, 0.2, turns=True)
    for seed, blocks in enumerate((2, 5)):
        how = {"blocks": blocks, "together": blocks, "seed": seed + 1}
        found = run(block, arguments, causal, 0.2, turns=True, **how)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), how
        found = check(block, arguments, causal, 0.2, **how)
        assert all(torch.equal(a, b) for a, b in zip(found[1:3], expected[1:3], strict=True)), how


@pytest.mark.parametrize("dim", [72, 128])
def test_schedules(block, dim):
    """Stages used many times over, at many a schedule."""
    arguments = make(700, 300, dim, torch.float16, False, 0.2)
    expected = check(block, arguments, False, 0.2, turns=True)
    for seed in range(1, 5):
        found = run(block, arguments, False, 0.2, turns=True, seed=seed, blocks=3, together=3)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), seed
        check(block, arguments, False, 0.2, seed=seed)


@pytest.mark.parametrize("causal", [False, True])
def test_in_turns_a_block_for_each_tile_ends_however_few_run_at_once(block, causal):
    """As it is launched: other work may have most of a GPU, and a block that waits for one not begun never ends."""
    arguments = make(300, 300 if causal else 400, 64, torch.bfloat16, causal, 0.2, batch=2)
    expected = check(block, arguments, causal, 0.2, turns=True)
    blocks = 2 * -(-arguments[2].shape[1] // 128)
    for together in (1, 2, 3):
        found = run(block, arguments, causal, 0.2, turns=True, blocks=blocks, together=together, seed=together)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), together
