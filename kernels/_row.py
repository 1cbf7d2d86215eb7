"""Device functions for a row of a coefficient table (csrc/include/genengine/sampler_step.h): the formula, once.

    m  = o0 + g1 (o1 - o0) + g2 (o2 - o1);  y = phi(p x + q m)
    x' = a x + b m + c y + h1 H1 + h2 H2 + h3 H3 + s (exp(l v) z)        left to right, no fused multiply-add

Launch every kernel that uses these with enable_fp_fusion=False. `element` counts a sample's elements in C order, in
blocks of any shape; an element past the end (`count`, `per`) is neither read nor written.
"""

import triton
import triton.language as tl

from genengine.kernels._philox import exp_ieee, normal_at, normal_block

_STREAM = tl.constexpr(1)  # genengine.random.STREAMS["step"]


@triton.jit
def load(ptr, element, count):
    """Elements below count as float32; with count = 0 nothing is read."""
    return tl.load(ptr + element, mask=element < count, other=0.0).to(tl.float32)


@triton.jit
def _term(coefficient, value):
    return tl.where(coefficient != 0.0, coefficient * value, 0.0)


@triton.jit
def combine(o0, o1, o2, g1, g2, BRANCHES: tl.constexpr):
    """m of one to three branches; those that there are not may be anything."""
    m = o0
    if BRANCHES >= 2:
        m = m + _term(g1, o1 - o0)
        if BRANCHES == 3:
            m = m + _term(g2, o2 - o1)
    return m


@triton.jit
def _apply_phi(u, phi, r):
    clamped = tl.where(u < -r, -r, tl.where(u > r, r, u))
    return tl.where(phi == 0, u, tl.where(phi == 1, clamped, tl.div_rn(clamped, tl.where(phi == 2, r, 1.0))))


@triton.jit
def sample_row(step_ptr, table_ptr, sample, num_rows, table_batch, table_stride):
    """The sample's row: where its coefficients begin, its number (inside the table), and whether it still has one."""
    step = tl.load(step_ptr + sample)
    row = tl.minimum(tl.maximum(step, 0), num_rows - 1)
    row_ptr = table_ptr + (row.to(tl.int64) * table_batch + sample * table_stride) * 16
    return row_ptr, row, (step >= 0) & (step < num_rows)


@triton.jit
def step_noise(
    noise_ptr, seed_ptr, ids_ptr, sample, element, per, first_quad, s, row, noise_stride, seed_stride, channels, pixels,
    HAS_IDS: tl.constexpr, GIVEN: tl.constexpr, SCATTERED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """z, given or drawn; a row without noise draws nothing. SCATTERED: any elements, in (pixel, channel) order."""
    z = tl.zeros(element.shape, tl.float32)
    if GIVEN:
        z = load(noise_ptr + sample * noise_stride, element, tl.where(s != 0.0, per, 0))
    elif s != 0.0:
        seed = tl.load(seed_ptr + sample * seed_stride)
        index = tl.load(ids_ptr + sample) if HAS_IDS else sample
        stream = row * 0 + _STREAM
        if SCATTERED:
            z = normal_at((element % channels) * pixels + element // channels, seed, index, row, stream)
        else:
            z = normal_block(first_quad, seed, index, row, stream, QUADS)
    return z


@triton.jit
def spread(scale, v, z):
    """exp(scale v) z"""
    return exp_ieee(scale * v) * z


@triton.jit
def _write_register(register_ptr, element, count, write, y, x):
    mask = element < tl.where(write != 0, count, 0)
    tl.store(register_ptr + element, tl.where(write == 1, y, x), mask=mask)


@triton.jit
def apply_row(
    row_ptr, x, m, z, history_ptr, out_ptr, x_in_ptr, sample, element, per, active, batch, register_stride,
    history_stride, out_stride, x_in_stride, REGISTERS: tl.constexpr, COPIES: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """From the state, the combined output and the noise: x', the registers and the copies of the next input."""
    p, q, r = tl.load(row_ptr + 3), tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    a, b, c = tl.load(row_ptr + 6), tl.load(row_ptr + 7), tl.load(row_ptr + 8)
    c_in, flags = tl.load(row_ptr + 14), tl.load(row_ptr + 15).to(tl.int32)
    written = tl.where(active, per, 0)  # of the registers and x_in: a finished sample leaves them alone
    y = _apply_phi(_term(p, x) + _term(q, m), flags & 3, r)
    value = _term(a, x) + _term(b, m) + _term(c, y)
    for j in tl.static_range(REGISTERS):
        h = tl.load(row_ptr + 9 + j)
        offset = j * register_stride + sample * history_stride
        value = value + _term(h, load(history_ptr + offset, element, tl.where(h != 0.0, per, 0)))
    if NOISE:
        value = value + _term(tl.load(row_ptr + 12), z)
    for j in tl.static_range(REGISTERS):
        offset = j * register_stride + sample * history_stride
        _write_register(history_ptr + offset, element, written, (flags >> (2 + 2 * j)) & 3, y, x)
    value = tl.where(active, value, x)
    tl.store(out_ptr + sample * out_stride + element, value.to(out_ptr.dtype.element_ty), mask=element < per)
    for k in tl.static_range(COPIES):
        scaled = (c_in * value).to(x_in_ptr.dtype.element_ty)
        tl.store(x_in_ptr + (k * batch + sample) * x_in_stride + element, scaled, mask=element < written)
