"""Triton kernel of ema_update: one launch for all tensors of a pair of dtypes, their addresses in a table.

Bytes per element: two reads, one write. The arithmetic is float32, without fused multiply-add.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES

BLOCK = 4096
NUM_WARPS = 4
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def ema_kernel(
    table_ptr, weight, AVERAGE: tl.constexpr, VALUE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    row = table_ptr + tl.program_id(0).to(tl.int64) * 3  # of a block: address of average, of value, elements left
    average = tl.load(row).to(tl.pointer_type(AVERAGE))
    value = tl.load(row + 1).to(tl.pointer_type(VALUE))
    left = tl.load(row + 2)
    whole = left // 16 * 16  # a mask that changes within 16 elements would split the accesses
    move(average, value, tl.arange(0, BLOCK), whole, weight, ALIGNED)
    move(average, value, whole + tl.arange(0, 16), tl.minimum(left, BLOCK), weight, False)


@triton.jit
def move(average, value, element, count, weight, ALIGNED: tl.constexpr):
    average += element
    value += element
    if ALIGNED:  # the compiler cannot know it of addresses read from memory
        average = tl.multiple_of(average, 16)
        value = tl.multiple_of(value, 16)
    inside = element < count
    a = tl.load(average, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(value, mask=inside, other=0.0).to(tl.float32)
    tl.store(average, (a + weight * (v - a)).to(average.dtype.element_ty), mask=inside)


def ema_update(averages, values, weight):
    groups = {}
    for average, value in zip(averages, values, strict=True):
        if average.numel():
            pair = (average.data_ptr(), value.data_ptr(), average.numel())
            groups.setdefault((average.dtype, value.dtype), []).append(pair)
    for (average, value), pairs in groups.items():
        sizes = (average.itemsize, value.itemsize)
        with torch.cuda.device_of(averages[0]):
            table = _table(tuple(pairs), sizes, averages[0].device)
            aligned = all(a % 16 == 0 and v % 16 == 0 for a, v, _ in pairs)
            ema_kernel[(table.shape[0],)](
                table, weight, AVERAGE=_TYPES[average], VALUE=_TYPES[value], ALIGNED=aligned, BLOCK=BLOCK,
                num_warps=NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip


@lru_cache(maxsize=16)
def _table(pairs, sizes, device):
    """A row for each block; kept, for a model's weights stay where they are."""
    rows = [
        (average + first * sizes[0], value + first * sizes[1], count - first)
        for average, value, count in pairs
        for first in range(0, count, BLOCK)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def variants():
    """What `make inspect` compiles ahead of time."""
    return [
        {
            "name": f"ema_update_{DTYPE_NAMES[average]}_{DTYPE_NAMES[value]}",
            "fn": ema_kernel,
            "signature": {
                "table_ptr": "*i64", "weight": "fp32", "AVERAGE": "constexpr", "VALUE": "constexpr",
                "ALIGNED": "constexpr", "BLOCK": "constexpr",
            },
            "constexprs": {"AVERAGE": _TYPES[average], "VALUE": _TYPES[value], "ALIGNED": True, "BLOCK": BLOCK},
            "divisible": ["table_ptr"],
            "elements": BLOCK,
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": False,
        }
        for average, value in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16))
    ]  # fmt: skip
