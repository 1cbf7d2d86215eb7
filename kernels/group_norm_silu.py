"""Triton kernels of group_norm_silu, add_group_norm_silu and their backwards, in float32.

x is (B, C, S) or, channels_last, (B, S, C). A group that fits in the registers of a program is read once (2 e bytes for
an element of e). Otherwise, so that few groups still fill the GPU: mean and centred squares of every channel over a
chunk of pixels, their merging per group (Chan et al. 1983), and an elementwise pass (3 e). Backward 5 e: sums per
channel and chunk, per group, and dx. All sums run in one order, without atomics. 9 FLOPs forward, 30 backward, and an
exponential and a division per pass. The sum with a residual branch is written where x is first read (2 e more), its
gradient added where dx is written (e more).
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES

TILE = 4096  # elements of a program
GROUP_TILE = 8192  # of a program that holds a whole group
ROWS = 16  # partial sums of each channel that are added at once
COLUMNS = 128  # channels of a program that sums over samples


@triton.jit
def _positions(C, S, first_channel, first_pixel, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Channels and pixels of a tile with the memory's innermost dimension innermost, offsets, and what is inside."""
    if LAST:
        c = first_channel + tl.arange(0, CHANNELS)[None, :]
        s = first_pixel + tl.arange(0, PIXELS)[:, None]
        offset = s.to(tl.int64) * C + c
    else:
        c = first_channel + tl.arange(0, CHANNELS)[:, None]
        s = first_pixel + tl.arange(0, PIXELS)[None, :]
        offset = c.to(tl.int64) * S + s
    return c, offset, (c < C) & (s < S)


@triton.jit
def _gain_offset(
    weight_ptr, bias_ptr, scale_at, shift_at, c, inside,
    PARAMETERS: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """weight (1 + scale) and bias (1 + scale) + shift of channels c: v = x^ gain + offset."""
    gain = tl.where(inside, 1.0, 0.0)
    offset = gain * 0.0
    if PARAMETERS:
        gain = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        factor = 1.0 + tl.load(scale_at + c, mask=inside, other=0.0).to(tl.float32)
        gain *= factor
        offset = offset * factor + tl.load(shift_at + c, mask=inside, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def _load_sum(x_at, branch_at, sum_at, offset, inside, BRANCH: tl.constexpr):
    """x in float32; with a branch their sum, as it was rounded and written."""
    x = tl.load(x_at + offset, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        x += tl.load(branch_at + offset, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_at.dtype.element_ty)
        tl.store(sum_at + offset, rounded, mask=inside)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _grad_v(grad, v, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(v)
        grad = grad * s * (1.0 + v * (1.0 - s))
    return grad


@triton.jit
def group_kernel(
    x_ptr, branch_ptr, sum_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, G, C, S, CG,
    x_batch, branch_batch, scale_batch, shift_batch, eps,
    BRANCH: tl.constexpr, PARAMETERS: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A whole group of one sample, in registers. Grid (B G)."""
    b = (tl.program_id(0) // G).to(tl.int64)
    first = (tl.program_id(0) % G) * CG
    c, offset, inside = _positions(C, S, first, 0, LAST, CHANNELS, PIXELS)
    inside = inside & (c < first + CG)
    x = _load_sum(x_ptr + b * x_batch, branch_ptr + b * branch_batch, sum_ptr + b * C * S, offset, inside, BRANCH)
    size = CG * S
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / size
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / size + eps)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    gain, shift = _gain_offset(
        weight_ptr, bias_ptr, scale_ptr + b * scale_batch, shift_ptr + b * shift_batch, c,
        (c < first + CG) & (c < C), PARAMETERS, MODULATED,
    )  # fmt: skip
    v = centred * rstd * gain + shift
    if SILU:
        v = v * tl.sigmoid(v)
    tl.store(y_ptr + b * C * S + offset, v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def moments_kernel(
    x_ptr, branch_ptr, sum_ptr, partial_ptr, C, S, chunks, x_batch, branch_batch,
    BRANCH: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of channels over one chunk of pixels. Grid (B chunks, channel tiles)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    c, offset, inside = _positions(C, S, tl.program_id(1) * CHANNELS, chunk * PIXELS, LAST, CHANNELS, PIXELS)
    x = _load_sum(x_ptr + b * x_batch, branch_ptr + b * branch_batch, sum_ptr + b * C * S, offset, inside, BRANCH)
    axis: tl.constexpr = 0 if LAST else 1
    count = tl.minimum(PIXELS, S - chunk * PIXELS)
    mean = tl.sum(x, axis=axis) / count
    centred = tl.where(inside, x - tl.expand_dims(mean, axis), 0.0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = partial_ptr + (b * chunks + chunk) * 2 * C + channel
    tl.store(at, mean, mask=channel < C)
    tl.store(at + C, tl.sum(centred * centred, axis=axis), mask=channel < C)


@triton.jit(do_not_specialize=["chunks"])
def statistics_kernel(
    partial_ptr, mean_ptr, rstd_ptr, G, C, S, CG, chunks, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """mean and rstd of a group from its channels' chunks. Grid (B G)."""
    b = (tl.program_id(0) // G).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    base = partial_ptr + b * chunks * 2 * C + (tl.program_id(0) % G) * CG
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)[:, None]
        inside = (chunk < chunks) & (channel < CG)
        count = tl.minimum(PIXELS, S - chunk * PIXELS).to(tl.float32)
        at = base + chunk.to(tl.int64) * 2 * C + channel
        total += tl.where(inside, count * tl.load(at, mask=inside, other=0.0), 0.0)
    size = (CG * S).to(tl.float32)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)[:, None]
        inside = (chunk < chunks) & (channel < CG)
        count = tl.minimum(PIXELS, S - chunk * PIXELS).to(tl.float32)
        at = base + chunk.to(tl.int64) * 2 * C + channel
        apart = tl.load(at, mask=inside, other=0.0) - mean
        squares += tl.where(inside, tl.load(at + C, mask=inside, other=0.0) + count * apart * apart, 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / size
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit(do_not_specialize=["chunks"])
def apply_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, y_ptr, G, C, S, CG, chunks,
    x_batch, scale_batch, shift_batch,
    PARAMETERS: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """y of one tile. Grid (B chunks, channel tiles)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    pixel = (tl.program_id(0) % chunks) * PIXELS
    c, offset, inside = _positions(C, S, tl.program_id(1) * CHANNELS, pixel, LAST, CHANNELS, PIXELS)
    x = tl.load(x_ptr + b * x_batch + offset, mask=inside, other=0.0).to(tl.float32)
    group = b * G + c // CG
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    gain, shift = _gain_offset(
        weight_ptr, bias_ptr, scale_ptr + b * scale_batch, shift_ptr + b * shift_batch, c, c < C, PARAMETERS, MODULATED
    )
    v = (x - mean) * (rstd * gain) + shift
    if SILU:
        v = v * tl.sigmoid(v)
    tl.store(y_ptr + b * C * S + offset, v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def backward_sums_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, partial_ptr, G, C, S, CG, chunks,
    grad_batch, x_batch, scale_batch, shift_batch,
    PARAMETERS: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """sum(dv) and sum(dv x^) of channels over one chunk of pixels. Grid (B chunks, channel tiles)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    c, offset, inside = _positions(C, S, tl.program_id(1) * CHANNELS, chunk * PIXELS, LAST, CHANNELS, PIXELS)
    x = tl.load(x_ptr + b * x_batch + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + b * grad_batch + offset, mask=inside, other=0.0).to(tl.float32)
    group = b * G + c // CG
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    gain, shift = _gain_offset(
        weight_ptr, bias_ptr, scale_ptr + b * scale_batch, shift_ptr + b * shift_batch, c, c < C, PARAMETERS, MODULATED
    )
    x_hat = (x - mean) * rstd
    dv = tl.where(inside, _grad_v(grad, x_hat * gain + shift, SILU), 0.0)
    axis: tl.constexpr = 0 if LAST else 1
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = partial_ptr + (b * chunks + chunk) * 2 * C + channel
    tl.store(at, tl.sum(dv, axis=axis), mask=channel < C)
    tl.store(at + C, tl.sum(tl.where(inside, dv * x_hat, 0.0), axis=axis), mask=channel < C)


@triton.jit(do_not_specialize=["chunks"])
def backward_groups_kernel(
    partial_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, sums_ptr, means_ptr, dscale_ptr, dshift_ptr,
    G, C, S, CG, chunks, scale_batch, shift_batch,
    PARAMETERS: tl.constexpr, MODULATED: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a group: its channels' sums (B, 2, C) over all chunks, dscale, dshift, and what dx needs. Grid (B G)."""
    b = (tl.program_id(0) // G).to(tl.int64)
    first_channel = (tl.program_id(0) % G) * CG
    channel = tl.arange(0, CHANNELS)
    c = first_channel + channel
    in_group = channel < CG
    base = partial_ptr + b * chunks * 2 * C + c[None, :]
    p_rows = tl.zeros([ROWS, CHANNELS], tl.float32)
    q_rows = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)[:, None]
        inside = (chunk < chunks) & in_group[None, :]
        at = base + chunk.to(tl.int64) * 2 * C
        p_rows += tl.load(at, mask=inside, other=0.0)
        q_rows += tl.load(at + C, mask=inside, other=0.0)
    p = tl.sum(p_rows, axis=0)
    q = tl.sum(q_rows, axis=0)
    tl.store(sums_ptr + b * 2 * C + c, p, mask=in_group)
    tl.store(sums_ptr + (b * 2 + 1) * C + c, q, mask=in_group)
    gain, _ = _gain_offset(
        weight_ptr,
        bias_ptr,
        scale_ptr + b * scale_batch,
        shift_ptr + b * shift_batch,
        c,
        in_group,
        PARAMETERS,
        MODULATED,
    )
    size = (CG * S).to(tl.float32)
    tl.store(means_ptr + tl.program_id(0) * 2, tl.sum(gain * p, axis=0) / size)
    tl.store(means_ptr + tl.program_id(0) * 2 + 1, tl.sum(gain * q, axis=0) / size)
    if MODULATED:
        dscale = q
        if PARAMETERS:
            weight = tl.load(weight_ptr + c, mask=in_group, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + c, mask=in_group, other=0.0).to(tl.float32)
            dscale = weight * q + bias * p
        tl.store(dscale_ptr + b * C + c, dscale.to(dscale_ptr.dtype.element_ty), mask=in_group)
        tl.store(dshift_ptr + b * C + c, p.to(dshift_ptr.dtype.element_ty), mask=in_group)


@triton.jit(do_not_specialize=["batch"])
def backward_parameters_kernel(
    sums_ptr, scale_ptr, dweight_ptr, dbias_ptr, batch, C, scale_batch,
    MODULATED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dweight and dbias: sums over the samples, ROWS at a time. Grid (channel tiles)."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, batch, ROWS):
        b = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (b < batch) & (c < C)
        p = tl.load(sums_ptr + b * 2 * C + c, mask=inside, other=0.0)
        q = tl.load(sums_ptr + (b * 2 + 1) * C + c, mask=inside, other=0.0)
        if MODULATED:
            factor = 1.0 + tl.load(scale_ptr + b * scale_batch + c, mask=inside, other=0.0).to(tl.float32)
            p *= factor
            q *= factor
        dweight += q
        dbias += p
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(dweight_ptr + column, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=column < C)
    tl.store(dbias_ptr + column, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=column < C)


@triton.jit(do_not_specialize=["chunks"])
def backward_apply_kernel(
    grad_ptr, x_ptr, grad_x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr,
    G, C, S, CG, chunks, grad_batch, x_batch, grad_x_batch, scale_batch, shift_batch,
    RESIDUAL: tl.constexpr, PARAMETERS: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx of one tile. Grid (B chunks, channel tiles)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    pixel = (tl.program_id(0) % chunks) * PIXELS
    c, offset, inside = _positions(C, S, tl.program_id(1) * CHANNELS, pixel, LAST, CHANNELS, PIXELS)
    x = tl.load(x_ptr + b * x_batch + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + b * grad_batch + offset, mask=inside, other=0.0).to(tl.float32)
    group = b * G + c // CG
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    mean_g = tl.load(means_ptr + 2 * group, mask=c < C, other=0.0)
    mean_gx = tl.load(means_ptr + 2 * group + 1, mask=c < C, other=0.0)
    gain, shift = _gain_offset(
        weight_ptr, bias_ptr, scale_ptr + b * scale_batch, shift_ptr + b * shift_batch, c, c < C, PARAMETERS, MODULATED
    )
    x_hat = (x - mean) * rstd
    g = _grad_v(grad, x_hat * gain + shift, SILU) * gain
    dx = rstd * (g - mean_g - x_hat * mean_gx)
    if RESIDUAL:
        dx += tl.load(grad_x_ptr + b * grad_x_batch + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + b * C * S + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ---- launchers: the ops' own signatures ----------------------------------------------------------------------------


def tile(channels, pixels, last):
    """(CHANNELS, PIXELS) of an elementwise or summing program: TILE elements, wide along the innermost dimension."""
    wide_channels, wide_pixels = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    if last:
        across = min(128, wide_channels)
        return across, min(TILE // across, wide_pixels)
    along = min(1024, wide_pixels)
    return min(TILE // along, wide_channels), along


def group_tile(group_channels, pixels, last):
    """(CHANNELS, PIXELS, num_warps) of a program that holds a whole group, or None: too large, or in channels_last
    not whole 32-byte sectors of each pixel, of which the memory would fetch the rest in vain."""
    across, along = triton.next_power_of_2(group_channels), triton.next_power_of_2(pixels)
    if across * along > GROUP_TILE or (last and group_channels % 16):
        return None
    return across, along, min(8, max(1, across * along // 512))


def _common(weight, scale, silu):
    return {
        "PARAMETERS": weight is not None,
        "MODULATED": scale is not None,
        "SILU": silu,
    }


_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def group_norm_silu(x, weight, bias, scale, shift, num_groups, eps, silu, channels_last):
    return _forward(x, None, weight, bias, scale, shift, num_groups, eps, silu, channels_last)[1:]


def add_group_norm_silu(x, branch, weight, bias, scale, shift, num_groups, eps, silu, channels_last):
    return _forward(x, branch, weight, bias, scale, shift, num_groups, eps, silu, channels_last)


def _forward(x, branch, weight, bias, scale, shift, num_groups, eps, silu, channels_last):
    """The sum with a branch, or x; y, mean and rstd."""
    x, (batch, C, S), last = _dense(x), _sizes(x, channels_last), _by_pixel(x, channels_last)
    branch, CG = x if branch is None else _dense(branch), C // num_groups
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if branch is x else torch.empty_like(y)
    make = torch.zeros if x.numel() == 0 else torch.empty
    mean, rstd = (make((batch, num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return total, y, mean, rstd
    rows, row_strides = _rows(x, weight, bias, scale, shift), _row_strides(scale, shift)
    read, read_strides = (x, branch, total), (_batch_stride(x), _batch_stride(branch))
    flags, added = {**_common(weight, scale, silu), "LAST": last}, {"BRANCH": total is not x}
    whole = group_tile(CG, S, last)
    with torch.cuda.device_of(x):
        if whole is not None:
            group_kernel[(batch * num_groups,)](
                *read, *rows, y, mean, rstd, num_groups, C, S, CG, *read_strides, *row_strides, eps,
                CHANNELS=whole[0], PIXELS=whole[1], num_warps=whole[2], **flags, **added, **_OPTIONS,
            )  # fmt: skip
            return total, y, mean, rstd
        shape, chunks, grid = _grid(batch, C, S, last)
        partial = torch.empty((batch, chunks, 2, C), dtype=torch.float32, device=x.device)
        moments_kernel[grid](*read, partial, C, S, chunks, *read_strides, LAST=last, **added, **shape, **_OPTIONS)
        statistics_kernel[(batch * num_groups,)](
            partial, mean, rstd, num_groups, C, S, CG, chunks, eps,
            PIXELS=shape["PIXELS"], CHANNELS=triton.next_power_of_2(CG), ROWS=ROWS, num_warps=4, **_OPTIONS,
        )  # fmt: skip
        strides = (_batch_stride(total), *row_strides)
        apply_kernel[grid](
            total, *rows, mean, rstd, y, num_groups, C, S, CG, chunks, *strides, **shape, **flags, **_OPTIONS
        )
    return total, y, mean, rstd


def group_norm_silu_backward(grad, x, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last):
    return _backward(None, grad, x, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last)


def add_group_norm_silu_backward(
    grad_x, grad, x_out, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last
):
    return _backward(grad_x, grad, x_out, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last)


def _backward(grad_x, grad, x, weight, bias, scale, shift, mean, rstd, num_groups, silu, channels_last):
    """grad_x: the gradient of x itself, added to dx, or None."""
    x, grad, residual = _dense(x), _dense(grad), grad_x is not None
    grad_x = _dense(grad_x) if residual else x
    (batch, C, S), last = _sizes(x, channels_last), _by_pixel(x, channels_last)
    CG = C // num_groups
    make = torch.zeros if x.numel() == 0 else torch.empty
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    given = (weight, bias, scale, shift)
    grads = [x.new_empty(0) if t is None else make(t.shape, dtype=t.dtype, device=x.device) for t in given]
    if x.numel() == 0:
        return dx, *grads
    rows, mean, rstd = _rows(x, *given), mean.contiguous(), rstd.contiguous()
    row_strides = _row_strides(scale, shift)
    strides = (_batch_stride(grad), _batch_stride(x), *row_strides)
    flags = _common(weight, scale, silu)
    shape, chunks, grid = _grid(batch, C, S, last)
    partial = torch.empty((batch, chunks, 2, C), dtype=torch.float32, device=x.device)
    sums = torch.empty((batch, 2, C), dtype=torch.float32, device=x.device)
    means = torch.empty((batch, num_groups, 2), dtype=torch.float32, device=x.device)
    kept = {key: flags[key] for key in ("PARAMETERS", "MODULATED")}
    sizes = (num_groups, C, S, CG, chunks)
    with torch.cuda.device_of(x):
        backward_sums_kernel[grid](
            grad, x, *rows, mean, rstd, partial, *sizes, *strides, **shape, **flags, LAST=last, **_OPTIONS
        )
        backward_groups_kernel[(batch * num_groups,)](
            partial, *rows, sums, means, grads[2], grads[3], *sizes, *row_strides, **kept,
            CHANNELS=triton.next_power_of_2(CG), ROWS=ROWS, num_warps=4, **_OPTIONS,
        )  # fmt: skip
        if weight is not None:
            backward_parameters_kernel[(triton.cdiv(C, COLUMNS),)](
                sums, rows[2], grads[0], grads[1], batch, C, row_strides[0],
                MODULATED=flags["MODULATED"], COLUMNS=COLUMNS, ROWS=ROWS, num_warps=4, **_OPTIONS,
            )  # fmt: skip
        backward_apply_kernel[grid](
            grad, x, grad_x, *rows, mean, rstd, means, dx, *sizes, *strides[:2], _batch_stride(grad_x), *row_strides,
            RESIDUAL=residual, **shape, **flags, LAST=last, **_OPTIONS,
        )  # fmt: skip
    return dx, *grads


def _sizes(x, channels_last):
    return (x.shape[0], x.shape[2], x.shape[1]) if channels_last else tuple(x.shape)


def _by_pixel(x, channels_last):
    """A pixel's channels are neighbours, as they also are if there is but one pixel."""
    return channels_last or (x.shape[2] == 1 and x.shape[1] > 1)


def _grid(batch, C, S, last):
    channels, pixels = tile(C, S, last)
    chunks = triton.cdiv(S, pixels)
    shape = {"CHANNELS": channels, "PIXELS": pixels, "num_warps": min(8, max(1, channels * pixels // 512))}
    return shape, chunks, (batch * chunks, triton.cdiv(C, channels))


def _dense(x):
    """Samples dense in the order of x's dimensions; the batch stride is free."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _batch_stride(x):
    return x.stride(0) if x.shape[0] > 1 else x[:1].numel()


def _rows(x, weight, bias, scale, shift):
    """Unit innermost strides, and x where there is none: an address that no kernel reads."""
    return [x if t is None else t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous() for t in
            (weight, bias, scale, shift)]  # fmt: skip


def _row_strides(scale, shift):
    """Of the rows as `_rows` hands them on."""
    return tuple(0 if t is None else t.stride(0) if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.shape[-1]
                 for t in (scale, shift))  # fmt: skip


# ---- what `make inspect` compiles ahead of time --------------------------------------------------------------------

_COUNTS = ("chunks", "G", "CG", "batch")  # all other integers are row lengths and strides: multiples of 16
_FLOATS = {"mean_ptr", "rstd_ptr", "partial_ptr", "sums_ptr", "means_ptr"}


def variants():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        name = DTYPE_NAMES[dtype]
        for last in (False, True):
            label = f"{name}_{'channels_last' if last else 'contiguous'}"
            found += _streaming_variants(name, label, last)
        found += _summing_variants(name)
    return found


def _streaming_variants(kind, label, last):
    flags = {"PARAMETERS": True, "MODULATED": True, "SILU": True, "LAST": last}
    channels, pixels = tile(512, 4096, last)
    shape = {"CHANNELS": channels, "PIXELS": pixels}
    group_channels, group_pixels, group_warps = group_tile(16 if last else 8, 512 if last else 1024, last)
    whole = {"CHANNELS": group_channels, "PIXELS": group_pixels}
    for branch in (False, True):
        add, added = "add_" * branch, {"BRANCH": branch}
        group = _variant(f"{add}group_{label}", group_kernel, kind, {**flags, **whole, **added}, group_warps)
        yield group | {"divisible": [*group["divisible"], *(["CG"] if last else [])]}
        yield _variant(f"{add}moments_{label}", moments_kernel, kind, {"LAST": last, **shape, **added}, 8)
        residual = {**flags, **shape, "RESIDUAL": branch}
        yield _variant(f"{add}backward_apply_{label}", backward_apply_kernel, kind, residual, 8)
    for kernel in (apply_kernel, backward_sums_kernel):
        name = kernel.__name__.removesuffix("_kernel")
        yield _variant(f"{name}_{label}", kernel, kind, {**flags, **shape}, 8)


def _summing_variants(kind):
    sums = {"CHANNELS": 16, "ROWS": ROWS}
    flags = {"PARAMETERS": True, "MODULATED": True}
    columns = {"MODULATED": True, "COLUMNS": COLUMNS, "ROWS": ROWS}
    yield _variant(f"statistics_{kind}", statistics_kernel, kind, {**sums, "PIXELS": 1024}, 4, streaming=False)
    yield _variant(f"backward_groups_{kind}", backward_groups_kernel, kind, {**sums, **flags}, 4, streaming=False)
    yield _variant(f"backward_parameters_{kind}", backward_parameters_kernel, kind, columns, 4, streaming=False)


def _variant(name, kernel, kind, constexprs, num_warps, streaming=True):
    def type_of(argument):
        if argument.endswith("_ptr"):
            return "*fp32" if argument in _FLOATS else f"*{kind}"
        return "fp32" if argument == "eps" else "i32"

    signature = {a: "constexpr" if a in constexprs else type_of(a) for a in kernel.arg_names}
    return {
        "name": f"group_norm_silu_{name}",
        "fn": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "divisible": [a for a, t in signature.items() if t.startswith("*") or (t == "i32" and a not in _COUNTS)],
        "num_warps": num_warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
        "streaming": streaming,
    }
