// Blocks of 64 normals or uniforms (16 quads): AVX-512 intrinsics where the target has them, else plain C++ that the
// compiler vectorises. Both follow genengine/normal.h operation for operation, so their bits are equal.
#pragma once
#include "cpu/normal_loops.h"
#include "genengine/normal.h"

namespace genengine {
namespace GENENGINE_ISA {

constexpr int64_t kBlockElements = 64;

}  // namespace GENENGINE_ISA
}  // namespace genengine

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "cpu/isa/normal_avx512.h"
#else

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// First the words of 16 quads, then the maths, then the interleave: three loops, the first two over vector lanes.
template <bool Normal>
inline void plain_blocks(float* __restrict z, uint32_t quad, int64_t blocks, const NoiseKey& key) {
  for (int64_t block = 0; block < blocks; ++block) {
    float lanes[4][16];
    for (int j = 0; j < 16; ++j) {
      const Words words = philox(quad + static_cast<uint32_t>(block * 16 + j), key.sample, key.step, key.stream, key.seed);
      float v[4];
      if (Normal)
        box_muller(words, v);
      else
        for (int k = 0; k < 4; ++k) v[k] = unit(words.w[k]);
      for (int k = 0; k < 4; ++k) lanes[k][j] = v[k];
    }
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 4; ++k) z[block * 64 + 4 * j + k] = lanes[k][j];
  }
}

void normal_blocks(float* z, uint32_t quad, int64_t blocks, const NoiseKey& key) { plain_blocks<true>(z, quad, blocks, key); }
void uniform_blocks(float* z, uint32_t quad, int64_t blocks, const NoiseKey& key) { plain_blocks<false>(z, quad, blocks, key); }

}  // namespace
}  // namespace GENENGINE_ISA
}  // namespace genengine
#endif
