// Where wgmma finds its operands in shared memory: the descriptors of ptx.h's tiles. Its own file, with nothing of the GPU but
// addresses, since the emulation of tests/emulated reads these very bits.
#pragma once
#include <stdint.h>

#include "cuda/warp.h"

namespace genengine::hopper {

GENENGINE_DEVICE uint32_t shared_address(const void* pointer);

// Where wgmma finds a matrix in a tile as ptx.h describes it. `line`: bytes of a line, 32, 64 or 128. Along its rows (Rows: the sum
// runs over columns) a product's 16 columns lie within one box: add 16 columns' bytes, or a box's, to `from` for the next ones.
// Down its columns (Columns: the sum runs over rows) a product takes 16 rows and as many boxes, `box` bytes apart, as it needs.
enum class Sums { along_rows, down_columns };

template <Sums Direction, int Line>
GENENGINE_DEVICE uint64_t matrix(const void* from, uint32_t box = 0) {
  static_assert(Line == 32 || Line == 64 || Line == 128);
  constexpr uint64_t kSwizzle = Line == 128 ? 1 : Line == 64 ? 2 : 3, kEightLines = 8 * Line;
  const uint64_t leading = Direction == Sums::along_rows ? 1 : box >> 4;  // unused along rows
  return (shared_address(from) & 0x3ffff) >> 4 | leading << 16 | (kEightLines >> 4) << 32 | kSwizzle << 62;
}

// `from` of a later step as an increment of the matrix.
GENENGINE_DEVICE uint64_t advanced(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

}  // namespace genengine::hopper
