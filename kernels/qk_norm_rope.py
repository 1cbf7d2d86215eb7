"""Triton kernels of qk_norm_rope, in place too, and its backward. Heads in registers, float32 arithmetic and sums.

Bytes per element of q and k (e each): forward 2 e, 7 FLOPs; backward 3 e, 16 FLOPs. v is copied by the same programs.
A tile holds the first and the second elements of the pairs of some heads: interleaved they are loaded together and
split in registers, as halves they are two loads; what is not rotated is then a third. A row is a (token, head) of q, k
or v.
Lengths and strides come in units, powers of two that divide them: so the compiler sees wide accesses at D = 72 too.
The weights' gradients are summed over the rows of a program, then in one order over the programs: no atomics.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES

MAX_DIM = 256
CHUNK, COLUMNS = 64, 32  # the tile of partial sums that one program adds up at a time
TILES = 8  # tiles of rows whose gradients of the weights one program of the backward sums


_TABLE_INTS = ["cos_batch", "cos_token", "sin_batch", "sin_token"]
_SIZES = ["rows", "tokens", "heads", "dim_units", "half_units"]
_FORWARD_INTS = [
    *_SIZES, "x_batch", "x_token", "x_part", "x_head", "out_batch", "out_token", "out_part", "out_head", *_TABLE_INTS
]  # fmt: skip
_BACKWARD_INTS = [
    *_SIZES, "grad_batch", "grad_token", "grad_part", "grad_head", "x_batch", "x_token", "x_part", "x_head",
    *_TABLE_INTS
]  # fmt: skip


@triton.jit
def _load_row_pairs(ptr, at, inside_row, dim, half, SPLIT: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):
    """(a, b, rest) of a tile of rows as float32, zeros outside; rest is one column of zeros where REST is 0.

    SPLIT: pairs stand side by side, in one load. at, inside_row: (ROWS, 1).
    """
    if SPLIT:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(ptr + at + column, mask=inside_row & (column < dim), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
        rest = tl.zeros_like(tl.sum(a, axis=1, keep_dims=True))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        inside = inside_row & (column < half)
        a = tl.load(ptr + at + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(ptr + at + half + column, mask=inside, other=0.0).to(tl.float32)
        if REST:
            column = 2 * half + tl.arange(0, REST)[None, :]
            rest = tl.load(ptr + at + column, mask=inside_row & (column < dim), other=0.0).to(tl.float32)
        else:
            rest = tl.zeros_like(tl.sum(a, axis=1, keep_dims=True))
    return a, b, rest


@triton.jit
def _store_row_pairs(
    ptr, at, inside_row, dim, half, a, b, rest, SPLIT: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """What `_load_row_pairs` reads, back to memory."""
    kind = ptr.dtype.element_ty
    if SPLIT:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * PAIRS))
        tl.store(ptr + at + column, both.to(kind), mask=inside_row & (column < dim))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        inside = inside_row & (column < half)
        tl.store(ptr + at + column, a.to(kind), mask=inside)
        tl.store(ptr + at + half + column, b.to(kind), mask=inside)
        if REST:
            column = 2 * half + tl.arange(0, REST)[None, :]
            tl.store(ptr + at + column, rest.to(kind), mask=inside_row & (column < dim))


@triton.jit
def _sum_of_rows(a, b, rest):
    return tl.sum(a, axis=1, keep_dims=True) + tl.sum(b, axis=1, keep_dims=True) + tl.sum(rest, axis=1, keep_dims=True)


@triton.jit
def _turn(a, b, cos_ptr, sin_ptr, cos_at, sin_at, inside_row, half, sign, PAIRS: tl.constexpr):
    """The pairs below `half` rotated, by the angle or (sign -1) back; the others as they are."""
    pair = tl.arange(0, PAIRS)[None, :]
    inside = inside_row & (pair < half)
    cos = tl.load(cos_ptr + cos_at + pair, mask=inside, other=1.0)
    sin = tl.load(sin_ptr + sin_at + pair, mask=inside, other=0.0) * sign
    return tl.where(inside, a * cos - b * sin, a), tl.where(inside, b * cos + a * sin, b)


@triton.jit(do_not_specialize=_FORWARD_INTS)
def forward_kernel(
    x_ptr, out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, rows, tokens, heads, dim_units, half_units,
    x_batch, x_token, x_part, x_head, out_batch, out_token, out_part, out_head,
    cos_batch, cos_token, sin_batch, sin_token, eps, sign,
    PARTS: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, HALF_UNIT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of (B, N, PARTS, H): PARTS is 3 if v is copied, 2 in place."""
    dim, half = dim_units * UNIT, half_units * HALF_UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    head = (row % heads).to(tl.int64)
    part = ((row // heads) % PARTS).to(tl.int64)
    n = ((row // (heads * PARTS)) % tokens).to(tl.int64)
    b = (row // (heads * PARTS * tokens)).to(tl.int64)
    at = (b * x_batch + n * x_token + part * x_part + head * x_head) * UNIT
    first, second, rest = _load_row_pairs(x_ptr, at, inside, dim, half, SPLIT, PAIRS, REST)
    y, z, w = first, second, rest
    if NORM:
        rstd = 1.0 / tl.sqrt_rn(_sum_of_rows(y * y, z * z, w * w) / dim + eps)
        y, z, w = y * rstd, z * rstd, w * rstd
    if WEIGHTED:
        none = tl.zeros([1, 1], tl.int64)
        here = none == 0
        q_y, q_z, q_w = _load_row_pairs(q_weight_ptr, none, here, dim, half, SPLIT, PAIRS, REST)
        k_y, k_z, k_w = _load_row_pairs(k_weight_ptr, none, here, dim, half, SPLIT, PAIRS, REST)
        is_q = part == 0
        y, z, w = y * tl.where(is_q, q_y, k_y), z * tl.where(is_q, q_z, k_z), w * tl.where(is_q, q_w, k_w)
    if ROTARY:
        cos_at = (b * cos_batch + n * cos_token) * HALF_UNIT
        sin_at = (b * sin_batch + n * sin_token) * HALF_UNIT
        y, z = _turn(y, z, cos_ptr, sin_ptr, cos_at, sin_at, inside, half, sign, PAIRS)
    if PARTS == 3:
        is_v = part == 2
        y, z, w = tl.where(is_v, first, y), tl.where(is_v, second, z), tl.where(is_v, rest, w)
    tl.debug_barrier()  # out may be x: nothing is written before all of the tile is read
    out_at = (b * out_batch + n * out_token + part * out_part + head * out_head) * UNIT
    _store_row_pairs(out_ptr, out_at, inside, dim, half, y, z, w, SPLIT, PAIRS, REST)


@triton.jit(do_not_specialize=_BACKWARD_INTS)
def backward_kernel(
    grad_ptr, x_ptr, dx_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, partial_ptr, rows, tokens, heads,
    dim_units, half_units,
    grad_batch, grad_token, grad_part, grad_head, x_batch, x_token, x_part, x_head,
    cos_batch, cos_token, sin_batch, sin_token, eps,
    WEIGHTED: tl.constexpr, ROTARY: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, HALF_UNIT: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """dx of TILES * ROWS rows of (B, N, H) of one part, program_id(1); their dweight to partial (programs, 2, D)."""
    dim, half = dim_units * UNIT, half_units * HALF_UNIT
    part = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TILES * ROWS
    tiles = tl.minimum((rows - start + ROWS - 1) // ROWS, TILES)
    if part == 2:  # v
        for tile in range(tiles):
            row = start + tile * ROWS + tl.arange(0, ROWS)[:, None]
            inside = row < rows
            head = (row % heads).to(tl.int64)
            n = ((row // heads) % tokens).to(tl.int64)
            b = (row // (heads * tokens)).to(tl.int64)
            at = (b * grad_batch + n * grad_token + part * grad_part + head * grad_head) * UNIT
            y, z, w = _load_row_pairs(grad_ptr, at, inside, dim, half, SPLIT, PAIRS, REST)
            out_at = (((b * tokens + n) * 3 + part) * heads + head) * dim
            _store_row_pairs(dx_ptr, out_at, inside, dim, half, y, z, w, SPLIT, PAIRS, REST)
    else:
        dw_y = tl.zeros([ROWS, PAIRS], tl.float32)
        dw_z = tl.zeros([ROWS, PAIRS], tl.float32)
        dw_w = tl.zeros([ROWS, REST if REST else 1], tl.float32)
        for tile in range(tiles):
            row = start + tile * ROWS + tl.arange(0, ROWS)[:, None]
            inside = row < rows
            head = (row % heads).to(tl.int64)
            n = ((row // heads) % tokens).to(tl.int64)
            b = (row // (heads * tokens)).to(tl.int64)
            at = (b * grad_batch + n * grad_token + part * grad_part + head * grad_head) * UNIT
            g_y, g_z, g_w = _load_row_pairs(grad_ptr, at, inside, dim, half, SPLIT, PAIRS, REST)
            if ROTARY:
                cos_at = (b * cos_batch + n * cos_token) * HALF_UNIT
                sin_at = (b * sin_batch + n * sin_token) * HALF_UNIT
                g_y, g_z = _turn(g_y, g_z, cos_ptr, sin_ptr, cos_at, sin_at, inside, half, -1.0, PAIRS)
            at = (b * x_batch + n * x_token + part * x_part + head * x_head) * UNIT
            y, z, w = _load_row_pairs(x_ptr, at, inside, dim, half, SPLIT, PAIRS, REST)
            rstd = 1.0 / tl.sqrt_rn(_sum_of_rows(y * y, z * z, w * w) / dim + eps)
            rstd = tl.where(inside, rstd, 0.0)  # with eps = 0 the rows that are not there would give NaN
            y, z, w = y * rstd, z * rstd, w * rstd
            if WEIGHTED:
                dw_y += g_y * y
                dw_z += g_z * z
                dw_w += g_w * w
                none = tl.zeros([1, 1], tl.int64)
                here = none == 0
                weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
                p_y, p_z, p_w = _load_row_pairs(weight_ptr, none, here, dim, half, SPLIT, PAIRS, REST)
                g_y, g_z, g_w = g_y * p_y, g_z * p_z, g_w * p_w
            mean = _sum_of_rows(g_y * y, g_z * z, g_w * w) / dim
            out_at = (((b * tokens + n) * 3 + part) * heads + head) * dim
            _store_row_pairs(
                dx_ptr, out_at, inside, dim, half, rstd * (g_y - y * mean), rstd * (g_z - z * mean),
                rstd * (g_w - w * mean), SPLIT, PAIRS, REST,
            )  # fmt: skip
        if WEIGHTED:
            none = tl.zeros([1, 1], tl.int64)
            here = none == 0
            at = none + (tl.program_id(0).to(tl.int64) * 2 + part) * dim
            _store_row_pairs(
                partial_ptr, at, here, dim, half, tl.sum(dw_y, axis=0, keep_dims=True),
                tl.sum(dw_z, axis=0, keep_dims=True), tl.sum(dw_w, axis=0, keep_dims=True), SPLIT, PAIRS, REST,
            )  # fmt: skip


@triton.jit(do_not_specialize=["chunks", "dim"])
def reduce_kernel(partial_ptr, dq_weight_ptr, dk_weight_ptr, chunks, dim, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """dq_weight and dk_weight (D,), program_id(0): the sums over chunks, every CHUNK-th first, then those."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, CHUNK)[:, None]
    at = partial_ptr + row.to(tl.int64) * 2 * dim + tl.program_id(0) * dim + column[None, :]
    some = tl.zeros([CHUNK, COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNK):
        some += tl.load(at, mask=(first + row < chunks) & (column < dim)[None, :], other=0.0)
        at += CHUNK * 2 * dim
    out_ptr = dq_weight_ptr if tl.program_id(0) == 0 else dk_weight_ptr
    tl.store(out_ptr + column, tl.sum(some, axis=0).to(out_ptr.dtype.element_ty), mask=column < dim)


# ---- launchers: the ops' own signatures ------------------------------------------------------------------------------


def tile_config(dim, half, interleaved, elements):
    """The constexprs of a tile of about `elements` elements: how its rows are cut into pairs and how many there are."""
    split = interleaved or half == 0
    if split:
        pairs, rest = triton.next_power_of_2((dim + 1) // 2), 0
    else:
        pairs, rest = triton.next_power_of_2(half), triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0
    rows = max(1, elements // (2 * pairs + rest))
    return {"SPLIT": split, "ROWS": 1 << (rows.bit_length() - 1), "PAIRS": pairs, "REST": rest, "ROTARY": half > 0}


FORWARD_ELEMENTS = 2048
NUM_WARPS = 4


def backward_elements(half, interleaved):
    """Halves need sixteen elements per thread for wide accesses to either; with as many, pairs in one load spill."""
    return 1024 if interleaved and half else 2048


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _forward(_unit_rows(qkv), out, 3, q_weight, k_weight, cos, sin, eps, norm, interleaved, 1.0)
    return out


def qk_norm_rope_(qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    if _unit_rows(qkv) is not qkv:
        raise RuntimeError("qk_norm_rope: qkv must have an innermost stride of 1 to be written in place")
    _forward(qkv, qkv, 2, q_weight, k_weight, cos, sin, eps, norm, interleaved, 1.0)


def qk_norm_rope_backward(grad, qkv, q_weight, k_weight, cos, sin, eps, norm, interleaved):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    weighted = q_weight is not None
    make = torch.zeros if qkv.numel() == 0 else torch.empty
    dq, dk = (
        make(qkv.shape[-1] if weighted else 0, dtype=(q_weight if weighted else qkv).dtype, device=qkv.device)
        for _ in range(2)
    )
    grad, qkv = _unit_rows(grad), _unit_rows(qkv)
    if norm:
        _backward(grad, qkv, dqkv, dq, dk, q_weight, k_weight, cos, sin, eps, interleaved)
    else:  # the gradient of a rotation is the rotation back
        _forward(grad, dqkv, 3, None, None, cos, sin, eps, False, interleaved, -1.0)
    return dqkv, dq, dk


def _forward(x, out, parts, q_weight, k_weight, cos, sin, eps, norm, interleaved, sign):
    batch, tokens, _, heads, dim = _shape(x)
    if x.numel() == 0:
        return
    q_weight, k_weight, cos, sin = (_unit_rows(t) for t in (q_weight, k_weight, cos, sin))
    half = 0 if cos is None else cos.shape[2]
    tile = tile_config(dim, half, interleaved, FORWARD_ELEMENTS)
    unit, half_unit = _units(dim, x, out), _table_unit(half, cos, sin)
    rows = _countable(batch * tokens * parts * heads)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x, out, *_pointers(x, q_weight, k_weight, cos, sin), rows, tokens, heads, dim // unit, half // half_unit,
            *_strides(x, unit), *_strides(out, unit), *_table_strides(cos, half_unit), *_table_strides(sin, half_unit),
            eps, sign, PARTS=parts, NORM=norm, WEIGHTED=q_weight is not None, UNIT=unit, HALF_UNIT=half_unit, **tile,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


def _backward(grad, x, dx, dq, dk, q_weight, k_weight, cos, sin, eps, interleaved):
    batch, tokens, _, heads, dim = _shape(x)
    if x.numel() == 0:
        return
    q_weight, k_weight, cos, sin = (_unit_rows(t) for t in (q_weight, k_weight, cos, sin))
    half, weighted = 0 if cos is None else cos.shape[2], q_weight is not None
    tile = tile_config(dim, half, interleaved, backward_elements(half, interleaved))
    unit, half_unit = _units(dim, grad, x), _table_unit(half, cos, sin)
    rows = _countable(batch * tokens * heads)
    programs = triton.cdiv(rows, tile["ROWS"] * TILES)
    partial = torch.empty((programs if weighted else 0, 2, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        backward_kernel[(programs, 3)](
            grad, x, dx, *_pointers(x, q_weight, k_weight, cos, sin), partial, rows, tokens, heads,
            dim // unit, half // half_unit, *_strides(grad, unit), *_strides(x, unit),
            *_table_strides(cos, half_unit), *_table_strides(sin, half_unit), eps,
            WEIGHTED=weighted, UNIT=unit, HALF_UNIT=half_unit, TILES=TILES, **tile,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        if weighted:
            reduce_kernel[(2, triton.cdiv(dim, COLUMNS))](
                partial, dq, dk, programs, dim, CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
                num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip


def _shape(x):
    if x.shape[-1] > MAX_DIM:
        raise RuntimeError(f"qk_norm_rope: D must be at most {MAX_DIM}, got {x.shape[-1]}")
    return x.shape


def _countable(rows):
    """Rows are counted in 32 bits, for divisions in 64 would cost more than the rest; elements are not."""
    if rows >= (1 << 31) - 4096:
        raise RuntimeError(
            f"qk_norm_rope: at most 2^31 heads of all tokens fit one launch, got {rows}; split the batch"
        )
    return rows


def _unit_rows(tensor):
    """Rows are read through their strides; only an innermost stride other than 1 costs a copy."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _pointers(x, *tensors):
    return [x if tensor is None else tensor for tensor in tensors]


def _unit(numbers):
    return next(unit for unit in (8, 4, 2, 1) if all(number % unit == 0 for number in numbers))


def _units(dim, *tensors):
    return _unit([dim, *(stride for tensor in tensors for stride in tensor.stride()[:4])])


def _table_unit(half, *tables):
    return _unit([half, *(stride for table in tables if table is not None for stride in _table_strides(table, 1))])


def _strides(tensor, unit):
    return [stride // unit for stride in tensor.stride()[:4]]


def _table_strides(table, unit):
    """Of the sample and the token; one table serves all samples."""
    if table is None:
        return 0, 0
    return (table.stride(0) if table.shape[0] > 1 else 0) // unit, table.stride(1) // unit


# ---- what `make inspect` compiles ahead of time ----------------------------------------------------------------------

_KINDS = (
    (128, 64, True),
    (128, 64, False),
    (72, 36, True),
    (72, 36, False),
    (72, 0, True),
    (256, 64, False),
)  # (D, R/2, interleaved)
_FLOATS = ("eps", "sign")


def variants():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        kind = DTYPE_NAMES[dtype]
        for dim, half, interleaved in _KINDS:
            pairing = "" if not half else "_interleaved" if interleaved else "_halves"
            units = {"UNIT": _unit([dim]), "HALF_UNIT": _unit([half])}
            tile = tile_config(dim, half, interleaved, FORWARD_ELEMENTS)
            constexprs = {"PARTS": 3, "NORM": True, "WEIGHTED": True, **units, **tile}
            found.append(_variant(f"qk_norm_rope_{kind}_{dim}{pairing}", forward_kernel, kind, constexprs, NUM_WARPS))
            tile = tile_config(dim, half, interleaved, backward_elements(half, interleaved))
            constexprs = {"WEIGHTED": True, "TILES": TILES, **units, **tile}
            name = f"qk_norm_rope_backward_{kind}_{dim}{pairing}"
            found.append(_variant(name, backward_kernel, kind, constexprs, NUM_WARPS))
        reduce = _variant(
            f"qk_norm_rope_reduce_{kind}", reduce_kernel, kind, {"CHUNK": CHUNK, "COLUMNS": COLUMNS}, NUM_WARPS
        )
        found.append(reduce)
    return found


def _variant(name, kernel, kind, constexprs, num_warps):
    types = {argument: "i32" for argument in kernel.arg_names}
    types |= {argument: f"*{kind}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "partial_ptr"), "*fp32") | dict.fromkeys(_FLOATS, "fp32")
    types |= dict.fromkeys(constexprs, "constexpr")
    signature = {argument: types[argument] for argument in kernel.arg_names}
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "divisible": [argument for argument, kind in signature.items() if kind.startswith("*")],
        "num_warps": num_warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
        "streaming": kernel is not reduce_kernel,
    }
