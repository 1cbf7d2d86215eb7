// The loop of ema_update. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/types.h"

namespace genengine {

GENENGINE_LOOP(void, ema_range, (void* average, Type average_type, const void* value, Type value_type, float weight, int64_t count))

}  // namespace genengine
