// The loops of reparameterize. No torch, no STL.
#pragma once
#include "cpu/elementwise_loops.h"
#include "genengine/reparameterize.h"

namespace genengine {

// One sample; element 0 of every pointer is the sample's first.
struct ReparameterizeSample {
  const void *mean, *logvar, *grad_z;
  void *z, *dmean, *dlogvar;
  NoiseSource noise;
  float grad_kl, free_bits;
  Kl kl;
  Type type;
  bool stream;
};

// Writes z and returns the KL of the elements [first, first + count).
GENENGINE_LOOP(float, reparameterize_range, (const ReparameterizeSample& sample, int64_t first, int64_t count))
// Writes dmean and dlogvar; returns 0.
GENENGINE_LOOP(float, reparameterize_backward_range, (const ReparameterizeSample& sample, int64_t first, int64_t count))

}  // namespace genengine
