"""Triton kernels of sampler_step and advance.

Bytes per element: reads x, the branches and the registers whose coefficient is not 0, and v of a learned variance where
l is not, writes x', the copies of x_in and the registers that the row's flags name. About 12 FLOPs, plus 67
instructions per normal drawn and 20 per exponential. Accumulates in float32, left to right, without fused multiply-add.
The row is read on the device: one compiled kernel serves every step, and samples of a batch may stand at different
rows.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES, batch_stride, layout, per_sample, require_layout
from genengine.kernels._row import apply_row, combine, load, sample_row, spread, step_noise

QUADS = 256
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows", "table_stride", "seed_stride", "channels", "pixels"])
def sampler_step_kernel(
    x_ptr, o0_ptr, o1_ptr, o2_ptr, table_ptr, step_ptr, history_ptr, seed_ptr, ids_ptr, noise_ptr, variance_ptr,
    out_ptr, x_in_ptr, per, blocks, batch, num_rows, table_batch, table_stride, x_stride, o0_stride, o1_stride,
    o2_stride, register_stride, history_stride, noise_stride, variance_stride, out_stride, x_in_stride, seed_stride,
    channels, pixels, BRANCHES: tl.constexpr, REGISTERS: tl.constexpr, COPIES: tl.constexpr, NOISE: tl.constexpr,
    GIVEN: tl.constexpr, VARIANCE: tl.constexpr, HAS_IDS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first_quad = (tl.program_id(0) % blocks) * QUADS
    element = first_quad.to(tl.int64) * 4 + tl.arange(0, QUADS * 4)

    row_ptr, row, active = sample_row(step_ptr, table_ptr, sample, num_rows, table_batch, table_stride)
    g1, g2, s = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 12)

    x = load(x_ptr + sample * x_stride, element, per)
    o0 = load(o0_ptr + sample * o0_stride, element, per)
    o1, o2 = o0, o0
    if BRANCHES >= 2:
        o1 = load(o1_ptr + sample * o1_stride, element, tl.where((g1 != 0.0) | (g2 != 0.0), per, 0))
        if BRANCHES == 3:
            o2 = load(o2_ptr + sample * o2_stride, element, tl.where(g2 != 0.0, per, 0))
    m = combine(o0, o1, o2, g1, g2, BRANCHES)
    z = x  # without noise, unused
    if NOISE:
        z = step_noise(
            noise_ptr, seed_ptr, ids_ptr, sample, element, per, first_quad, s, row, noise_stride, seed_stride,
            channels, pixels, HAS_IDS, GIVEN, CHANNELS_LAST, QUADS,
        )  # fmt: skip
        if VARIANCE:
            scale = tl.load(row_ptr + 13)
            if (scale != 0.0) & (s != 0.0):  # else no v is read
                z = spread(scale, load(variance_ptr + sample * variance_stride, element, per), z)
    apply_row(
        row_ptr, x, m, z, history_ptr, out_ptr, x_in_ptr, sample, element, per, active, batch, register_stride,
        history_stride, out_stride, x_in_stride, REGISTERS, COPIES, NOISE,
    )  # fmt: skip


def sampler_step_out(x, outputs, table, step, history, seed, sample_ids, noise, variance, out, x_in):
    batch, per = x.shape[0], per_sample(x)
    if per == 0:
        return
    channels, pixels = layout(out)
    operands = [("x", x), *((f"outputs[{k}]", output) for k, output in enumerate(outputs))]
    operands += [("noise", noise), ("variance", variance), ("x_in", x_in)]
    for name, tensor in operands:
        if tensor is not None:
            require_layout("sampler_step", name, tensor, channels)
    if len(outputs) == 1:  # one tensor may stack the branches along the batch
        outputs = outputs[0].split(batch)
    o0, o1, o2 = (outputs[min(k, len(outputs) - 1)] for k in range(3))
    history_or_x, noise_or_x, seed_or_step = (x if history is None else history), (x if noise is None else noise), seed
    blocks = triton.cdiv(per, 4 * QUADS)
    with torch.cuda.device_of(x):
        sampler_step_kernel[(blocks * batch,)](
            x, o0, o1, o2, table, step, history_or_x, step if seed is None else seed_or_step,
            step if sample_ids is None else sample_ids, noise_or_x, o0 if variance is None else variance, out,
            out if x_in is None else x_in, per, blocks, batch, table.shape[0], table.shape[1],
            0 if table.shape[1] == 1 else 1, batch_stride(x), batch_stride(o0), batch_stride(o1), batch_stride(o2),
            0 if history is None else history.stride(0), 0 if history is None or batch == 1 else history.stride(1),
            *(0 if tensor is None else batch_stride(tensor) for tensor in (noise, variance, out, x_in)),
            seed.stride(0) if seed is not None and seed.dim() else 0, channels, pixels,
            BRANCHES=len(outputs), REGISTERS=0 if history is None else history.shape[0],
            COPIES=0 if x_in is None else x_in.shape[0] // batch, NOISE=seed is not None or noise is not None,
            GIVEN=noise is not None, VARIANCE=variance is not None, HAS_IDS=sample_ids is not None,
            CHANNELS_LAST=channels > 1, QUADS=QUADS, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "num_rows", "table_batch", "copies"])
def advance_kernel(step_ptr, table_ptr, t_ptr, batch, num_rows, table_batch, copies, BLOCK: tl.constexpr):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < batch
    old = tl.load(step_ptr + sample, mask=inside, other=0)
    stepping = inside & (old >= 0) & (old < num_rows)
    step = tl.where(stepping, old + 1, old)
    tl.store(step_ptr + sample, step, mask=inside)
    active = stepping & (step < num_rows)
    t = tl.load(table_ptr + (step.to(tl.int64) * table_batch + sample % table_batch) * 16, mask=active, other=0.0)
    for k in range(copies):
        tl.store(t_ptr + k * batch + sample, t, mask=active)


def advance(step, table, t):
    batch = step.shape[0]
    if batch == 0:
        return
    with torch.cuda.device_of(step):
        advance_kernel[(triton.cdiv(batch, 256),)](
            step, table, t, batch, table.shape[0], table.shape[1], t.shape[0] // batch, BLOCK=256, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def _step_variant(dtype, noise, registers, branches=2, copies=2, variance=False):
    name = DTYPE_NAMES[dtype]
    kinds = dict.fromkeys(sampler_step_kernel.arg_names, "i32")
    like_x = ("x_ptr", "o0_ptr", "o1_ptr", "o2_ptr", "variance_ptr", "out_ptr", "x_in_ptr")
    kinds.update({key: f"*{name}" for key in like_x})
    kinds.update({key: "*fp32" for key in ("table_ptr", "history_ptr", "noise_ptr")})
    kinds.update(step_ptr="*i32", seed_ptr="*i64", ids_ptr="*i64")
    constexprs = {
        "BRANCHES": branches, "REGISTERS": registers, "COPIES": copies, "NOISE": noise, "GIVEN": False,
        "VARIANCE": variance, "HAS_IDS": True, "CHANNELS_LAST": False, "QUADS": QUADS,
    }  # fmt: skip
    kinds.update(dict.fromkeys(constexprs, "constexpr"))
    strides = [key for key in kinds if key.endswith("_stride") and key not in ("table_stride", "seed_stride")]
    return {
        "name": f"sampler_step_{name}" + "_noise" * noise + "_learned" * variance + f"_h{registers}" * bool(registers),
        "fn": sampler_step_kernel,
        "signature": kinds,
        "constexprs": constexprs,
        "divisible": [key for key, kind in kinds.items() if kind.startswith("*")] + ["per", *strides],
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }


def variants():
    """What `make inspect` compiles ahead of time."""
    steps = [
        _step_variant(dtype, noise, registers)
        for dtype, noise, registers in (
            (torch.float32, False, 0), (torch.float32, True, 0), (torch.float32, False, 1), (torch.float32, True, 3),
            (torch.bfloat16, False, 0), (torch.bfloat16, True, 0), (torch.float16, False, 0),
        )
    ] + [_step_variant(dtype, True, 0, variance=True) for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    kinds = dict.fromkeys(advance_kernel.arg_names, "i32")
    kinds.update(step_ptr="*i32", table_ptr="*fp32", t_ptr="*fp32", BLOCK="constexpr")
    return steps + [
        {
            "name": "advance",
            "fn": advance_kernel,
            "signature": kinds,
            "constexprs": {"BLOCK": 256},
            "divisible": ["step_ptr", "table_ptr", "t_ptr"],
            "num_warps": 4,
            "enable_fp_fusion": False,
            "streaming": False,
        }
    ]
