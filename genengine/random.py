"""The noise specification in NumPy: noise is a function, and this module is the oracle for every backend.

    normal(seed, sample, step, stream)[element]

has the same bits on CPU C++, Triton and CUDA C++, for any batch size, batch split, thread count or number of GPUs,
because it is a counter put through a block cipher, then through IEEE multiplications, additions and square roots in one
written order, never a fused multiply-add.

    words       Philox-4x32-10 (Salmon et al. 2011) with key (seed low, seed high), counter (quad, sample, step, stream)
    quad        element // 4, the element's index in the sample's logical C order
    u_i         (w_i >> 9) * 2^-23 + 2^-24, exact in float32 and strictly inside (0, 1)
    normals     r0 cos(2 pi u1), r0 sin(2 pi u1), r1 cos(2 pi u3), r1 sin(2 pi u3)
                with r0 = sqrt(-2 log u0), r1 = sqrt(-2 log u2)   (Box & Muller 1958)
"""

from __future__ import annotations

import numpy as np

# One stream for each purpose, so that two draws never share a counter.
STREAMS = {
    "init": 0,
    "step": 1,
    "reparameterize": 2,
    "diffuse": 3,
    "time": 4,
    "class_drop": 5,
    "dropout": 6,
    "uniform": 7,
    "data_order": 8,
    "model": 9,
}

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)

# The minimax polynomial of Cephes' logf on [sqrt(1/2), sqrt(2)), highest power first.
LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
EXP_POLYNOMIAL = (1.3941118e-3, 8.3631799e-3, 4.1666374e-2, 1.6666577e-1, 0.5)  # (e^r - 1 - r) / r^2, |r| <= ln(2) / 2
LN2_HIGH, LN2_LOW, LOG2_E = 0.693359375, -2.12194440e-4, 1.44269504
LN2, TWO_PI, ROUND = 0.69314718, 6.283185307, 12582912.0


def stream_id(stream: str | int) -> int:
    """The number of a named stream; a number below 2^32 is taken as it is."""
    if isinstance(stream, str):
        if stream not in STREAMS:
            raise ValueError(f"random: stream must be one of {', '.join(STREAMS)}, got {stream!r}")
        return STREAMS[stream]
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"random: stream must be in [0, 2**32), got {stream}")
    return stream


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox-4x32-10: counter (..., 4) uint32 and a key of two 32-bit words to (..., 4) uint32."""
    c0, c1, c2, c3 = (np.asarray(counter, dtype=np.uint64)[..., i] for i in range(4))
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> _WORD) ^ c1 ^ np.uint64(k0), p1 & _LOW
        c2, c3 = (p0 >> _WORD) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(count: int, *, seed: int, sample: int, step: int, stream: str | int) -> np.ndarray:
    """The (ceil(count / 4), 4) uint32 words behind elements 0..count-1 of one sample."""
    quads = (count + 3) // 4
    counter = np.zeros((quads, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(quads)
    counter[:, 1], counter[:, 2], counter[:, 3] = sample, step, stream_id(stream)
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def uniform(count: int, *, seed: int, sample: int = 0, step: int = 0, stream: str | int = "uniform") -> np.ndarray:
    """(count,) float32 uniforms strictly inside (0, 1), on a grid of 2^-23."""
    return _unit(words(count, seed=seed, sample=sample, step=step, stream=stream)).reshape(-1)[:count]


def normal(count: int, *, seed: int, sample: int = 0, step: int = 0, stream: str | int = "init") -> np.ndarray:
    """(count,) float32 standard normals of one sample; |z| <= sqrt(48 ln 2) = 5.77."""
    u = _unit(words(count, seed=seed, sample=sample, step=step, stream=stream))
    pairs = []
    for i in (0, 2):
        radius = np.sqrt(np.float32(-2.0) * log_unit(u[:, i]))
        sine, cosine = sincos_turn(u[:, i + 1])
        pairs += [radius * cosine, radius * sine]
    return np.stack(pairs, axis=-1).reshape(-1)[:count]


def _unit(word: np.ndarray) -> np.ndarray:
    return (word >> np.uint32(9)).astype(np.float32) * np.float32(2**-23) + np.float32(2**-24)


def log_unit(x: np.ndarray) -> np.ndarray:
    """log of float32 x in (0, 1): x = 2^e * (1 + f), then a polynomial in f."""
    offset = x.view(np.int32) - np.int32(0x3F3504F3)
    exponent = offset >> 23
    f = ((offset & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - np.float32(1.0)
    p = _horner(LOG_POLYNOMIAL, f)
    z = f * f
    y = (f * z) * p
    y = y + np.float32(-0.5) * z
    y = y + f
    return exponent.astype(np.float32) * np.float32(LN2) + y


def sincos_turn(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sin 2 pi u, cos 2 pi u) of float32 u in (0, 1): nearest quarter turn, then polynomials."""
    quarter = (u * np.float32(4.0) + np.float32(ROUND)) - np.float32(ROUND)
    k = quarter.astype(np.int32)
    x = (u - quarter * np.float32(0.25)) * np.float32(TWO_PI)
    z = x * x
    sine = (_horner(SIN_POLYNOMIAL, z) * z) * x + x
    cosine = (_horner(COS_POLYNOMIAL, z) * z) * z + (np.float32(-0.5) * z + np.float32(1.0))
    odd = (k & 1) != 0
    s, c = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
    return np.where((k & 2) != 0, -s, s), np.where(((k + 1) & 2) != 0, -c, c)


def exp_ieee(x: np.ndarray) -> np.ndarray:
    """e^x of float32 x by multiplications and additions alone; x is bounded to [-87, 88], so no result is subnormal."""
    f = np.float32
    bounded = np.where(x < f(-87.0), f(-87.0), x)
    bounded = np.where(bounded > f(88.0), f(88.0), bounded)
    shifted = bounded * f(LOG2_E) + f(ROUND)
    n = shifted - f(ROUND)
    r = (bounded - n * f(LN2_HIGH)) - n * f(LN2_LOW)
    p = ((r * r) * _horner(EXP_POLYNOMIAL, r) + r) + f(1.0)
    return p * ((shifted.view(np.int32) - (f(ROUND).view(np.int32) - np.int32(127))) << np.int32(23)).view(f)


def _horner(coefficients, x):
    result = x * np.float32(coefficients[0]) + np.float32(coefficients[1])
    for coefficient in coefficients[2:]:
        result = result * x + np.float32(coefficient)
    return result
