"""Triton kernels of normal and uniform.

Bytes per element: 4 written. Integer and float32 instructions: about 67 per normal on sm_90, so an H200 is bound by
issue, not by memory. One program draws a block of whole quads of one sample.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._philox import normal_block, uniform_block

QUADS = 256
NUM_WARPS = 4


@triton.jit(do_not_specialize=["step", "stream"])
def draw_kernel(
    out_ptr, seed_ptr, ids_ptr, per, blocks, seed_stride, step, stream,
    HAS_IDS: tl.constexpr, NORMAL: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // blocks
    first_quad = (tl.program_id(0) % blocks) * QUADS
    seed = tl.load(seed_ptr + sample * seed_stride)
    index = tl.load(ids_ptr + sample) if HAS_IDS else sample
    if NORMAL:
        z = normal_block(first_quad, seed, index, step, stream, QUADS)
    else:
        z = uniform_block(first_quad, seed, index, step, stream, QUADS)
    element = first_quad.to(tl.int64) * 4 + tl.arange(0, QUADS * 4)
    tl.store(out_ptr + sample.to(tl.int64) * per + element, z, mask=element < per)


def _draw(out, seed, sample_ids, step, stream, normal):
    per = out[:1].numel() if out.shape[0] else 0
    if per == 0:
        return
    blocks = triton.cdiv(per, 4 * QUADS)
    with torch.cuda.device_of(out):
        draw_kernel[(blocks * out.shape[0],)](
            out, seed, seed if sample_ids is None else sample_ids, per, blocks, seed.stride(0) if seed.dim() else 0,
            step, stream,
            HAS_IDS=sample_ids is not None, NORMAL=normal, QUADS=QUADS, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def normal_out(out, seed, sample_ids, step, stream):
    _draw(out, seed, sample_ids, step, stream, True)


def uniform_out(out, seed, sample_ids, step, stream):
    _draw(out, seed, sample_ids, step, stream, False)


def variants():
    """What `make inspect` compiles ahead of time."""
    signature = {
        "out_ptr": "*fp32", "seed_ptr": "*i64", "ids_ptr": "*i64", "per": "i32", "blocks": "i32",
        "seed_stride": "i32", "step": "i32",
        "stream": "i32", "HAS_IDS": "constexpr", "NORMAL": "constexpr", "QUADS": "constexpr",
    }  # fmt: skip
    return [
        {
            "name": "normal" if normal else "uniform",
            "fn": draw_kernel,
            "signature": signature,
            "constexprs": {"HAS_IDS": True, "NORMAL": normal, "QUADS": QUADS},
            "divisible": ["out_ptr", "seed_ptr", "ids_ptr", "per"],
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": False,
        }
        for normal in (True, False)
    ]
