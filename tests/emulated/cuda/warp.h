// Stands in for csrc/cuda/warp.h where there is no GPU: the threads of a block are fibers (fibers.h).
#pragma once
#include <stdint.h>
#include <string.h>

#include "cuda/fibers.h"

#define GENENGINE_DEVICE inline

namespace genengine {

struct Bf16 {
  uint16_t bits;
};
struct alignas(8) TwoWords {
  uint32_t word[2];
};
struct alignas(8) TwoFloats {
  float value[2];
};
struct alignas(16) FourFloats {
  float value[4];
};

inline int thread_index() { return Fibers::instance().thread(); }
inline void block_barrier() { Fibers::instance().barrier(); }

// ---- what lanes exchange -------------------------------------------------------------------------------------------------

template <class T>
T shuffle_from(T value, int from) {
  return Fibers::instance().exchange(value, [=](auto of) { return of(from); });
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle_from(value, thread_index() % kWarpThreads ^ mask);
}
inline double shuffle_up(double value, int by) {
  const int lane = thread_index() % kWarpThreads;
  return shuffle_from(value, lane < by ? lane : lane - by);
}

inline float from_bf16(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
inline Bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// mma.sync.m16n8k16 as the PTX manual lays out its fragments: with g = lane / 4 and t = lane % 4, of a (16 x 16) the words hold
// rows g, g + 8, g, g + 8 at k = 2 t (first two) and 2 t + 8 (last two); of b (16 x 8) column g at k = 2 t and 2 t + 8; of the
// sums (16 x 8) rows g, g, g + 8, g + 8 at columns 2 t, 2 t + 1, 2 t, 2 t + 1.
inline void multiply_tiles(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  struct Sums {
    float value[4];
  };
  const Fragments mine = {{a[0], a[1], a[2], a[3]}, {b_low, b_high}};
  const auto half = [](uint32_t word, int k) { return from_bf16({static_cast<uint16_t>(k % 2 ? word >> 16 : word)}); };
  const Sums found = Fibers::instance().exchange(mine, [&](auto of) {
    const int lane = thread_index() % kWarpThreads;
    Sums sums;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      float total = 0;
      for (int k = 0; k < 16; ++k) {
        const Fragments left = of(row % 8 * 4 + k % 8 / 2), right = of(column * 4 + k % 8 / 2);
        total += half(left.a[row / 8 + k / 8 * 2], k) * half(right.b[k / 8], k);
      }
      sums.value[i] = sum[i] + total;
    }
    return sums;
  });
  memcpy(sum, found.value, sizeof(found.value));
}

inline float quotient(float a, float b) { return a / b; }

inline TwoWords read_only(const TwoWords* from) { return *from; }
inline FourFloats read_only(const FourFloats* from) { return *from; }

}  // namespace genengine
