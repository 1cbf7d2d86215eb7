"""Triton kernels of reparameterize, forward and backward: eps is drawn in registers, in both. Accumulates in float32.

Bytes per element: 3 e forward, 5 e backward. A program takes one block of a sample and leaves its part of the KL:
the sum over a sample has a fixed order.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES, batch_stride, layout, per_sample, require_layout
from genengine.kernels._philox import normal_at, normal_block

QUADS = 256
NUM_WARPS = 4
_STREAM = 2  # genengine.random.STREAMS["reparameterize"]


@triton.jit
def drawn_or_given(
    noise_ptr, seed_ptr, ids_ptr, sample, first_quad, element, per, noise_stride, seed_stride, step, stream,
    channels, pixels, HAS_IDS: tl.constexpr, GIVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    if GIVEN:
        eps = tl.load(noise_ptr + sample * noise_stride + element, mask=element < per, other=0.0)
    else:
        seed = tl.load(seed_ptr + sample * seed_stride)
        index = tl.load(ids_ptr + sample) if HAS_IDS else sample
        if CHANNELS_LAST:
            eps = normal_at((element % channels) * pixels + element // channels, seed, index, step, stream)
        else:
            eps = normal_block(first_quad, seed, index, step, stream, QUADS)
    return eps


@triton.jit(do_not_specialize=["step", "stream", "channels", "pixels", "seed_stride"])
def forward_kernel(
    mean_ptr, logvar_ptr, noise_ptr, seed_ptr, ids_ptr, z_ptr, partial_ptr,
    per, blocks, mean_stride, logvar_stride, noise_stride, seed_stride, step, stream, channels, pixels, free_bits,
    MONTE_CARLO: tl.constexpr, HAS_IDS: tl.constexpr, GIVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_quad = (tl.program_id(0) % blocks) * QUADS
    element = first_quad.to(tl.int64) * 4 + tl.arange(0, QUADS * 4)
    inside = element < per
    mean = tl.load(mean_ptr + sample * mean_stride + element, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_ptr + sample * logvar_stride + element, mask=inside, other=0.0).to(tl.float32)
    eps = drawn_or_given(
        noise_ptr, seed_ptr, ids_ptr, sample, first_quad, element, per, noise_stride, seed_stride, step, stream,
        channels, pixels, HAS_IDS, GIVEN, CHANNELS_LAST, QUADS,
    )  # fmt: skip
    z = mean + tl.exp(0.5 * logvar) * eps
    if MONTE_CARLO:
        kl = 0.5 * (z * z - eps * eps - logvar)
    else:
        kl = 0.5 * (mean * mean + ((tl.exp(logvar) - 1.0) - logvar))
        kl = tl.where(kl < free_bits, free_bits, kl)
    tl.store(z_ptr + sample * per + element, z.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(inside, kl, 0.0)))


@triton.jit(do_not_specialize=["step", "stream", "channels", "pixels", "seed_stride", "grad_kl_stride"])
def backward_kernel(
    grad_z_ptr, grad_kl_ptr, mean_ptr, logvar_ptr, noise_ptr, seed_ptr, ids_ptr, dmean_ptr, dlogvar_ptr,
    per, blocks, grad_z_stride, grad_kl_stride, mean_stride, logvar_stride, noise_stride, seed_stride, step, stream,
    channels, pixels, free_bits,
    MONTE_CARLO: tl.constexpr, HAS_IDS: tl.constexpr, GIVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_quad = (tl.program_id(0) % blocks) * QUADS
    element = first_quad.to(tl.int64) * 4 + tl.arange(0, QUADS * 4)
    inside = element < per
    grad_z = tl.load(grad_z_ptr + sample * grad_z_stride + element, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + sample * mean_stride + element, mask=inside, other=0.0).to(tl.float32)
    logvar = tl.load(logvar_ptr + sample * logvar_stride + element, mask=inside, other=0.0).to(tl.float32)
    grad_kl = tl.load(grad_kl_ptr + sample * grad_kl_stride)
    eps = drawn_or_given(
        noise_ptr, seed_ptr, ids_ptr, sample, first_quad, element, per, noise_stride, seed_stride, step, stream,
        channels, pixels, HAS_IDS, GIVEN, CHANNELS_LAST, QUADS,
    )  # fmt: skip
    sigma = tl.exp(0.5 * logvar)
    if MONTE_CARLO:
        dmean = grad_z + grad_kl * (mean + sigma * eps)
        dlogvar = 0.5 * (dmean * sigma * eps - grad_kl)
    else:
        variance = tl.exp(logvar)
        kl = 0.5 * (mean * mean + ((variance - 1.0) - logvar))
        weight = tl.where(kl < free_bits, 0.0, grad_kl)
        dmean = grad_z + weight * mean
        dlogvar = 0.5 * (grad_z * sigma * eps + weight * (variance - 1.0))
    position = sample * per + element
    tl.store(dmean_ptr + position, dmean.to(dmean_ptr.dtype.element_ty), mask=inside)
    tl.store(dlogvar_ptr + position, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=inside)


def reparameterize(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo):
    z, per, batch = torch.empty_like(mean), per_sample(mean), mean.shape[0]
    if per == 0:
        return z, torch.zeros(batch, dtype=torch.float32, device=mean.device)
    options = _options("logvar", logvar, mean, seed, sample_ids, step, noise, monte_carlo)
    blocks = triton.cdiv(per, 4 * QUADS)
    partial = torch.empty((batch, blocks), dtype=torch.float32, device=mean.device)
    with torch.cuda.device_of(mean):
        forward_kernel[(batch * blocks,)](
            mean, logvar, *_pointers(mean, noise, seed, sample_ids), z, partial, per, blocks, batch_stride(mean),
            batch_stride(logvar), free_bits=_threshold(free_bits), **options,
        )  # fmt: skip
    return z, partial.sum(1)


def reparameterize_backward(
    grad_z, grad_kl, mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo
):  # fmt: skip
    dmean, dlogvar, per = torch.empty_like(mean), torch.empty_like(logvar), per_sample(mean)
    if per == 0:
        return dmean, dlogvar
    options = _options("logvar", logvar, mean, seed, sample_ids, step, noise, monte_carlo)
    require_layout("reparameterize", "grad_z", grad_z, options["channels"])
    blocks = triton.cdiv(per, 4 * QUADS)
    with torch.cuda.device_of(mean):
        backward_kernel[(mean.shape[0] * blocks,)](
            grad_z, grad_kl, mean, logvar, *_pointers(mean, noise, seed, sample_ids), dmean, dlogvar, per, blocks,
            batch_stride(grad_z), grad_kl.stride(0), batch_stride(mean), batch_stride(logvar),
            free_bits=_threshold(free_bits), **options,
        )  # fmt: skip
    return dmean, dlogvar


def _threshold(free_bits):
    """Without free bits no KL is below it, not even one that rounding took below zero."""
    return free_bits if free_bits > 0 else float("-inf")


def _pointers(mean, noise, seed, sample_ids):
    return [mean if tensor is None else tensor for tensor in (noise, seed, sample_ids)]


def _options(name, logvar, mean, seed, sample_ids, step, noise, monte_carlo):
    channels, pixels = layout(mean)
    require_layout("reparameterize", name, logvar, channels)
    if noise is not None:
        require_layout("reparameterize", "noise", noise, channels)
    return {
        "noise_stride": 0 if noise is None else batch_stride(noise),
        "seed_stride": seed.stride(0) if seed is not None and seed.dim() else 0,
        "step": step,
        "stream": _STREAM,
        "channels": channels,
        "pixels": pixels,
        "MONTE_CARLO": monte_carlo,
        "HAS_IDS": sample_ids is not None,
        "GIVEN": noise is not None,
        "CHANNELS_LAST": channels > 1,
        "QUADS": QUADS,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def variants():
    """What `make inspect` compiles ahead of time."""
    return [
        _variant(f"reparameterize{kind}_{DTYPE_NAMES[dtype]}{'_monte_carlo' * monte_carlo}", kernel, dtype, monte_carlo)
        for dtype in (torch.float32, torch.bfloat16)
        for kind, kernel in (("", forward_kernel), ("_backward", backward_kernel))
        for monte_carlo in (False, True)
    ]


_FLOAT_POINTERS = ("noise_ptr", "partial_ptr", "grad_kl_ptr")
_INT_POINTERS = ("seed_ptr", "ids_ptr")
_FLAGS = ("MONTE_CARLO", "HAS_IDS", "GIVEN", "CHANNELS_LAST", "QUADS")


def _variant(name, kernel, dtype, monte_carlo):
    kinds = {argument: "i32" for argument in kernel.arg_names} | {"free_bits": "fp32"}
    kinds |= {argument: f"*{DTYPE_NAMES[dtype]}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    kinds |= (
        dict.fromkeys(_FLOAT_POINTERS, "*fp32")
        | dict.fromkeys(_INT_POINTERS, "*i64")
        | dict.fromkeys(_FLAGS, "constexpr")
    )
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    strides = {"mean_stride", "logvar_stride", "grad_z_stride", "noise_stride"} & set(signature)
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": dict(zip(_FLAGS, (monte_carlo, True, False, False, QUADS), strict=True)),
        "divisible": [*(argument for argument, kind in signature.items() if kind.startswith("*")), "per", *strides],
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
