"""Triton kernels of guidance_moments: a program sums one run of a sample, another adds the runs, in a fixed order.

Bytes per element, e each: reads 2 e. About 11 FLOPs. Accumulates in float32.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES, batch_stride, layout, per_sample, require_layout

BLOCK = 2048
SUM_BLOCK = 256
NUM_WARPS = 4
MOMENTS = 6


@triton.jit
def moments_kernel(u_ptr, c_ptr, partial_ptr, per, blocks, u_stride, c_stride, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < per
    u = tl.load(u_ptr + sample * u_stride + element, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + sample * c_stride + element, mask=inside, other=0.0).to(tl.float32)
    d = c - u
    to = partial_ptr + sample * 6 * blocks + block  # (B, 6, blocks)
    tl.store(to, tl.sum(u))
    tl.store(to + blocks, tl.sum(c))
    tl.store(to + 2 * blocks, tl.sum(u * u))
    tl.store(to + 3 * blocks, tl.sum(u * c))
    tl.store(to + 4 * blocks, tl.sum(c * c))
    tl.store(to + 5 * blocks, tl.sum(d * d))


@triton.jit(do_not_specialize=["blocks"])
def sum_kernel(partial_ptr, out_ptr, blocks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, blocks, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + row * blocks + k, mask=k < blocks, other=0.0)
    tl.store(out_ptr + row, tl.sum(total))


def guidance_moments(u, c):
    batch, per = u.shape[0], per_sample(u)
    out = torch.zeros((batch, MOMENTS), dtype=torch.float32, device=u.device)
    if per == 0:
        return out
    require_layout("guidance_moments", "c", c, layout(u)[0])
    blocks = triton.cdiv(per, BLOCK)
    partial = torch.empty((batch, MOMENTS, blocks), dtype=torch.float32, device=u.device)
    with torch.cuda.device_of(u):
        moments_kernel[(batch * blocks,)](
            u, c, partial, per, blocks, batch_stride(u), batch_stride(c), BLOCK=BLOCK, num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        sum_kernel[(batch * MOMENTS,)](
            partial, out, blocks, BLOCK=SUM_BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
        )  # fmt: skip
    return out


def _variant(dtype):
    kinds = dict.fromkeys(moments_kernel.arg_names, "i32") | {"partial_ptr": "*fp32", "BLOCK": "constexpr"}
    kinds |= dict.fromkeys(("u_ptr", "c_ptr"), f"*{DTYPE_NAMES[dtype]}")
    return {
        "name": f"guidance_moments_{DTYPE_NAMES[dtype]}",
        "fn": moments_kernel,
        "signature": kinds,
        "constexprs": {"BLOCK": BLOCK},
        "divisible": ["u_ptr", "c_ptr", "partial_ptr", "per", "u_stride", "c_stride"],
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
        "elements": BLOCK,
    }


def variants():
    """What `make inspect` compiles ahead of time."""
    return [_variant(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] + [
        {
            "name": "guidance_moments_sum",
            "fn": sum_kernel,
            "signature": {"partial_ptr": "*fp32", "out_ptr": "*fp32", "blocks": "i32", "BLOCK": "constexpr"},
            "constexprs": {"BLOCK": SUM_BLOCK},
            "divisible": ["partial_ptr", "out_ptr"],
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": True,
            "streaming": False,
        }
    ]
