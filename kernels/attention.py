"""Triton kernels of attention, forward and backward, in blocks of queries and keys that never leave the chip.

FLOPs: forward 4 N M D per head (2 products), backward 14 N M D (dk and dv 4 products, dq 3), of which causal skips
half. Bytes: forward q, k, v, o once where a head's keys stay in the second-level cache. 16-bit products, their sums and
the softmax in float32; the weights are rounded to the inputs' dtype before they are multiplied. float32 is multiplied
as float32 (no TF32). No atomics: every output element is summed by one program, in order.

A head dim D is covered by HEAD + TAIL columns, powers of two: 72 = 64 + 16 (8 of them masked), where one power of two
would be 128. Strides of batch, token and head come in units of UNIT elements, the largest power of two that divides
them all: so the compiler knows that rows begin on 16 bytes, also where D is no multiple of 16.
"""

import math

import torch
import triton
import triton.language as tl

from genengine.kernels._dot import dot
from genengine.kernels._launch import DTYPE_NAMES

LOG2_E = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2.0))
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _tile(
    base, first, token, limit, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of BLOCK rows, zero from DIM on and, if CHECK, from row `limit` on."""
    row, column = first + tl.arange(0, BLOCK)[:, None], FIRST + tl.arange(0, WIDTH)[None, :]
    at = base + row.to(tl.int64) * token + column
    if CHECK:
        if FIRST + WIDTH > DIM:
            return tl.load(at, mask=(row < limit) & (column < DIM), other=0.0)
        else:
            return tl.load(at, mask=row < limit, other=0.0)
    else:
        if FIRST + WIDTH > DIM:
            return tl.load(at, mask=column < DIM, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _rows(
    base, first, token, limit, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """The two parts of BLOCK rows; without a TAIL the second is the first, and unused."""
    head = _tile(base, first, token, limit, DIM, 0, HEAD, BLOCK, CHECK)
    tail = head
    if TAIL > 0:
        tail = _tile(base, first, token, limit, DIM, HEAD, TAIL, BLOCK, CHECK)
    return head, tail


@triton.jit
def _write(base, row, token, limit, head, tail, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    at = base + row.to(tl.int64)[:, None] * token
    column = tl.arange(0, HEAD)[None, :]
    kind = base.dtype.element_ty
    tl.store(at + column, head.to(kind), mask=(row[:, None] < limit) & (column < DIM))
    if TAIL > 0:
        column = HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(at + column, tail.to(kind), mask=(row[:, None] < limit) & (column < DIM))


@triton.jit
def _products(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """a b^T over all columns."""
    product = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32))
    if TAIL > 0:
        product = dot(a_tail, tl.trans(b_tail), product)
    return product


@triton.jit
def _accumulate(sums, sums_tail, weights, b, b_tail, TAIL: tl.constexpr):
    """sums + weights b, in both parts."""
    weights = weights.to(b.dtype)
    sums = dot(weights, b, sums)
    if TAIL > 0:
        sums_tail = dot(weights, b_tail, sums_tail)
    return sums, sums_tail


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    o, o_tail, total, largest, q, q_tail, k_at, v_at, row, first, last, keys, k_token, v_token, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys first .. last: unnormalised o, the sum and the largest exponent (base 2)."""
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_M)
        k, k_tail = _rows(k_at, start, k_token, keys, DIM, HEAD, TAIL, BLOCK_M, MASKED)
        s = _products(q, q_tail, k, k_tail, TAIL)
        if MASKED:
            seen = key[None, :] < keys
            if CAUSAL:
                seen = seen & (key[None, :] <= row[:, None])
            s = tl.where(seen, s, float("-inf"))
        now = tl.maximum(largest, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        largest = now
        o = o * shrink[:, None]
        if TAIL > 0:
            o_tail = o_tail * shrink[:, None]
        v, v_tail = _rows(v_at, start, v_token, keys, DIM, HEAD, TAIL, BLOCK_M, MASKED)
        o, o_tail = _accumulate(o, o_tail, p, v, v_tail, TAIL)
    return o, o_tail, total, largest


@triton.jit(do_not_specialize=[
    "blocks", "heads", "queries", "keys", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch",
    "v_token", "v_head",
])  # fmt: skip
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, blocks, heads, queries, keys, q_batch, q_token, q_head, k_batch, k_token,
    k_head, v_batch, v_token, v_head, scale,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_N queries of one head; the longest rows of a causal head first."""
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    index = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = index // heads, index % heads
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q_at = q_ptr + (b * q_batch + h * q_head) * UNIT
    k_at = k_ptr + (b * k_batch + h * k_head) * UNIT
    v_at = v_ptr + (b * v_batch + h * v_head) * UNIT
    q, q_tail = _rows(q_at, block * BLOCK_N, q_token.to(tl.int64) * UNIT, queries, DIM, HEAD, TAIL, BLOCK_N, True)
    k_row, v_row = k_token.to(tl.int64) * UNIT, v_token.to(tl.int64) * UNIT
    o = tl.zeros([BLOCK_N, HEAD], tl.float32)
    o_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    free = tl.minimum(block * BLOCK_N, keys) if CAUSAL else keys  # the keys before it need no mask
    free = free // BLOCK_M * BLOCK_M
    last = tl.minimum((block + 1) * BLOCK_N, keys) if CAUSAL else keys
    o, o_tail, total, largest = _attend(
        o, o_tail, total, largest, q, q_tail, k_at, v_at, row, 0, free, keys, k_row, v_row, scale,
        CAUSAL, False, DIM, HEAD, TAIL, BLOCK_M, STAGES,
    )  # fmt: skip
    o, o_tail, total, largest = _attend(
        o, o_tail, total, largest, q, q_tail, k_at, v_at, row, free, last, keys, k_row, v_row, scale,
        CAUSAL, True, DIM, HEAD, TAIL, BLOCK_M, 1,
    )  # fmt: skip
    inverse = 1.0 / total[:, None]
    o_token = heads.to(tl.int64) * DIM
    o_at = o_ptr + b * queries * o_token + h * DIM
    _write(o_at, row, o_token, queries, o * inverse, o_tail * inverse, DIM, HEAD, TAIL)
    lse = (largest + tl.log2(total)) * _LN_2
    tl.store(lse_ptr + index * queries + row, lse, mask=row < queries)


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[
    "blocks", "heads", "queries", "grad_batch", "grad_token", "grad_head", "o_batch", "o_token", "o_head",
])  # fmt: skip
def attention_delta_kernel(
    grad_ptr, o_ptr, delta_ptr, blocks, heads, queries, grad_batch, grad_token, grad_head, o_batch, o_token, o_head,
    UNIT: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of grad_o o, of BLOCK_N queries of one head."""
    index = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = index // heads, index % heads
    block = tl.program_id(0) % blocks
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_at = grad_ptr + (b * grad_batch + h * grad_head) * UNIT
    o_at = o_ptr + (b * o_batch + h * o_head) * UNIT
    grad, grad_tail = _rows(
        grad_at, block * BLOCK_N, grad_token.to(tl.int64) * UNIT, queries, DIM, HEAD, TAIL, BLOCK_N, True
    )
    o, o_tail = _rows(o_at, block * BLOCK_N, o_token.to(tl.int64) * UNIT, queries, DIM, HEAD, TAIL, BLOCK_N, True)
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(grad_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    tl.store(delta_ptr + index * queries + row, delta, mask=row < queries)


@triton.jit
def _over_queries(
    dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_at, grad_at, lse_at, delta_at, key, first, last, queries,
    q_token, grad_token, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of a block of keys, summed over the queries first .. last; all matrices transposed: (M, N)."""
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_N)
        inside = row < queries
        q, q_tail = _rows(q_at, start, q_token, queries, DIM, HEAD, TAIL, BLOCK_N, MASKED)
        grad, grad_tail = _rows(grad_at, start, grad_token, queries, DIM, HEAD, TAIL, BLOCK_N, MASKED)
        lse = tl.load(lse_at + row, mask=inside, other=0.0) if MASKED else tl.load(lse_at + row)
        delta = tl.load(delta_at + row, mask=inside, other=0.0) if MASKED else tl.load(delta_at + row)
        p = tl.exp2(_products(k, k_tail, q, q_tail, TAIL) * scale - (lse * _LOG2_E)[None, :])
        if MASKED:
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & (key[:, None] <= row[None, :])
            p = tl.where(seen, p, 0.0)
        dv, dv_tail = _accumulate(dv, dv_tail, p, grad, grad_tail, TAIL)
        ds = p * (_products(v, v_tail, grad, grad_tail, TAIL) - delta[None, :])
        dk, dk_tail = _accumulate(dk, dk_tail, ds, q, q_tail, TAIL)
    return dk, dk_tail, dv, dv_tail


@triton.jit(do_not_specialize=[
    "blocks", "heads", "queries", "keys", "grad_batch", "grad_token", "grad_head", "q_batch", "q_token", "q_head",
    "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
])  # fmt: skip
def attention_dkdv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, blocks, heads, queries, keys,
    grad_batch, grad_token, grad_head, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, natural_scale,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M keys of one head."""
    block = tl.program_id(0) % blocks
    index = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = index // heads, index % heads
    key = block * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_at = grad_ptr + (b * grad_batch + h * grad_head) * UNIT
    q_at = q_ptr + (b * q_batch + h * q_head) * UNIT
    k_at = k_ptr + (b * k_batch + h * k_head) * UNIT
    v_at = v_ptr + (b * v_batch + h * v_head) * UNIT
    lse_at, delta_at = lse_ptr + index * queries, delta_ptr + index * queries
    q_row, grad_row = q_token.to(tl.int64) * UNIT, grad_token.to(tl.int64) * UNIT
    k, k_tail = _rows(k_at, block * BLOCK_M, k_token.to(tl.int64) * UNIT, keys, DIM, HEAD, TAIL, BLOCK_M, True)
    v, v_tail = _rows(v_at, block * BLOCK_M, v_token.to(tl.int64) * UNIT, keys, DIM, HEAD, TAIL, BLOCK_M, True)
    dk = tl.zeros([BLOCK_M, HEAD], tl.float32)
    dv = tl.zeros([BLOCK_M, HEAD], tl.float32)
    dk_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    dv_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], tl.float32)
    # A key that does not exist makes a row that is not written: only queries need masks.
    first = block * BLOCK_M // BLOCK_N * BLOCK_N if CAUSAL else 0
    free = tl.cdiv((block + 1) * BLOCK_M, BLOCK_N) * BLOCK_N if CAUSAL else 0  # from here on no mask ...
    end = queries // BLOCK_N * BLOCK_N  # ... up to here
    free = tl.minimum(free, end)
    if CAUSAL:
        dk, dk_tail, dv, dv_tail = _over_queries(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_at, grad_at, lse_at, delta_at, key, first, free, queries,
            q_row, grad_row, scale, CAUSAL, True, DIM, HEAD, TAIL, BLOCK_N, 1,
        )  # fmt: skip
    dk, dk_tail, dv, dv_tail = _over_queries(
        dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_at, grad_at, lse_at, delta_at, key, free, end, queries,
        q_row, grad_row, scale, CAUSAL, False, DIM, HEAD, TAIL, BLOCK_N, STAGES,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = _over_queries(
        dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_at, grad_at, lse_at, delta_at, key, tl.maximum(end, first),
        queries, queries, q_row, grad_row, scale, CAUSAL, True, DIM, HEAD, TAIL, BLOCK_N, 1,
    )  # fmt: skip
    token = heads.to(tl.int64) * DIM
    offset = b * keys * token + h * DIM
    _write(dk_ptr + offset, key, token, keys, dk * natural_scale, dk_tail * natural_scale, DIM, HEAD, TAIL)
    _write(dv_ptr + offset, key, token, keys, dv, dv_tail, DIM, HEAD, TAIL)


@triton.jit
def _over_keys(
    dq, dq_tail, q, q_tail, grad, grad_tail, lse, delta, k_at, v_at, row, first, last, keys, k_token, v_token, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq / scale of a block of queries, summed over the keys first .. last."""
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_M)
        k, k_tail = _rows(k_at, start, k_token, keys, DIM, HEAD, TAIL, BLOCK_M, MASKED)
        v, v_tail = _rows(v_at, start, v_token, keys, DIM, HEAD, TAIL, BLOCK_M, MASKED)
        p = tl.exp2(_products(q, q_tail, k, k_tail, TAIL) * scale - lse[:, None])
        if MASKED:
            seen = key[None, :] < keys
            if CAUSAL:
                seen = seen & (key[None, :] <= row[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (_products(grad, grad_tail, v, v_tail, TAIL) - delta[:, None])
        dq, dq_tail = _accumulate(dq, dq_tail, ds, k, k_tail, TAIL)
    return dq, dq_tail


@triton.jit(do_not_specialize=[
    "blocks", "heads", "queries", "keys", "grad_batch", "grad_token", "grad_head", "q_batch", "q_token", "q_head",
    "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head",
])  # fmt: skip
def attention_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, blocks, heads, queries, keys,
    grad_batch, grad_token, grad_head, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, natural_scale,
    CAUSAL: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_N queries of one head; the longest rows of a causal head first."""
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    index = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = index // heads, index % heads
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_at = grad_ptr + (b * grad_batch + h * grad_head) * UNIT
    q_at = q_ptr + (b * q_batch + h * q_head) * UNIT
    k_at = k_ptr + (b * k_batch + h * k_head) * UNIT
    v_at = v_ptr + (b * v_batch + h * v_head) * UNIT
    k_row, v_row = k_token.to(tl.int64) * UNIT, v_token.to(tl.int64) * UNIT
    q, q_tail = _rows(q_at, block * BLOCK_N, q_token.to(tl.int64) * UNIT, queries, DIM, HEAD, TAIL, BLOCK_N, True)
    grad, grad_tail = _rows(
        grad_at, block * BLOCK_N, grad_token.to(tl.int64) * UNIT, queries, DIM, HEAD, TAIL, BLOCK_N, True
    )
    inside = row < queries
    lse = tl.load(lse_ptr + index * queries + row, mask=inside, other=0.0) * _LOG2_E
    delta = tl.load(delta_ptr + index * queries + row, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_N, HEAD], tl.float32)
    dq_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], tl.float32)
    free = tl.minimum(block * BLOCK_N, keys) if CAUSAL else keys
    free = free // BLOCK_M * BLOCK_M
    last = tl.minimum((block + 1) * BLOCK_N, keys) if CAUSAL else keys
    dq, dq_tail = _over_keys(
        dq, dq_tail, q, q_tail, grad, grad_tail, lse, delta, k_at, v_at, row, 0, free, keys, k_row, v_row, scale,
        CAUSAL, False, DIM, HEAD, TAIL, BLOCK_M, STAGES,
    )  # fmt: skip
    dq, dq_tail = _over_keys(
        dq, dq_tail, q, q_tail, grad, grad_tail, lse, delta, k_at, v_at, row, free, last, keys, k_row, v_row, scale,
        CAUSAL, True, DIM, HEAD, TAIL, BLOCK_M, 1,
    )  # fmt: skip
    token = heads.to(tl.int64) * DIM
    at = dq_ptr + b * queries * token + h * DIM
    _write(at, row, token, queries, dq * natural_scale, dq_tail * natural_scale, DIM, HEAD, TAIL)


# ---- launch configurations -----------------------------------------------------------------------------------------

# (BLOCK_N queries, BLOCK_M keys, warps, stages) by the HEAD + TAIL columns they serve (at most that many), for 16-bit
# inputs on GPUs whose products run asynchronously on whole tiles (Hopper, data-centre Blackwell), on all others (whose
# programs may have 99 KB of shared memory), and for 32-bit inputs. The largest tiles that compile without spills and
# whose products are not serialised, as `tools/inspect_gpu.py` sees it; none was timed.
FORWARD = {
    "wgmma": {128: (128, 128, 8, 2), 256: (128, 32, 8, 2)},
    "mma": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    "fp32": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
}
# At 256 columns dk and dv of 64 keys, the fewest that Hopper's products take, fill the registers: mma there, too.
DKDV = {
    "wgmma": {96: (64, 64, 8, 2), 128: (32, 128, 8, 1), 256: (32, 32, 8, 1)},
    "mma": {80: (32, 128, 8, 2), 96: (16, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    "fp32": {64: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
DQ = {
    "wgmma": {96: (64, 128, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 8, 2)},
    "mma": {80: (64, 64, 8, 2), 96: (64, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 16, 8, 2)},
    "fp32": {64: (64, 32, 8, 1), 256: (16, 16, 8, 1)},
}
DELTA_ROWS, DELTA_WARPS = 32, 4


def split(dim):
    """(HEAD, TAIL): powers of two that cover `dim` columns; a TAIL where two parts are fewer than one."""
    whole = max(16, triton.next_power_of_2(dim))
    head = whole // 2
    if dim <= head or head < 16:
        return whole, 0
    tail = max(16, triton.next_power_of_2(dim - head))
    return (head, tail) if tail < head else (whole, 0)


def family(q):
    """Which of a table's columns the launches of q take."""
    if q.dtype == torch.float32:
        return "fp32"
    hopper = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    return "wgmma" if hopper else "mma"


def config(table, kind, dim):
    """(BLOCK_N, BLOCK_M, warps, stages) of one kernel for one head dim."""
    columns = sum(split(dim))
    return table[kind][min(size for size in table[kind] if size >= columns)]


# ---- launchers: the ops' own signatures ----------------------------------------------------------------------------


def attention(q, k, v, causal, scale):
    batch, queries, heads, dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return o, lse
    unit, (q, k, v), strides = _in_units(q, k, v)
    block_n, block_m, num_warps, stages = config(FORWARD, family(q), dim)
    head, tail = split(dim)
    blocks = triton.cdiv(queries, block_n)
    with torch.cuda.device_of(q):
        attention_kernel[(batch * heads * blocks,)](
            q, k, v, o, lse, blocks, heads, queries, k.shape[1], *strides, scale * LOG2_E,
            CAUSAL=causal, UNIT=unit, DIM=dim, HEAD=head, TAIL=tail, BLOCK_N=block_n,
            BLOCK_M=block_m, STAGES=stages, num_warps=num_warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return o, lse


def attention_backward(grad_o, q, k, v, o, lse, causal, scale):
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    make = torch.zeros if q.numel() == 0 else torch.empty
    dq, dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    unit, (grad_o, q, k, v, o), strides = _in_units(grad_o, q, k, v, o)
    head, tail = split(dim)
    shared = {"UNIT": unit, "DIM": dim, "HEAD": head, "TAIL": tail, "enable_fp_fusion": True}
    with torch.cuda.device_of(q):
        blocks = triton.cdiv(queries, DELTA_ROWS)
        attention_delta_kernel[(batch * heads * blocks,)](
            grad_o, o, delta, blocks, heads, queries, *strides[:3], *strides[12:], **shared, BLOCK_N=DELTA_ROWS,
            num_warps=DELTA_WARPS, num_stages=1,
        )  # fmt: skip
        inputs = (grad_o, q, k, v, lse, delta)
        sizes = (heads, queries, keys, *strides[:12], scale * LOG2_E, scale)
        for table, kernel, count, outputs in (
            (DKDV, attention_dkdv_kernel, keys, (dk, dv)),
            (DQ, attention_dq_kernel, queries, (dq,)),
        ):
            block_n, block_m, num_warps, stages = config(table, family(q), dim)
            blocks = triton.cdiv(count, block_m if table is DKDV else block_n)
            kernel[(batch * heads * blocks,)](
                *inputs, *outputs, blocks, *sizes, CAUSAL=causal, **shared, BLOCK_N=block_n, BLOCK_M=block_m,
                STAGES=stages, num_warps=num_warps, num_stages=stages,
            )  # fmt: skip
    return dq, dk, dv


def _in_units(*tensors):
    """(UNIT, tensors, strides): batch, token and head strides in units of at most 16 bytes that divide them all."""
    tensors = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    strides = [0 if t.shape[i] == 1 else t.stride(i) for t in tensors for i in range(3)]
    unit = math.gcd(16 // tensors[0].element_size(), *strides)
    return unit, tensors, [stride // unit for stride in strides]


# ---- what `make inspect` compiles ahead of time --------------------------------------------------------------------

_ARCHS = {"wgmma": (90, 100), "mma": (80,), "fp32": (80, 90, 100)}
_DIMS = {"wgmma": (64, 72, 96, 128, 256), "mma": (64, 72, 96, 128, 256), "fp32": (64, 128, 256)}


def variants():
    found = []
    for kind, dims in _DIMS.items():
        for dim in dims:
            for causal in (False, True) if kind != "fp32" and dim != 256 else (False,):
                found += _variants(kind, dim, causal)
    return found


def _variants(kind, dim, causal):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    head, tail = split(dim)
    shared = {"UNIT": 16 // dtype.itemsize, "DIM": dim, "HEAD": head, "TAIL": tail}
    label = f"{kind}_{dim}{'_causal' if causal else ''}"
    for name, kernel, table in (
        ("attention", attention_kernel, FORWARD),
        ("attention_dkdv", attention_dkdv_kernel, DKDV),
        ("attention_dq", attention_dq_kernel, DQ),
    ):
        block_n, block_m, num_warps, stages = config(table, kind, dim)
        constexprs = {**shared, "CAUSAL": causal, "BLOCK_N": block_n, "BLOCK_M": block_m, "STAGES": stages}
        found = _variant(f"{name}_{label}", kernel, dtype, constexprs, num_warps, stages)
        wgmma = kind == "wgmma" and (dim <= 128 or table is FORWARD)
        yield found | {"streaming": False, "needs": ("HGMMA",) if wgmma else (), "archs": _ARCHS[kind]}
    if not causal:
        constexprs = {**shared, "BLOCK_N": DELTA_ROWS}
        yield _variant(f"attention_delta_{label}", attention_delta_kernel, dtype, constexprs, DELTA_WARPS, 1) | {
            "archs": _ARCHS[kind]
        }


def _variant(name, kernel, dtype, constexprs, num_warps, num_stages):
    kind = lambda argument: (  # noqa: E731
        "constexpr" if argument in constexprs
        else "*fp32" if argument in ("lse_ptr", "delta_ptr")
        else f"*{DTYPE_NAMES[dtype]}" if argument.endswith("_ptr")
        else "fp32" if argument.endswith("scale")
        else "i32"
    )  # fmt: skip
    signature = {argument: kind(argument) for argument in kernel.arg_names}
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "divisible": [argument for argument, declared in signature.items() if declared.startswith("*")],
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }
