"""Triton kernel of patch_step: the last layer's product for a block of tokens of every branch, then the row.

Bytes: h once, but for branches that the row leaves out, and the weight once per block of tokens, from the second-level
cache; per element of x what sampler_step moves, less the model's output. FLOPs: 2 D for every output, then those of the
row. Products accumulate in float32, in order along D; the row follows left to right without fused multiply-add. A patch
holds parts of quads of noise, so every element draws a quad of its own: some 270 instructions.
"""

import torch
import triton
import triton.language as tl

from genengine.kernels._dot import dot
from genengine.kernels._launch import DTYPE_NAMES, batch_stride, per_sample
from genengine.kernels._row import apply_row, combine, load, sample_row, spread, step_noise

NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit
def _tokens(h_ptr, branch, sample, batch, h_batch, h_token, token, count, column, DIM: tl.constexpr, CUT: tl.constexpr):
    """Columns of the tokens of a branch, zero from token `count` on; CUT: the last columns lie beyond DIM."""
    at = h_ptr + (branch * batch + sample) * h_batch + token.to(tl.int64)[:, None] * h_token + column[None, :]
    mask = token[:, None] < count
    if CUT:
        mask = mask & (column[None, :] < DIM)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _weights(weight_ptr, row, column, DIM: tl.constexpr, CUT: tl.constexpr):
    """Columns of the rows of W, transposed: (columns, rows)."""
    at = weight_ptr + row[None, :] * DIM + column[:, None]
    if CUT:
        return tl.load(at, mask=column[:, None] < DIM, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _products(
    h_ptr, weight_ptr, bias_ptr, weight_row, sample, batch, h_batch, h_token, token, count, g1, g2, scale,
    BRANCHES: tl.constexpr, CHANNELS: tl.constexpr, VARIANCE: tl.constexpr, HAS_BIAS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h W^T + bias of each branch, and v of the last; what a coefficient of 0 leaves out is 0, its tokens unread."""
    CUT: tl.constexpr = DIM % BLOCK_D != 0
    LAST: tl.constexpr = BRANCHES - 1
    o0 = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    if HAS_BIAS:
        o0 += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    o1, o2, v = o0, o0, tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    if HAS_BIAS and VARIANCE:
        v += tl.load(bias_ptr + weight_row + CHANNELS).to(tl.float32)[None, :]
    count_1 = tl.where((g1 != 0.0) | (g2 != 0.0), count, 0)
    count_2 = tl.where(g2 != 0.0, count, 0)
    count_v = tl.where(scale != 0.0, count, 0)
    for start in range(0, DIM, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        w = _weights(weight_ptr, weight_row, column, DIM, CUT)
        h = _tokens(h_ptr, 0, sample, batch, h_batch, h_token, token, count, column, DIM, CUT)
        o0 = dot(h, w, o0)
        if BRANCHES >= 2:
            h = _tokens(h_ptr, 1, sample, batch, h_batch, h_token, token, count_1, column, DIM, CUT)
            o1 = dot(h, w, o1)
        if BRANCHES == 3:
            h = _tokens(h_ptr, 2, sample, batch, h_batch, h_token, token, count_2, column, DIM, CUT)
            o2 = dot(h, w, o2)
        if VARIANCE:
            h = _tokens(h_ptr, LAST, sample, batch, h_batch, h_token, token, count_v, column, DIM, CUT)
            w = _weights(weight_ptr, weight_row + CHANNELS, column, DIM, CUT)
            v = dot(h, w, v)
    return o0, o1, o2, v


@triton.jit(do_not_specialize=["tokens", "columns", "per", "num_rows", "table_stride", "seed_stride"])
def patch_step_kernel(
    x_ptr, h_ptr, weight_ptr, bias_ptr, table_ptr, step_ptr, history_ptr, seed_ptr, ids_ptr, noise_ptr, out_ptr,
    x_in_ptr, per, tokens, columns, token_blocks, feature_blocks, batch, num_rows, table_batch, table_stride, h_batch,
    h_token, x_stride, register_stride, history_stride, noise_stride, out_stride, x_in_stride, seed_stride,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, DIM: tl.constexpr, BRANCHES: tl.constexpr,
    REGISTERS: tl.constexpr, COPIES: tl.constexpr, NOISE: tl.constexpr, GIVEN: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    VARIANCE: tl.constexpr = NOISE and OUTPUTS > CHANNELS
    block = tl.program_id(0) // feature_blocks
    feature = (tl.program_id(0) % feature_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    sample = (block // token_blocks).to(tl.int64)
    token = (block % token_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)

    row_ptr, row, active = sample_row(step_ptr, table_ptr, sample, num_rows, table_batch, table_stride)
    g1, g2, s = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 12)
    scale = tl.where(s != 0.0, tl.load(row_ptr + 13), 0.0)

    # feature = (y p + x) C + c of a token at (row, column) is the element (c, row p + y, column p + x) of the sample
    channel, place = feature % CHANNELS, feature // CHANNELS
    inside = place < PATCH * PATCH
    height = (token // columns)[:, None] * PATCH + (place // PATCH)[None, :]
    width = (token % columns)[:, None] * PATCH + (place % PATCH)[None, :]
    element = channel[None, :].to(tl.int64) * (tokens * PATCH * PATCH) + height * (columns * PATCH) + width
    element = tl.where((token < tokens)[:, None] & inside[None, :], element, per)
    x = load(x_ptr + sample * x_stride, element, per)

    weight_row = tl.where(inside, place * OUTPUTS + channel, 0)
    count = tl.where(active, tokens, 0)
    o0, o1, o2, v = _products(
        h_ptr, weight_ptr, bias_ptr, weight_row, sample, batch, h_batch, h_token, token, count, g1, g2, scale,
        BRANCHES, CHANNELS, VARIANCE, HAS_BIAS, DIM, BLOCK_T, BLOCK_F, BLOCK_D,
    )  # fmt: skip
    m = combine(o0, o1, o2, g1, g2, BRANCHES)
    z = x  # without noise, unused
    if NOISE:
        z = step_noise(
            noise_ptr, seed_ptr, ids_ptr, sample, element, per, 0, s, row, noise_stride, seed_stride, 1, 1,
            HAS_IDS, GIVEN, True, 1,
        )  # fmt: skip
        if VARIANCE:
            z = tl.where(scale != 0.0, spread(scale, v, z), z)
    apply_row(
        row_ptr, x, m, z, history_ptr, out_ptr, x_in_ptr, sample, element, per, active, batch, register_stride,
        history_stride, out_stride, x_in_stride, REGISTERS, COPIES, NOISE,
    )  # fmt: skip


def blocks(features, dtype):
    """(tokens, features, columns) of a block: 512 or 1024 outputs of each branch, and tiles that fit 100 KiB."""
    width = min(max(16, triton.next_power_of_2(features)), 64)
    wide = width == 64
    return (16 if wide else 32), width, (32 if dtype == torch.float32 else 64 if wide else 128)


def patch_step_out(x, h, weight, bias, patch_size, table, step, history, seed, sample_ids, noise, out, x_in):
    batch, per = x.shape[0], per_sample(x)
    if per == 0:
        return
    channels, height, width = x.shape[1:]
    columns, tokens = width // patch_size, (height // patch_size) * (width // patch_size)
    features = patch_size**2 * channels
    block_t, block_f, block_d = blocks(features, h.dtype)
    token_blocks, feature_blocks = triton.cdiv(tokens, block_t), triton.cdiv(features, block_f)
    absent = lambda tensor, other: other if tensor is None else tensor  # noqa: E731
    with torch.cuda.device_of(x):
        patch_step_kernel[(batch * token_blocks * feature_blocks,)](
            x, h, weight, absent(bias, weight), table, step, absent(history, table), absent(seed, step),
            absent(sample_ids, step), absent(noise, table), out, absent(x_in, h), per, tokens, columns, token_blocks,
            feature_blocks, batch, table.shape[0], table.shape[1], 0 if table.shape[1] == 1 else 1, h.stride(0),
            h.stride(1), batch_stride(x), 0 if history is None else history.stride(0),
            0 if history is None or batch == 1 else history.stride(1),
            *(0 if tensor is None else batch_stride(tensor) for tensor in (noise, out, x_in)),
            seed.stride(0) if seed is not None and seed.dim() else 0,
            PATCH=patch_size, CHANNELS=channels, OUTPUTS=weight.shape[0] // patch_size**2, DIM=h.shape[2],
            BRANCHES=h.shape[0] // batch, REGISTERS=0 if history is None else history.shape[0],
            COPIES=0 if x_in is None else x_in.shape[0] // batch, NOISE=seed is not None or noise is not None,
            GIVEN=noise is not None, HAS_IDS=sample_ids is not None, HAS_BIAS=bias is not None, BLOCK_T=block_t,
            BLOCK_F=block_f, BLOCK_D=block_d, num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=False,
        )  # fmt: skip


def _variant(dtype, patch, noise=False, learned=False, branches=2, registers=0, channels=4, dim=1152):
    name = DTYPE_NAMES[dtype]
    kinds = dict.fromkeys(patch_step_kernel.arg_names, "i32")
    kinds.update(dict.fromkeys(("x_ptr", "table_ptr", "history_ptr", "noise_ptr", "out_ptr"), "*fp32"))
    kinds.update(dict.fromkeys(("h_ptr", "weight_ptr", "bias_ptr", "x_in_ptr"), f"*{name}"))
    kinds.update(step_ptr="*i32", seed_ptr="*i64", ids_ptr="*i64")
    block_t, block_f, block_d = blocks(patch**2 * channels, dtype)
    constexprs = {
        "PATCH": patch, "CHANNELS": channels, "OUTPUTS": (1 + learned) * channels, "DIM": dim, "BRANCHES": branches,
        "REGISTERS": registers, "COPIES": branches, "NOISE": noise, "GIVEN": False, "HAS_IDS": True, "HAS_BIAS": True,
        "BLOCK_T": block_t, "BLOCK_F": block_f, "BLOCK_D": block_d,
    }  # fmt: skip
    kinds.update(dict.fromkeys(constexprs, "constexpr"))
    return {
        "name": f"patch_step_{name}_p{patch}" + "_noise" * noise + "_learned" * learned
        + f"_{branches}b_h{registers}" * (registers > 0),
        "fn": patch_step_kernel,
        "signature": kinds,
        "constexprs": constexprs,
        "divisible": [key for key, kind in kinds.items() if kind.startswith("*")] + ["h_batch", "h_token"],
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
        "enable_fp_fusion": False,
        "streaming": False,
    }  # fmt: skip


def variants():
    """What `make inspect` compiles ahead of time: DiT's last layer, patches of 2, 4 and 8."""
    return [
        _variant(torch.bfloat16, 2), _variant(torch.bfloat16, 2, noise=True, learned=True),
        _variant(torch.bfloat16, 4), _variant(torch.bfloat16, 8, noise=True, learned=True),
        _variant(torch.bfloat16, 2, noise=True, learned=True, branches=3, registers=3),
        _variant(torch.float16, 2, noise=True), _variant(torch.float32, 2),
        _variant(torch.float32, 2, noise=True, learned=True), _variant(torch.float32, 8, noise=True, learned=True),
    ]  # fmt: skip
