"""attention's CUDA C++ kernels on a Hopper GPU, against float64.

Without a GPU, tests/ops/test_hopper_attention.py emulates a block of them."""

from functools import partial

import pytest
import torch
from ops.test_attention import check, make
from support import laid_out, skip_unless_available

from genengine.ops import _registry, attention
from genengine.ops.attention import HOPPER_HEAD_DIMS

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16]
# Around every tile's: 64 rows of a warpgroup, tiles of 64, 96, 128 and 176 keys, of 128, 192 and 256 queries.
LENGTHS = (1, 63, 64, 65, 96, 127, 128, 129, 176, 177, 192, 193, 255, 256, 257, 384, 385, 1000)


@pytest.fixture(autouse=True)
def device():
    device = skip_unless_available("attention", "cuda", torch.bfloat16)
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        pytest.skip(f"needs a Hopper GPU (compute capability 9.0), this one has {major}.{minor}")
    return device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HOPPER_HEAD_DIMS)
def test_against_float64(dtype, dim, device):
    for index, queries in enumerate(LENGTHS):
        keys = LENGTHS[(7 * index + 3) % len(LENGTHS)]
        check("cuda", *make(2, queries, keys, 3, dim, dtype, device), False, [None, 0.3, 1.5][index % 3])
        check("cuda", *make(2, queries, queries, 3, dim, dtype, device), True)


@pytest.mark.parametrize("kind", ["sliced", "permuted", "expanded", "unaligned"])
@pytest.mark.parametrize("dim", [64, 72])
def test_strides(kind, dim, device):
    """What TMA cannot read is copied first."""
    q, k, v, grad_o = (laid_out(t, kind) for t in make(2, 130, 200, 3, dim, torch.bfloat16, device))
    check("cuda", q, k, v, grad_o)


@pytest.mark.parametrize("dim", HOPPER_HEAD_DIMS)
def test_more_tiles_than_multiprocessors(dim, device):
    """Every block takes several tiles: barriers' phases go on from one to the next."""
    for causal in (False, True):
        check("cuda", *make(5, 700, 700, 17, dim, torch.bfloat16, device), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_reruns_and_batch_splits_agree_bit_for_bit(causal, device):
    q, k, v, _ = make(3, 400, 400, 5, 72, torch.bfloat16, device)
    forward = lambda *t: attention(*t, causal=causal, return_lse=True, backend="cuda")  # noqa: E731
    once = forward(q, k, v)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(once, forward(q, k, v), strict=True))
    alone = forward(*(t[1:2] for t in (q, k, v)))
    assert all(torch.equal(a[1:2], b) for a, b in zip(once, alone, strict=True))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)  # some torch refuse the reference's products otherwise
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dim", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_deterministic_where_that_is_asked(causal, dim, device, deterministic):
    """Many tiles of keys add to each tile of queries, more than there are multiprocessors at once."""
    q, k, v, grad_o = make(2, 1500, 1500, 9, dim, torch.bfloat16, device)
    o, lse = attention(q, k, v, causal=causal, return_lse=True, backend="cuda")
    backward = _registry.OPS["attention_backward"].overloads["cuda"]
    once = backward(grad_o, q, k, v, o, lse, causal, dim**-0.5)
    for _ in range(5):
        again = backward(grad_o, q, k, v, o, lse, causal, dim**-0.5)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    check("cuda", q, k, v, grad_o, causal)


def test_in_turns_launches_on_several_streams_end(device, deterministic):
    """Together they have more blocks than multiprocessors, and each waits only for blocks that have begun."""
    q, k, v, grad_o = make(2, 1500, 1500, 9, 64, torch.bfloat16, device)
    o, lse = attention(q, k, v, return_lse=True, backend="cuda")
    backward = partial(_registry.OPS["attention_backward"].overloads["cuda"], grad_o, q, k, v, o, lse, False, 0.125)
    once, found = backward(), []
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1, 0)]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(backward())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for again in found for a, b in zip(once, again, strict=True))


def test_a_nan_stays_in_its_query(device):
    q, k, v, _ = (t.clone() for t in make(2, 300, 300, 2, 64, torch.bfloat16, device))
    whole = attention(q, k, v, backend="cuda")
    q[0, 3, 1, 0] = float("nan")
    o = attention(q, k, v, backend="cuda")
    assert o[0, 3, 1].isnan().all()
    o[0, 3, 1] = whole[0, 3, 1]
    assert torch.equal(o, whole)


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"heads": 0}], ids=str)
def test_empty(shape, device):
    q, k, v, _ = make(**({"dim": 64, "dtype": torch.bfloat16, "device": device} | shape))
    o, lse = attention(q, k, v, return_lse=True, backend="cuda")
    assert o.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])


def test_what_it_does_not_take_is_refused_by_name(device):
    q = torch.zeros(1, 4, 2, 40, device=device, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="head dims of 64, 72, 80, 96, 128, not 40"):
        attention(q, q, q, backend="cuda")
    q = torch.zeros(1, 4, 2, 64, device=device)
    with pytest.raises(RuntimeError, match="float16 and bfloat16, not torch.float32"):
        attention(q, q, q, backend="cuda")
    with pytest.raises(RuntimeError, match="the CUDA kernel takes float16 or bfloat16"):
        _registry.OPS["attention"].overloads["cuda"](q, q, q, False, 1.0)
