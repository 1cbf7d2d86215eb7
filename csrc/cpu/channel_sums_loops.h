// Parameters along one dimension, and sums over all others, for bias_act and glu. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/types.h"

namespace genengine {

// to (repeats, channels, inner) in float32 from the (channels) elements of a vector.
GENENGINE_LOOP(void, spread_channels,
               (float* to, const void* from, Type type, int64_t stride, int64_t repeats, int64_t channels, int64_t inner))
// out[c] = the sum of partial (outer, channels, inner)[:, c], in groups of 32 of the outer.
GENENGINE_LOOP(void, sum_channels,
               (void* out, Type type, const float* partial, int64_t outer, int64_t channels, int64_t inner))

}  // namespace genengine
