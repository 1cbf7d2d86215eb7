// The sums that guidance methods need of a sample's two branches, for host and device. V is float, or on the CPU sixteen.
//
//   sum of u, c, u^2, u c, c^2, (c - u)^2
//
// Bytes per element, e each: reads 2 e. About 11 FLOPs. Accumulates in float32 over short runs of fixed length, and the runs
// in a fixed order: a sample has the same bits in any batch.
#pragma once
#include "genengine/functions.h"

namespace genengine {

constexpr int kMoments = 6;

template <class V>
GENENGINE_HD void add_moments(V u, V c, V (&sums)[kMoments]) {
  const V d = c - u;
  sums[0] = sums[0] + u;
  sums[1] = sums[1] + c;
  sums[2] = multiply_add(u, u, sums[2]);
  sums[3] = multiply_add(u, c, sums[3]);
  sums[4] = multiply_add(c, c, sums[4]);
  sums[5] = multiply_add(d, d, sums[5]);
}

}  // namespace genengine
