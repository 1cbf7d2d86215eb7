// What the attention kernels share: how rows of D columns are cut into boxes, and rings of buffers between producer and consumers.
#pragma once
#include "cuda/hopper/ptx.h"

namespace genengine::hopper {

// The boxes of a tile of D columns: as wide as divides D, so that a product of exactly D columns finds them in equal boxes.
template <int Dim>
struct Boxes {
  static constexpr int kColumns = Dim % 64 == 0 ? 64 : Dim % 32 == 0 ? 32 : 16;  // 72 as 5 x 16, the last half empty
  static constexpr int kCount = (Dim + kColumns - 1) / kColumns, kDepth = kCount * kColumns, kLine = 2 * kColumns;
};

// The byte of a box at which a row's eight columns from `column` on, a multiple of 8, begin: swizzled as in ptx.h.
template <int Line>
GENENGINE_DEVICE int swizzled(int row, int column) {
  const int at = row * Line + column * 2;
  return at ^ (at >> 7 & (Line / 16 - 1)) << 4;
}

// A place in a ring of Stages buffers, and the parity of the phase in which it is there.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  GENENGINE_DEVICE void advance() {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <int Stages>
struct Buffers {
  char* data;
  Barrier *full, *empty;

  GENENGINE_DEVICE void init(int releases) const {
    for (int i = 0; i < Stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, releases);
    }
  }
};

}  // namespace genengine::hopper
