"""Device functions for the noise specification (genengine/random.py): the same bits as every other backend.

Launch every kernel that uses these with enable_fp_fusion=False: a fused multiply-add would change the bits.
Constants used in a loop stand at module level: the interpreter lets a constexpr be reassigned, the compiler does not.
"""

import triton
import triton.language as tl

M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on uint32 blocks."""
    m0, m1 = tl.full(c0.shape, M0, tl.uint32), tl.full(c0.shape, M1, tl.uint32)
    for _ in tl.static_range(10):
        h0, l0, h1, l1 = tl.umulhi(c0, m0), c0 * m0, tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += tl.full(k0.shape, W0, tl.uint32)
        k1 += tl.full(k1.shape, W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def quad_words(quad, seed, sample, step, stream):
    """The four words of each quad; seed int64, sample, step and stream int32 or int64 scalars."""
    zero = quad.to(tl.uint32) * 0
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return philox(
        quad.to(tl.uint32), zero + sample.to(tl.uint32), zero + step.to(tl.uint32), zero + stream.to(tl.uint32),
        zero + low, zero + high,
    )  # fmt: skip


@triton.jit
def unit(w):
    return (w >> 9).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08


@triton.jit
def log_unit(x):
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = offset >> 23
    f = ((offset & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    z = f * f
    y = (f * z) * p
    y = y + (-0.5) * z
    y = y + f
    return exponent.to(tl.float32) * 0.69314718 + y


@triton.jit
def exp_ieee(x):
    """e^x with the same bits on every backend, x bounded to [-87, 88]."""
    bounded = tl.where(x < -87.0, -87.0, x)
    bounded = tl.where(bounded > 88.0, 88.0, bounded)
    shifted = bounded * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (bounded - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.3941118e-3 + 8.3631799e-3
    p = p * r + 4.1666374e-2
    p = p * r + 1.6666577e-1
    p = p * r + 0.5
    p = ((r * r) * p + r) + 1.0
    return p * ((shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 127)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tanh_ieee(x):
    exponential = exp_ieee(2.0 * x) + 1.0
    return 1.0 - tl.div_rn(exponential * 0.0 + 2.0, exponential)


@triton.jit
def sincos_turn(u):
    quarter = (u * 4.0 + 12582912.0) - 12582912.0
    k = quarter.to(tl.int32)
    x = (u - quarter * 0.25) * 6.283185307
    z = x * x
    sine = z * -1.9515295891e-4 + 8.3321608736e-3
    sine = sine * z + -1.6666654611e-1
    sine = (sine * z) * x + x
    cosine = z * 2.443315711809948e-5 + -1.388731625493765e-3
    cosine = cosine * z + 4.166664568298827e-2
    cosine = (cosine * z) * z + ((-0.5) * z + 1.0)
    odd = (k & 1) != 0
    s, c = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where((k & 2) != 0, -s, s), tl.where(((k + 1) & 2) != 0, -c, c)


@triton.jit
def interleave(e0, e1, e2, e3, QUADS: tl.constexpr):
    """Four (QUADS,) blocks to (4 QUADS,) in element order."""
    even, odd = tl.join(e0, e2), tl.join(e1, e3)  # (QUADS, 2) each
    return tl.reshape(tl.join(even, odd), (QUADS * 4,))


@triton.jit
def normal_block(first_quad, seed, sample, step, stream, QUADS: tl.constexpr):
    """4 QUADS consecutive normals of one sample, from element 4 first_quad on."""
    quad = first_quad + tl.arange(0, QUADS)
    w0, w1, w2, w3 = quad_words(quad, seed, sample, step, stream)
    r0, r1 = tl.sqrt_rn(-2.0 * log_unit(unit(w0))), tl.sqrt_rn(-2.0 * log_unit(unit(w2)))
    s0, c0 = sincos_turn(unit(w1))
    s1, c1 = sincos_turn(unit(w3))
    return interleave(r0 * c0, r0 * s0, r1 * c1, r1 * s1, QUADS)


@triton.jit
def uniform_block(first_quad, seed, sample, step, stream, QUADS: tl.constexpr):
    quad = first_quad + tl.arange(0, QUADS)
    w0, w1, w2, w3 = quad_words(quad, seed, sample, step, stream)
    return interleave(unit(w0), unit(w1), unit(w2), unit(w3), QUADS)


@triton.jit
def normal_at(element, seed, sample, step, stream):
    """The normal of each element, in any order: a draw of the whole quad for each, four times the work of a block."""
    w0, w1, w2, w3 = quad_words(element // 4, seed, sample, step, stream)
    position = element % 4
    second = position >= 2
    radius = tl.sqrt_rn(-2.0 * log_unit(unit(tl.where(second, w2, w0))))
    s, c = sincos_turn(unit(tl.where(second, w3, w1)))
    return radius * tl.where((position % 2) == 1, s, c)
