// The loop of guidance_moments. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/types.h"

namespace genengine {

// sums[0..5] of the elements [first, first + count) of one sample's branches.
GENENGINE_LOOP(void, guidance_moments_range,
               (const void* u, const void* c, Type type, int64_t first, int64_t count, double* sums))

}  // namespace genengine
