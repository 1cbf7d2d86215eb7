// average <- average + weight (value - average), weight = 1 - decay. Per element: two reads and a write, 3 FLOPs in float32,
// rounded one by one (no fused multiply-add): every backend has the same bits.
#pragma once
#include "genengine/hd.h"

namespace genengine {

template <class V>
GENENGINE_HD V ema(V average, V value, float weight) {
  return average + weight * (value - average);
}

}  // namespace genengine
