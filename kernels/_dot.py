"""Products of blocks, summed in float32."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # it would multiply the bits of bfloat16 as integers


@triton.jit
def dot(a, b, sums):
    """sums + a b; float32 is multiplied as float32 (no TF32)."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, input_precision="ieee")
