"""The second stage of sums over all dimensions but the channels', for bias_act and glu: a fixed order, no atomics."""

import torch
import triton
import triton.language as tl

COLUMNS = 128
GROUP = 32  # partial sums added before they join the total: the error grows with its size alone


@triton.jit(do_not_specialize=["outer", "channels", "inner"])
def channel_sums_kernel(partial_ptr, out_ptr, outer, channels, inner, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """out (C) = the sum of partial (outer, C, inner), terms in the order of memory, in groups."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    total = tl.zeros([COLUMNS], tl.float32)
    terms = outer * inner
    for first in range(0, terms, GROUP):
        some = tl.zeros([COLUMNS], tl.float32)
        for term in range(first, tl.minimum(first + GROUP, terms)):
            at = ((term // inner).to(tl.int64) * channels + column) * inner + term % inner
            some += tl.load(partial_ptr + at, mask=inside, other=0.0)
        total += some
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def channel_sums(like, partial, outer, inner):
    """The sums of partial (outer, C, inner) as a tensor like the (C) vector."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    channels = out.shape[0]
    with torch.cuda.device_of(like):
        channel_sums_kernel[(triton.cdiv(channels, COLUMNS),)](
            partial, out, outer, channels, inner,
            GROUP=GROUP, COLUMNS=COLUMNS, num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def channel_sums_variant(name, kind):
    types = {"partial_ptr": "*fp32", "out_ptr": f"*{kind}", "outer": "i32", "channels": "i32", "inner": "i32"}
    return {
        "name": name,
        "fn": channel_sums_kernel,
        "signature": {key: types.get(key, "constexpr") for key in channel_sums_kernel.arg_names},
        "constexprs": {"GROUP": GROUP, "COLUMNS": COLUMNS},
        "divisible": ["partial_ptr", "out_ptr"],
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
        "streaming": False,
    }
