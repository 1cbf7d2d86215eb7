"""Triton kernels of adaln and gated_adaln, forward and backward. Rows in registers, float32 arithmetic and sums.

Bytes per element (e each): forward 2 e (gated 4 e), 8 FLOPs (gated 10); backward 3 e (gated 6 e), 20 FLOPs (gated 24).
The sums over tokens (dscale, dshift, dgate) run in order over CHUNK tokens, then over CHUNK such sums, then over those:
always the same order, no atomics.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES

CHUNK = 16  # tokens whose sums one program of the backward keeps in registers
COLUMNS = 256  # columns that one program of the second stage adds up
MAX_DIM = 8192


@triton.jit
def _row_moments(x, inside, dim, eps):
    """x - mean (zero outside the row) and 1 / sqrt(var + eps) of every row of a (ROWS, BLOCK) tile."""
    mean = tl.sum(x, axis=1) / dim
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / dim
    return centred, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def adaln_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, x_out_ptr, h_ptr, tokens, blocks, dim,
    x_batch, x_token, branch_batch, branch_token, gate_batch, scale_batch, shift_batch, eps,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h, and for GATED x', of ROWS tokens of one sample."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)
    in_row = column < dim
    inside = (n < tokens) & in_row[None, :]
    column_2d = column[None, :]
    out = (b * tokens + n) * dim + column_2d
    x = tl.load(x_ptr + b * x_batch + n * x_token + column_2d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + b * gate_batch + column, mask=in_row, other=0.0).to(tl.float32)
        branch_at = branch_ptr + b * branch_batch + n * branch_token + column_2d
        branch = tl.load(branch_at, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + gate[None, :] * branch).to(x_out_ptr.dtype.element_ty)
        tl.store(x_out_ptr + out, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred, rstd = _row_moments(x, inside, dim, eps)
    gain = 1.0 + tl.load(scale_ptr + b * scale_batch + column, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_batch + column, mask=in_row, other=0.0).to(tl.float32)
    h = centred * rstd[:, None] * gain[None, :] + shift[None, :]
    tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def adaln_backward_kernel(
    grad_x_ptr, grad_h_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, dx_ptr, dbranch_ptr, partial_ptr,
    tokens, chunks, dim, grad_x_batch, grad_x_token, grad_h_batch, grad_h_token, x_batch, x_token,
    branch_batch, branch_token, gate_batch, scale_batch, eps,
    GATED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and for GATED dbranch, of CHUNK tokens; their dscale, dshift, dgate to partial (B, chunks, 3, D)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    column = tl.arange(0, BLOCK)
    inside = column < dim
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    dgate = tl.zeros([BLOCK], tl.float32)
    for token in range(first, tl.minimum(first + CHUNK, tokens)):
        n = tl.cast(token, tl.int64)
        out = (b * tokens + n) * dim + column
        x = tl.load(x_ptr + b * x_batch + n * x_token + column, mask=inside, other=0.0).to(tl.float32)
        grad_h = tl.load(grad_h_ptr + b * grad_h_batch + n * grad_h_token + column, mask=inside, other=0.0)
        grad_h = grad_h.to(tl.float32)
        mean = tl.sum(x, axis=0) / dim
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / dim + eps)
        x_hat = centred * rstd
        # scale and gate come from the first-level cache in every turn: kept in registers they spill at D = 8192
        scale = tl.load(scale_ptr + b * scale_batch + column, mask=inside, other=0.0).to(tl.float32)
        g = grad_h * (1.0 + scale)
        dx = rstd * (g - tl.sum(g, axis=0) / dim - x_hat * (tl.sum(g * x_hat, axis=0) / dim))
        dscale += grad_h * x_hat
        dshift += grad_h
        if GATED:
            at = grad_x_ptr + b * grad_x_batch + n * grad_x_token + column
            dx += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if BLOCK <= 4096:
                at = branch_ptr + b * branch_batch + n * branch_token + column
                dgate += tl.load(at, mask=inside, other=0.0).to(tl.float32) * dx
                gate = tl.load(gate_ptr + b * gate_batch + column, mask=inside, other=0.0).to(tl.float32)
                tl.store(dbranch_ptr + out, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if GATED and BLOCK > 4096:  # in the loop above it would spill: a second loop, from the dx just written
        tl.debug_barrier()
        gate = tl.load(gate_ptr + b * gate_batch + column, mask=inside, other=0.0).to(tl.float32)
        for token in range(first, tl.minimum(first + CHUNK, tokens)):
            n = tl.cast(token, tl.int64)
            out = (b * tokens + n) * dim + column
            dx = tl.load(dx_ptr + out, mask=inside, other=0.0).to(tl.float32)
            at = branch_ptr + b * branch_batch + n * branch_token + column
            dgate += tl.load(at, mask=inside, other=0.0).to(tl.float32) * dx
            tl.store(dbranch_ptr + out, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=inside)
    at = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * dim + column
    tl.store(at, dscale, mask=inside)
    tl.store(at + dim, dshift, mask=inside)
    if GATED:
        tl.store(at + 2 * dim, dgate, mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def adaln_reduce_kernel(
    partial_ptr, dscale_ptr, dshift_ptr, dgate_ptr, chunks, dim,
    GATED: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dscale, dshift, dgate (B, D): the sums over chunks, in groups of CHUNK. Grid (column tiles, B)."""
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    dscale = tl.zeros([COLUMNS], tl.float32)
    dshift = tl.zeros([COLUMNS], tl.float32)
    dgate = tl.zeros([COLUMNS], tl.float32)
    at = partial_ptr + b * chunks * 3 * dim + column
    for first in range(0, chunks, CHUNK):
        some_dscale = tl.zeros([COLUMNS], tl.float32)
        some_dshift = tl.zeros([COLUMNS], tl.float32)
        some_dgate = tl.zeros([COLUMNS], tl.float32)
        for _ in range(first, tl.minimum(first + CHUNK, chunks)):
            some_dscale += tl.load(at, mask=inside, other=0.0)
            some_dshift += tl.load(at + dim, mask=inside, other=0.0)
            if GATED:
                some_dgate += tl.load(at + 2 * dim, mask=inside, other=0.0)
            at += 3 * dim
        dscale += some_dscale
        dshift += some_dshift
        dgate += some_dgate
    out = b * dim + column
    tl.store(dscale_ptr + out, dscale.to(dscale_ptr.dtype.element_ty), mask=inside)
    tl.store(dshift_ptr + out, dshift.to(dshift_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)


# ---- launchers: the ops' own signatures ----------------------------------------------------------------------------


def forward_config(dim):
    """(ROWS, BLOCK, num_warps) for rows of `dim` elements: sixteen or, of the longest, 32 elements per thread."""
    block = triton.next_power_of_2(dim)
    rows = max(1, 2048 // block)
    return rows, block, min(8, max(1, rows * block // 512))


def backward_config(dim):
    """(BLOCK, num_warps): at most sixteen elements per thread, for three sums are kept beside the row."""
    block = triton.next_power_of_2(dim)
    return block, min(16, max(1, block // 256))


def adaln(x, scale, shift, eps):
    return _forward("adaln", x, None, None, scale, shift, eps)[1]


def gated_adaln(x, branch, gate, scale, shift, eps):
    return _forward("gated_adaln", x, branch, gate, scale, shift, eps)


def adaln_backward(grad_h, x, scale, eps):
    dx, _, dscale, dshift, _ = _backward("adaln_backward", None, grad_h, x, None, None, scale, eps)
    return dx, dscale, dshift


def gated_adaln_backward(grad_x, grad_h, x_out, branch, gate, scale, eps):
    dx, dbranch, *sums = _backward("gated_adaln_backward", grad_x, grad_h, x_out, branch, gate, scale, eps)
    dscale, dshift, dgate = sums
    return dx, dbranch, dgate, dscale, dshift


def _forward(op, x, branch, gate, scale, shift, eps):
    batch, tokens, dim = _shape(op, x)
    gated = branch is not None
    h = torch.empty(x.shape, dtype=scale.dtype, device=x.device)
    x_out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if gated else h
    if x.numel() == 0:
        return x_out, h
    x, branch, gate, scale, shift = (_unit_rows(t) for t in (x, branch, gate, scale, shift))
    rows, block, num_warps = forward_config(dim)
    blocks = triton.cdiv(tokens, rows)
    with torch.cuda.device_of(x):
        adaln_kernel[(batch * blocks,)](
            x, branch if gated else x, gate if gated else scale, scale, shift, x_out, h, tokens, blocks, dim,
            *x.stride()[:2], *_strides(branch, 2), *_strides(gate, 1), scale.stride(0), shift.stride(0), eps,
            GATED=gated, ROWS=rows, BLOCK=block, num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return x_out, h


def _backward(op, grad_x, grad_h, x, branch, gate, scale, eps):
    batch, tokens, dim = _shape(op, x)
    gated = branch is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = torch.empty(x.shape, dtype=scale.dtype, device=x.device) if gated else dx
    make = torch.zeros if x.numel() == 0 else torch.empty
    sums = [make(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(3 if gated else 2)]
    dscale, dshift, dgate = sums if gated else [*sums, sums[0]]
    if x.numel() == 0:
        return dx, dbranch, dscale, dshift, dgate
    grad_x, grad_h, x, branch, gate, scale = (_unit_rows(t) for t in (grad_x, grad_h, x, branch, gate, scale))
    block, num_warps = backward_config(dim)
    chunks = triton.cdiv(tokens, CHUNK)
    partial = torch.empty((batch, chunks, 3, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        adaln_backward_kernel[(batch * chunks,)](
            grad_x if gated else x, grad_h, x, branch if gated else grad_h, gate if gated else scale, scale,
            dx, dbranch, partial, tokens, chunks, dim, *_strides(grad_x, 2), *grad_h.stride()[:2], *x.stride()[:2],
            *_strides(branch, 2), *_strides(gate, 1), scale.stride(0), eps,
            GATED=gated, CHUNK=CHUNK, BLOCK=block, num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        adaln_reduce_kernel[(triton.cdiv(dim, COLUMNS), batch)](
            partial, dscale, dshift, dgate, chunks, dim,
            GATED=gated, CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=2, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dbranch, dscale, dshift, dgate


def _shape(op, x):
    if x.shape[-1] > MAX_DIM:
        raise RuntimeError(f"{op}: D must be at most {MAX_DIM}, got {x.shape[-1]}")
    return x.shape


def _unit_rows(tensor):
    """Rows are read through their strides; only an innermost stride other than 1 costs a copy."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _strides(tensor, count):
    return (0,) * count if tensor is None else tensor.stride()[:count]


# ---- what `make inspect` compiles ahead of time --------------------------------------------------------------------

_FORWARD_INTS = (
    "tokens", "blocks", "dim", "x_batch", "x_token", "branch_batch", "branch_token", "gate_batch", "scale_batch",
    "shift_batch",
)  # fmt: skip
_BACKWARD_INTS = (
    "tokens", "chunks", "dim", "grad_x_batch", "grad_x_token", "grad_h_batch", "grad_h_token", "x_batch", "x_token",
    "branch_batch", "branch_token", "gate_batch", "scale_batch",
)  # fmt: skip
_COUNTS = ("tokens", "blocks", "chunks")  # all other integers are row lengths and strides: multiples of 16


def variants():
    return [
        variant
        for dtype in (torch.float32, torch.bfloat16)
        for dim in (384, 1152, 8192)
        for gated in (False, True)
        for variant in _variants(dtype, dim, gated)
    ]


def _variants(dtype, dim, gated):
    narrow = DTYPE_NAMES[dtype]
    label = f"{narrow}_{dim}"
    gate = "gated_" if gated else ""
    rows, block, num_warps = forward_config(dim)
    types = {**_pointers(adaln_kernel, narrow), **dict.fromkeys(_FORWARD_INTS, "i32"), "eps": "fp32"}
    constexprs = {"GATED": gated, "ROWS": rows, "BLOCK": block}
    yield _variant(f"{gate}adaln_{label}", adaln_kernel, types, constexprs, num_warps)
    block, num_warps = backward_config(dim)
    types = {**_pointers(adaln_backward_kernel, narrow), **dict.fromkeys(_BACKWARD_INTS, "i32"), "eps": "fp32"}
    types["partial_ptr"] = "*fp32"
    constexprs = {"GATED": gated, "CHUNK": CHUNK, "BLOCK": block}
    yield _variant(f"{gate}adaln_backward_{label}", adaln_backward_kernel, types, constexprs, num_warps)
    types = {**_pointers(adaln_reduce_kernel, narrow), "partial_ptr": "*fp32", "chunks": "i32", "dim": "i32"}
    constexprs = {"GATED": gated, "CHUNK": CHUNK, "COLUMNS": COLUMNS}
    yield _variant(f"{gate}adaln_reduce_{label}", adaln_reduce_kernel, types, constexprs, 2)


def _pointers(kernel, kind):
    return {name: f"*{kind}" for name in kernel.arg_names if name.endswith("_ptr")}


def _variant(name, kernel, types, constexprs, num_warps):
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    integers = [argument for argument, kind in signature.items() if kind == "i32" and argument not in _COUNTS]
    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "divisible": [*pointers, *integers],
        "num_warps": num_warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
