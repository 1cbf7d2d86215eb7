"""Triton kernels of bias_act and its backwards: tiles of a matrix with one bias per column or per row, in float32.

Bytes per element (e each): forward 2 e, backward 3 e, its own backward 5 e. Sums of dx over a tile in registers, then
over tiles in a fixed order, no atomics.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._activations import activate, activate_curvature, activate_slope
from genengine.kernels._channel_sums import channel_sums, channel_sums_variant
from genengine.kernels._launch import DTYPE_NAMES

TILE = 2048  # elements
STEPS = 16  # tiles below one another whose column sums one program keeps in registers
NUM_WARPS = 4
_CURVED = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid")


@triton.jit
def _along(ptr, row, column, rows, columns, channels, BY_ROW: tl.constexpr):
    """The values of a vector along the channels, as a column or a row."""
    if BY_ROW:
        values = tl.load(ptr + row % channels, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    else:
        values = tl.load(ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def _passed(factor, u, alpha, gain, clamp, ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr):
    if CLAMPED:
        factor = tl.where(tl.abs(gain * activate(u, alpha, ACTIVATION)) >= clamp, 0.0, factor)
    return factor


@triton.jit(do_not_specialize=["rows", "blocks", "channels"])
def bias_act_kernel(
    x_ptr, bias_ptr, y_ptr, rows, columns, blocks, channels, alpha, gain, clamp,
    ACTIVATION: tl.constexpr, BIASED: tl.constexpr, BY_ROW: tl.constexpr, CLAMPED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        u += _along(bias_ptr, row, column, rows, columns, channels, BY_ROW)
    z = gain * activate(u, alpha, ACTIVATION)
    if CLAMPED:
        z = tl.where(z > clamp, clamp, tl.where(z < -clamp, -clamp, z))  # NaN stays
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks", "channels"])
def bias_act_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_dx_ptr, grad_dbias_ptr, dx_ptr, d_grad_ptr, partial_ptr,
    rows, columns, blocks, channels, alpha, gain, clamp,
    ACTIVATION: tl.constexpr, BIASED: tl.constexpr, BY_ROW: tl.constexpr, CLAMPED: tl.constexpr,
    SECOND: tl.constexpr, CURVED: tl.constexpr, GRAD_BIASED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx of the first backward, or d_grad and, where CURVED, d_x of the second; their sums to partial."""
    first = (tl.program_id(0) // blocks).to(tl.int64) * (ROWS * STEPS)
    block = tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            u += _along(bias_ptr, row, column, rows, columns, channels, BY_ROW)
        slope = _passed(gain * activate_slope(u, alpha, ACTIVATION), u, alpha, gain, clamp, ACTIVATION, CLAMPED)
        if SECOND:
            v = tl.load(grad_dx_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if GRAD_BIASED:
                v += _along(grad_dbias_ptr, row, column, rows, columns, channels, BY_ROW)
            tl.store(d_grad_ptr + at, (v * slope).to(d_grad_ptr.dtype.element_ty), mask=inside)
        if CURVED or not SECOND:
            dx = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if SECOND:
                curvature = gain * activate_curvature(u, ACTIVATION)
                dx *= v * _passed(curvature, u, alpha, gain, clamp, ACTIVATION, CLAMPED)
            else:
                dx *= slope
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if BIASED:
                if BY_ROW:
                    tl.store(partial_ptr + row * blocks + block, tl.sum(dx, axis=1), mask=row < rows)
                else:
                    sums += tl.sum(dx, axis=0)
    if BIASED and not BY_ROW and (CURVED or not SECOND):
        chunk = (tl.program_id(0) // blocks).to(tl.int64)
        tl.store(partial_ptr + chunk * columns + column, sums, mask=column < columns)


# ---- launchers: the ops' own signatures ----------------------------------------------------------------------------


class _Matrix:
    """x (outer, C, inner) as rows and columns, and the tiles over them."""

    def __init__(self, x, biased):
        outer, self.channels, inner = x.shape
        self.by_row = inner > 1 or not biased
        self.outer = outer
        self.rows, self.columns = (outer * self.channels, inner) if self.by_row else (outer, self.channels)
        if not biased:
            self.rows, self.columns = 1, x.numel()
        self.block = min(1024, triton.next_power_of_2(self.columns)) if biased else TILE
        self.tile_rows = TILE // self.block if biased else 1
        self.blocks = triton.cdiv(self.columns, self.block)
        self.steps = 1 if self.by_row else STEPS

    def grid(self, steps):
        return (self.blocks * triton.cdiv(self.rows, self.tile_rows * steps),)

    def partial(self, x):
        count = (
            self.rows * self.blocks if self.by_row else triton.cdiv(self.rows, self.tile_rows * STEPS) * self.columns
        )
        return torch.empty(count, dtype=torch.float32, device=x.device)

    def sums(self, bias, partial):
        if self.by_row:
            return channel_sums(bias, partial, self.outer, self.blocks)
        return channel_sums(bias, partial, partial.numel() // self.columns, 1)


def bias_act(x, bias, activation, alpha, gain, clamp):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    m = _Matrix(x, bias is not None)
    with torch.cuda.device_of(x):
        bias_act_kernel[m.grid(1)](
            x, x if bias is None else bias, y, m.rows, m.columns, m.blocks, m.channels, alpha, gain, clamp or 0.0,
            ACTIVATION=activation, BIASED=bias is not None, BY_ROW=m.by_row, CLAMPED=clamp is not None,
            ROWS=m.tile_rows, BLOCK=m.block, num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def bias_act_backward(grad, x, bias, activation, alpha, gain, clamp):
    _, dx, dbias = _backward(None, None, grad, x, bias, activation, alpha, gain, clamp)
    return dx, dbias


def bias_act_backward_backward(grad_dx, grad_dbias, grad, x, bias, activation, alpha, gain, clamp):
    return _backward(grad_dx, grad_dbias, grad, x, bias, activation, alpha, gain, clamp)


def _backward(grad_dx, grad_dbias, grad, x, bias, activation, alpha, gain, clamp):
    second, curved = grad_dx is not None, activation in _CURVED
    like_x = lambda: torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    none = torch.empty(0, dtype=x.dtype, device=x.device)
    summed = curved or not second
    d_grad, dx = like_x() if second else none, like_x() if summed else none
    if x.numel() == 0:
        return d_grad, dx, none if bias is None or not summed else torch.zeros_like(bias)
    x, grad = x.contiguous(), grad.contiguous()
    grad_dx = grad_dx.contiguous() if second else x
    bias, grad_dbias = (None if t is None else t.contiguous() for t in (bias, grad_dbias))
    m = _Matrix(x, bias is not None)
    partial = m.partial(x) if bias is not None else none
    with torch.cuda.device_of(x):
        bias_act_backward_kernel[m.grid(m.steps)](
            grad, x, x if bias is None else bias, grad_dx, x if grad_dbias is None else grad_dbias, dx, d_grad, partial,
            m.rows, m.columns, m.blocks, m.channels, alpha, gain, clamp or 0.0,
            ACTIVATION=activation, BIASED=bias is not None, BY_ROW=m.by_row, CLAMPED=clamp is not None,
            SECOND=second, CURVED=curved, GRAD_BIASED=grad_dbias is not None, ROWS=m.tile_rows, BLOCK=m.block,
            STEPS=m.steps, num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return d_grad, dx, m.sums(bias, partial) if bias is not None and summed else none


# ---- what `make inspect` compiles ahead of time --------------------------------------------------------------------


def variants():
    found = [channel_sums_variant("channel_sums_fp32", "fp32")]
    for dtype in (torch.float32, torch.bfloat16):
        name = DTYPE_NAMES[dtype]
        for activation, by_row, clamped in (("gelu", False, False), ("gelu_tanh", False, False), ("lrelu", True, True)):
            modes = {"ACTIVATION": activation, "BIASED": True, "BY_ROW": by_row, "CLAMPED": clamped}
            label = f"{activation}_{name}"
            found.append(_variant(f"bias_act_{label}", bias_act_kernel, name, modes))
            for second in (False, True):
                extra = {"SECOND": second, "CURVED": activation in _CURVED, "GRAD_BIASED": second}
                extra["STEPS"] = 1 if by_row else STEPS
                title = f"bias_act_backward{'_backward' * second}_{label}"
                found.append(_variant(title, bias_act_backward_kernel, name, modes | extra))
    return found


def _variant(name, kernel, kind, modes):
    types = {key: f"*{kind}" for key in kernel.arg_names if key.endswith("_ptr")}
    types |= {"partial_ptr": "*fp32", **dict.fromkeys(("rows", "columns", "blocks", "channels"), "i32")}
    types |= dict.fromkeys(("alpha", "gain", "clamp"), "fp32")
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": modes | {"ROWS": 2, "BLOCK": 1024},
        "divisible": [key for key in signature if key.endswith("_ptr")] + ["columns"],
        "num_warps": NUM_WARPS,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
