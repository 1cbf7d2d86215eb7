// A row of elements of any dtype in groups of sixteen, the last one short: reading, writing, streaming and summing them.
// Sums run over 64 lanes and then a fixed tree, so a row has the same bits wherever it stands.
#pragma once
#include "cpu/isa/span.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

constexpr int kSums = 4;  // independent accumulators, to hide the latency of an addition

// Zeros beyond the row's end.
GENENGINE_INLINE Lanes clip(Lanes lanes, Whole) { return lanes; }
GENENGINE_RARE Lanes clip(Lanes lanes, Part part) {
  float v[kLanes];
  store(v, lanes);
  for (int64_t i = part.count; i < kLanes; ++i) v[i] = 0.f;
  return load(v);
}

template <class T>
GENENGINE_INLINE Lanes rounded(Lanes lanes) {
  T stored[kLanes];
  store(stored, lanes);
  return load(stored);
}
template <>
GENENGINE_INLINE Lanes rounded<float>(Lanes lanes) {
  return lanes;
}

struct Sum {
  Lanes lanes[kSums] = {zero_lanes(), zero_lanes(), zero_lanes(), zero_lanes()};
  GENENGINE_INLINE void add(int k, Lanes v) { lanes[k] = lanes[k] + v; }
  GENENGINE_INLINE float total() const { return sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }
};

// body(i, k, span) for the elements i.. of a row; k is the accumulator to use.
template <class Body>
GENENGINE_INLINE void each(int64_t dim, Body body) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= dim; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) body(i + k * kLanes, k, Whole{});
  }
  for (; i + kLanes <= dim; i += kLanes) body(i, 0, Whole{});
  if (i < dim) body(i, 1, Part{tail(dim)});
}
#define GENENGINE_BODY [&](int64_t i, [[maybe_unused]] int k, auto span) GENENGINE_ALWAYS_INLINE

// Streaming stores need every group of sixteen elements aligned to itself.
template <class T>
GENENGINE_INLINE bool streamable(const T* out, int64_t dim) {
  return dim % kLanes == 0 && reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0;
}

}  // namespace
}  // namespace GENENGINE_ISA
}  // namespace genengine
