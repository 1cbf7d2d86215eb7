"""Triton kernels of glu and its backward: tiles of rows, both halves of a row at once. float32 arithmetic.

Bytes per output element (e each): forward 3 e, backward 5 e. The bias gradient in registers over STEPS tiles, then over
those in a fixed order, no atomics.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._activations import activate, activate_slope
from genengine.kernels._channel_sums import channel_sums
from genengine.kernels._launch import DTYPE_NAMES

TILE = 1024  # output elements
STEPS = 16  # tiles below one another whose column sums one program keeps in registers
NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows", "tokens", "blocks"])
def glu_kernel(
    x_ptr, bias_ptr, y_ptr, rows, tokens, blocks, dim, x_batch, x_token,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < dim
    inside = (row < rows)[:, None] & in_row[None, :]
    at = x_ptr + ((row // tokens) * x_batch + (row % tokens) * x_token)[:, None] + column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + dim, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        first += tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias_ptr + dim + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if GATE_FIRST:  # noqa: SIM108
        y = activate(first, 0.0, ACTIVATION) * second
    else:
        y = activate(second, 0.0, ACTIVATION) * first
    tl.store(y_ptr + row[:, None] * dim + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens", "blocks"])
def glu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows, tokens, blocks, dim, grad_batch, grad_token, x_batch, x_token,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < dim
    first_sums = tl.zeros([BLOCK], tl.float32)
    second_sums = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        row = chunk * (ROWS * STEPS) + step * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_row[None, :]
        at = x_ptr + ((row // tokens) * x_batch + (row % tokens) * x_token)[:, None] + column[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + dim, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            first += tl.load(bias_ptr + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
            second += tl.load(bias_ptr + dim + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        grad_at = grad_ptr + ((row // tokens) * grad_batch + (row % tokens) * grad_token)[:, None] + column[None, :]
        grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        if GATE_FIRST:
            d_first = grad * second * activate_slope(first, 0.0, ACTIVATION)
            d_second = grad * activate(first, 0.0, ACTIVATION)
        else:
            d_first = grad * activate(second, 0.0, ACTIVATION)
            d_second = grad * first * activate_slope(second, 0.0, ACTIVATION)
        out = dx_ptr + row[:, None] * (2 * dim) + column[None, :]
        tl.store(out, d_first.to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(out + dim, d_second.to(dx_ptr.dtype.element_ty), mask=inside)
        if BIASED:
            first_sums += tl.sum(d_first, axis=0)
            second_sums += tl.sum(d_second, axis=0)
    if BIASED:
        tl.store(partial_ptr + chunk * (2 * dim) + column, first_sums, mask=in_row)
        tl.store(partial_ptr + chunk * (2 * dim) + dim + column, second_sums, mask=in_row)


# ---- launchers: the ops' own signatures ----------------------------------------------------------------------------


def _tiles(dim):
    """(ROWS, BLOCK)"""
    block = min(512, triton.next_power_of_2(dim))
    return TILE // block, block


def _unit_rows(tensor):
    """Rows are read through their strides; only an innermost stride other than 1 costs a copy."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def glu(x, bias, activation, gate_first):
    batch, tokens, packed = x.shape
    dim = packed // 2
    y = torch.empty((batch, tokens, dim), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, biased = _unit_rows(x), bias is not None
    tile_rows, block = _tiles(dim)
    blocks = triton.cdiv(dim, block)
    with torch.cuda.device_of(x):
        glu_kernel[(blocks * triton.cdiv(batch * tokens, tile_rows),)](
            x, bias.contiguous() if biased else x, y, batch * tokens, tokens, blocks, dim, *x.stride()[:2],
            ACTIVATION=activation, GATE_FIRST=gate_first, BIASED=biased, ROWS=tile_rows, BLOCK=block,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def glu_backward(grad, x, bias, activation, gate_first):
    batch, tokens, packed = x.shape
    dim, biased = packed // 2, bias is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(bias) if biased else dx.new_empty(0)
    x, grad = _unit_rows(x), _unit_rows(grad)
    tile_rows, block = _tiles(dim)
    blocks, chunks = triton.cdiv(dim, block), triton.cdiv(batch * tokens, tile_rows * STEPS)
    partial = torch.empty((chunks, packed) if biased else (0,), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        glu_backward_kernel[(blocks * chunks,)](
            grad, x, bias.contiguous() if biased else x, dx, partial, batch * tokens, tokens, blocks, dim,
            *grad.stride()[:2], *x.stride()[:2],
            ACTIVATION=activation, GATE_FIRST=gate_first, BIASED=biased, ROWS=tile_rows, BLOCK=block, STEPS=STEPS,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, channel_sums(bias, partial, chunks, 1) if biased else dx.new_empty(0)


# ---- what `make inspect` compiles ahead of time --------------------------------------------------------------------


def variants():
    return [
        _variant(f"{kernel.__name__.removesuffix('_kernel')}_{activation}_{DTYPE_NAMES[dtype]}", kernel, dtype, modes)
        for dtype in (torch.float32, torch.bfloat16)
        for activation in ("gelu", "silu")
        for kernel, modes in ((glu_kernel, {}), (glu_backward_kernel, {"STEPS": STEPS}))
        for modes in [modes | {"ACTIVATION": activation, "GATE_FIRST": True, "BIASED": True}]
    ]


def _variant(name, kernel, dtype, modes):
    counts = ("rows", "tokens", "blocks")
    strides = ("dim", "x_batch", "x_token", "grad_batch", "grad_token")
    types = {key: f"*{DTYPE_NAMES[dtype]}" for key in kernel.arg_names if key.endswith("_ptr")}
    types |= {"partial_ptr": "*fp32", **dict.fromkeys((*counts, *strides), "i32")}
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    tile_rows, block = _tiles(1536)
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": modes | {"ROWS": tile_rows, "BLOCK": block},
        "divisible": [key for key in signature if key.endswith("_ptr") or key in strides],
        "num_warps": NUM_WARPS,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
