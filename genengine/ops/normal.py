"""normal, uniform: noise as a function of (seed, sample, step, stream, element). See `genengine.random`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genengine import random
from genengine.ops import _check, _registry
from genengine.ops._cost import each

_SCHEMA = "{}_out(Tensor(a!) out, Tensor seed, Tensor? sample_ids, SymInt step, SymInt stream) -> ()"
_KINDS = ("normal", "uniform")
# A uniform takes 2 flops of its word. Two normals take two of them, 2 pi u, -2 log u, its root, sine, cosine and two
# products; log, sine and cosine stand for what they are, not for the polynomials that compute them.
UNIFORM_FLOPS, NORMAL_FLOPS, NORMAL_EXPS = 2, 6, 1.5


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    step: int = 0,
    stream: str | int = "init",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normals with the same bits on every backend, for any batch size or split.

        words             = Philox-4x32-10(key = seed, counter = (e // 4, sample_ids[b], step, stream))
        z[b].flatten()[e] = BoxMuller(words)[e % 4]

    shape: (B, ...). seed: an int in [0, 2^64), or an int64 tensor () or (B,), its bits read as unsigned.
    sample_ids: (B,) int64 global sample indices in [0, 2^32); default 0..B-1. step: table row when sampling, global
    iteration when training, in [0, 2^32). stream: a name of `genengine.random.STREAMS` or its number.
    dtype: float32, or float16 / bfloat16 / float64 (the float32 normal, converted). out: written instead of a new
    tensor; any strides (elements are counted in logical order). Returns (B, ...).
    Cost: reads seed, sample_ids, writes the float32 normals; 6 flops per element, of them 1.5 exponentials (a logarithm
    for two, a sine or cosine each); integer work is not counted. A conversion, or other strides, cost a copy more.
    Raises ValueError or TypeError on bad arguments, RuntimeError if a named backend cannot run.
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958.
    """
    return _draw("normal", shape, seed, sample_ids, step, stream, dtype, device, out, backend)


def uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    step: int = 0,
    stream: str | int = "uniform",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Uniforms u = (w >> 9) * 2^-23 + 2^-24 strictly inside (0, 1) in float32. Arguments as `normal`.

    Cost: reads seed, sample_ids, writes the float32 uniforms; 2 flops, no exponential per element.
    """
    return _draw("uniform", shape, seed, sample_ids, step, stream, dtype, device, out, backend)


def _draw(kind, shape, seed, sample_ids, step, stream, dtype, device, out, backend):
    if out is None:
        shape = tuple(shape)
        if not shape:
            raise ValueError(f"{kind}: shape must be (B, ...), got (); use (1,) for a single draw")
        out = torch.empty(shape, dtype=dtype, device=_default_device(device, seed))
    elif tuple(out.shape) != tuple(shape):
        raise ValueError(f"{kind}: out must have shape {tuple(shape)}, got {tuple(out.shape)}")
    _check.dtype(kind, "out", out)
    _check.no_grad_needed(kind, (out,))
    step = _check.counter(kind, "step", step)
    batch = out.shape[0]
    seed = _check.seed_tensor(kind, seed, out.device, batch)
    sample_ids = _check.sample_ids(kind, sample_ids, out.device, batch)
    buffer = out if out.dtype == torch.float32 and out.is_contiguous() else _float32(out)
    op = _registry.OPS[f"{kind}_out"]
    _registry.resolve(op, out.device, torch.float32, backend)(buffer, seed, sample_ids, step, random.stream_id(stream))
    return out if buffer is out else out.copy_(buffer)


def _default_device(device, seed):
    if device is not None:
        return device
    return seed.device if isinstance(seed, Tensor) else "cpu"


def _float32(out):
    return torch.empty(out.shape, dtype=torch.float32, device=out.device)


# ---- reference: `genengine.random` in torch, so that it runs on any device -----------------------------------------

_LOW = 0xFFFFFFFF


def reference_normal(out, seed, sample_ids, step, stream):
    u = _unit(_words(out, seed, sample_ids, step, stream))
    r0, r1 = (_sqrt(-2.0 * log_unit(u[i])) for i in (0, 2))
    (s0, c0), (s1, c1) = (_sincos_turn(u[i]) for i in (1, 3))
    _interleave(out, (r0 * c0, r0 * s0, r1 * c1, r1 * s1))


def reference_uniform(out, seed, sample_ids, step, stream):
    _interleave(out, _unit(_words(out, seed, sample_ids, step, stream)))


def _words(out, seed, sample_ids, step, stream):
    """The four Philox words of every quad: four (B, quads) int64 tensors holding 32-bit values."""
    batch, per_sample = out.shape[0], out[:1].numel()
    quad = torch.arange((per_sample + 3) // 4, device=out.device)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=out.device)
    row = step.long()[:, None] if isinstance(step, Tensor) else torch.full_like(quad, step)  # one step, or one a sample
    counter = (quad, (sample_ids & _LOW)[:, None], row, torch.full_like(quad, stream))
    c0, c1, c2, c3 = (c.expand(batch, quad.numel()) for c in counter)
    key = seed.expand(batch)[:, None]
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which is what is wanted
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _unit(words):
    return tuple((w >> 9).to(torch.float32) * 2.0**-23 + 2.0**-24 for w in words)


def log_unit(x):
    offset = x.view(torch.int32) - 0x3F3504F3
    exponent = offset >> 23
    f = ((offset & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    p = _horner(random.LOG_POLYNOMIAL, f)
    z = f * f
    y = (f * z) * p
    y = y + -0.5 * z
    y = y + f
    return exponent.to(torch.float32) * random.LN2 + y


def exp_ieee(x):
    """e^x with the same bits on every backend; see `genengine.random`."""
    bounded = torch.where(x < -87.0, -87.0, x)
    bounded = torch.where(bounded > 88.0, 88.0, bounded)
    shifted = bounded * random.LOG2_E + random.ROUND
    n = shifted - random.ROUND
    r = (bounded - n * random.LN2_HIGH) - n * random.LN2_LOW
    p = ((r * r) * _horner(random.EXP_POLYNOMIAL, r) + r) + 1.0
    return p * ((shifted.view(torch.int32) - (0x4B400000 - 127)) << 23).view(torch.float32)


def tanh_ieee(x):
    return 1.0 - torch.full_like(x, 2.0) / (exp_ieee(2.0 * x) + 1.0)


def _sincos_turn(u):
    quarter = (u * 4.0 + random.ROUND) - random.ROUND
    k = quarter.to(torch.int32)
    x = (u - quarter * 0.25) * random.TWO_PI
    z = x * x
    sine = (_horner(random.SIN_POLYNOMIAL, z) * z) * x + x
    cosine = (_horner(random.COS_POLYNOMIAL, z) * z) * z + (-0.5 * z + 1.0)
    odd = (k & 1) != 0
    s, c = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    return torch.where((k & 2) != 0, -s, s), torch.where(((k + 1) & 2) != 0, -c, c)


def _sqrt(x):
    # torch.sqrt of float32 may come from a vector library that is one unit off; by way of float64 it is exact.
    return torch.sqrt(x.double()).float()


def _horner(coefficients, x):
    result = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _interleave(out, parts):
    flat = torch.stack(parts, dim=-1).flatten(1)
    out.copy_(flat[:, : out[:1].numel()].reshape(out.shape))


def _fake(out, seed, sample_ids, step, stream):
    return None


_COSTS = (each(NORMAL_FLOPS, NORMAL_EXPS), each(UNIFORM_FLOPS))
for _kind, _reference, _cost in zip(_KINDS, (reference_normal, reference_uniform), _COSTS, strict=True):
    _registry.define(_SCHEMA.format(_kind), _reference, fake=_fake, module="normal", cost=_cost)
