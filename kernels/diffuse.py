"""Triton kernel of diffuse: one read and two writes per element, eps drawn in registers. Accumulates in float32."""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES, batch_stride, layout, per_sample, require_layout
from genengine.kernels._philox import normal_at, normal_block

QUADS = 256
NUM_WARPS = 4
_STREAM = 3  # genengine.random.STREAMS["diffuse"]


@triton.jit(do_not_specialize=["step", "stream", "channels", "pixels", "seed_stride"])
def diffuse_kernel(
    x0_ptr, alpha_ptr, sigma_ptr, c_x0_ptr, c_eps_ptr, seed_ptr, ids_ptr, noise_ptr, x_t_ptr, target_ptr,
    per, blocks, x0_stride, noise_stride, seed_stride, step, stream, channels, pixels,
    HAS_IDS: tl.constexpr, GIVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_quad = (tl.program_id(0) % blocks) * QUADS
    element = first_quad.to(tl.int64) * 4 + tl.arange(0, QUADS * 4)
    inside = element < per
    if GIVEN:
        eps = tl.load(noise_ptr + sample * noise_stride + element, mask=inside, other=0.0)
    else:
        seed = tl.load(seed_ptr + sample * seed_stride)
        index = tl.load(ids_ptr + sample) if HAS_IDS else sample
        if CHANNELS_LAST:
            eps = normal_at((element % channels) * pixels + element // channels, seed, index, step, stream)
        else:
            eps = normal_block(first_quad, seed, index, step, stream, QUADS)
    x0 = tl.load(x0_ptr + sample * x0_stride + element, mask=inside, other=0.0).to(tl.float32)
    x_t = tl.load(alpha_ptr + sample) * x0 + tl.load(sigma_ptr + sample) * eps
    target = tl.load(c_x0_ptr + sample) * x0 + tl.load(c_eps_ptr + sample) * eps
    position = sample * per + element
    tl.store(x_t_ptr + position, x_t.to(x_t_ptr.dtype.element_ty), mask=inside)
    tl.store(target_ptr + position, target.to(target_ptr.dtype.element_ty), mask=inside)


def diffuse(x0, alpha, sigma, c_x0, c_eps, seed, sample_ids, step, noise):
    x_t, target = torch.empty_like(x0), torch.empty_like(x0)
    per = per_sample(x0)
    if per == 0:
        return x_t, target
    channels, pixels = layout(x0)
    if noise is not None:
        require_layout("diffuse", "noise", noise, channels)
    blocks = triton.cdiv(per, 4 * QUADS)
    with torch.cuda.device_of(x0):
        diffuse_kernel[(blocks * x0.shape[0],)](
            x0, alpha, sigma, c_x0, c_eps, x0 if seed is None else seed, x0 if sample_ids is None else sample_ids,
            x0 if noise is None else noise, x_t, target, per, blocks, batch_stride(x0),
            0 if noise is None else batch_stride(noise), seed.stride(0) if seed is not None and seed.dim() else 0,
            step, _STREAM, channels, pixels, HAS_IDS=sample_ids is not None, GIVEN=noise is not None,
            CHANNELS_LAST=channels > 1, QUADS=QUADS, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return x_t, target


def variants():
    """What `make inspect` compiles ahead of time."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        name = DTYPE_NAMES[dtype]
        signature = {
            **{key: f"*{name}" for key in ("x0_ptr", "x_t_ptr", "target_ptr")},
            **{key: "*fp32" for key in ("alpha_ptr", "sigma_ptr", "c_x0_ptr", "c_eps_ptr", "noise_ptr")},
            "seed_ptr": "*i64", "ids_ptr": "*i64",
            **{key: "i32" for key in ("per", "blocks", "x0_stride", "noise_stride", "seed_stride")},
            **{key: "i32" for key in ("step", "stream", "channels", "pixels")},
            **{key: "constexpr" for key in ("HAS_IDS", "GIVEN", "CHANNELS_LAST", "QUADS")},
        }  # fmt: skip
        constexprs = {"HAS_IDS": True, "GIVEN": False, "CHANNELS_LAST": False, "QUADS": QUADS}
        pointers = [key for key, kind in signature.items() if kind.startswith("*")]
        found.append(
            {
                "name": f"diffuse_{name}",
                "fn": diffuse_kernel,
                "signature": {argument: signature[argument] for argument in diffuse_kernel.arg_names},
                "constexprs": constexprs,
                "divisible": [*pointers, "per", "x0_stride", "noise_stride"],
                "num_warps": NUM_WARPS,
                "enable_fp_fusion": False,
            }
        )
    return found
