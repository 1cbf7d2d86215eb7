// What the threads of a block do together, and bfloat16 as its bits: all that the team of pixelcnn_sample asks of a GPU beside
// arithmetic. tests/emulated/cuda/warp.h stands in for it where there is none.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define GENENGINE_DEVICE __device__ __forceinline__

namespace genengine {

constexpr int kWarpThreads = 32;

struct Bf16 {
  uint16_t bits;
};
struct alignas(8) TwoWords {
  uint32_t word[2];
};
struct alignas(16) FourFloats {
  float value[4];
};

GENENGINE_DEVICE Bf16 to_bf16(float value) { return {__bfloat16_as_ushort(__float2bfloat16_rn(value))}; }
GENENGINE_DEVICE float from_bf16(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// Weights: by the cache that need not see what the kernel writes.
GENENGINE_DEVICE TwoWords read_only(const TwoWords* from) {
  const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from));
  return {{raw.x, raw.y}};
}
GENENGINE_DEVICE FourFloats read_only(const FourFloats* from) {
  const float4 raw = __ldg(reinterpret_cast<const float4*>(from));
  return {{raw.x, raw.y, raw.z, raw.w}};
}

GENENGINE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GENENGINE_DEVICE void block_barrier() { __syncthreads(); }

// Of the lane whose number differs by the bits of `mask`, of the lane `by` below (its own if there is none), of lane `from`.
GENENGINE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
GENENGINE_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
GENENGINE_DEVICE double shuffle_up(double value, int by) { return __shfl_up_sync(0xffffffffu, value, by); }
GENENGINE_DEVICE double shuffle_from(double value, int from) { return __shfl_sync(0xffffffffu, value, from); }

// sum (16 x 8) += a (16 x 16) b (16 x 8), bfloat16 in pairs of k: mma.sync.m16n8k16.
GENENGINE_DEVICE void multiply_tiles(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

}  // namespace genengine
