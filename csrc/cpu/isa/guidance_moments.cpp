// guidance_moments over a range of one sample: sixteen lanes of float32 over a tile, tiles in double.
#include "cpu/guidance_moments_loops.h"

#include "genengine/guidance_moments.h"

#include "cpu/isa/lanes_math.h"
#include "cpu/isa/row.h"
#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

template <class T>
void moments(const T* u, const T* c, int64_t count, double* sums) {
  for (int j = 0; j < kMoments; ++j) sums[j] = 0.0;
  for (int64_t first = 0; first < count; first += kTile) {
    const int64_t n = count - first < kTile ? count - first : kTile;
    Lanes tile[kMoments];
    for (Lanes& lanes : tile) lanes = zero_lanes();
    each_span(n, [&](int64_t i, auto span) GENENGINE_ALWAYS_INLINE {
      add_moments(read(u + first + i, span), read(c + first + i, span), tile);  // beyond the end both are 0
    });
    for (int j = 0; j < kMoments; ++j) sums[j] += static_cast<double>(sum(tile[j]));
  }
}

template <class T>
void moments(const void* u, const void* c, int64_t first, int64_t count, double* sums) {
  moments(static_cast<const T*>(u) + first, static_cast<const T*>(c) + first, count, sums);
}

}  // namespace

void guidance_moments_range(const void* u, const void* c, Type type, int64_t first, int64_t count, double* sums) {
  switch (type) {
    case Type::f32: return moments<float>(u, c, first, count, sums);
    case Type::f16: return moments<Half>(u, c, first, count, sums);
    default: return moments<BFloat>(u, c, first, count, sums);
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
