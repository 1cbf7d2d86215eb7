// fill_normal and fill_uniform: whole blocks of 64 elements vectorised, ragged ends through a scratch block.
#include "cpu/normal_loops.h"

#include "cpu/isa/normal_block.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// Blocks start at multiples of 64 elements, so every element comes out of the same lane of the same block.
template <class Block>
inline void fill(float* z, int64_t first, int64_t count, const NoiseKey& key, Block block) {
  int64_t done = 0;
  while (done < count) {
    const int64_t position = first + done, offset = position % kBlockElements;
    if (offset == 0 && count - done >= kBlockElements) {
      const int64_t blocks = (count - done) / kBlockElements;
      block(z + done, static_cast<uint32_t>(position / 4), blocks, key);
      done += blocks * kBlockElements;
      continue;
    }
    float scratch[kBlockElements];
    block(scratch, static_cast<uint32_t>((position - offset) / 4), 1, key);
    const int64_t take = count - done < kBlockElements - offset ? count - done : kBlockElements - offset;
    for (int64_t i = 0; i < take; ++i) z[done + i] = scratch[offset + i];
    done += take;
  }
}

}  // namespace

void fill_normal(float* z, int64_t first, int64_t count, const NoiseKey& key) { fill(z, first, count, key, normal_blocks); }
void fill_uniform(float* z, int64_t first, int64_t count, const NoiseKey& key) { fill(z, first, count, key, uniform_blocks); }

}  // namespace GENENGINE_ISA
}  // namespace genengine
