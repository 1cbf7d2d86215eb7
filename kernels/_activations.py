"""Activation functions of float32 blocks with their first and second derivatives: act(u), act'(u), act''(u).

ACTIVATION is the name that the ops take. At a kink the derivative is the one from below. csrc's activations.h computes
the same functions.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_SCALE = tl.constexpr(1.5957691216057308)  # sqrt(8 / pi): gelu_tanh(u) = u sigmoid(_SCALE (u + _CUBIC u^3))
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(u):
    e = tl.exp(-2.0 * tl.abs(u))
    z = u * u
    small = u + u * z * (-0.33333328 + z * (0.13332795 + z * (-0.053854071 + z * (0.021010085 - z * 0.0061131944))))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(u) < 0.625, small, tl.where(u < 0.0, -large, large))


@triton.jit
def activate(u, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(u < 0.0, 0.0, u)
    elif ACTIVATION == "lrelu":
        y = tl.where(u < 0.0, alpha * u, u)
    elif ACTIVATION == "silu":
        y = u * tl.sigmoid(u)
    elif ACTIVATION == "gelu":
        y = 0.5 * u * (1.0 + tl.erf(u * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        y = u * tl.sigmoid((u + u * u * u * _CUBIC) * _SCALE)
    elif ACTIVATION == "tanh":
        y = _tanh(u)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(u)
    else:
        y = u
    return y


@triton.jit
def activate_slope(u, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(u <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "lrelu":
        y = tl.where(u <= 0.0, alpha, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(u)
        y = s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == "gelu":
        y = 0.5 * (1.0 + tl.erf(u * _SQRT_HALF)) + u * tl.exp(-0.5 * u * u) * _DENSITY_AT_0
    elif ACTIVATION == "gelu_tanh":
        v = (u + u * u * u * _CUBIC) * _SCALE
        s = tl.sigmoid(v)
        y = s + u * s * tl.sigmoid(-v) * (1.0 + u * u * (3.0 * _CUBIC)) * _SCALE
    elif ACTIVATION == "tanh":
        t = _tanh(u)
        y = 1.0 - t * t
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(u)
        y = s * (1.0 - s)
    else:
        y = u * 0.0 + 1.0
    return y


@triton.jit
def activate_curvature(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(u)
        y = s * (1.0 - s) * (2.0 + u * (1.0 - 2.0 * s))
    elif ACTIVATION == "gelu":
        y = tl.exp(-0.5 * u * u) * (2.0 - u * u) * _DENSITY_AT_0
    elif ACTIVATION == "gelu_tanh":
        v = (u + u * u * u * _CUBIC) * _SCALE
        s = tl.sigmoid(v)
        dv = (1.0 + u * u * (3.0 * _CUBIC)) * _SCALE
        y = s * tl.sigmoid(-v) * (2.0 * dv + u * (dv * dv * (1.0 - 2.0 * s) + u * (6.0 * _SCALE * _CUBIC)))
    elif ACTIVATION == "tanh":
        t = _tanh(u)
        y = -2.0 * t * (1.0 - t * t)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(u)
        y = s * (1.0 - s) * (1.0 - 2.0 * s)
    else:
        y = u * 0.0
    return y
