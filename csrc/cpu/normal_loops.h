// The loops behind normal and uniform, and behind every op that draws noise. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace genengine {

// The key and counter of one sample's stream, all but the quad.
struct NoiseKey {
  uint64_t seed;
  uint32_t sample, step, stream;
};

// z[0, count) = elements first, first+1, ... of the sample; any first, any count.
GENENGINE_LOOP(void, fill_normal, (float* z, int64_t first, int64_t count, const NoiseKey& key))
GENENGINE_LOOP(void, fill_uniform, (float* z, int64_t first, int64_t count, const NoiseKey& key))

}  // namespace genengine
