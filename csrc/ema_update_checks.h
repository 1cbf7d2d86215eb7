// What the CPU and CUDA sides of ema_update check alike.
#pragma once
#include "elementwise_checks.h"

namespace genengine {

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) != 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

// A pair as two flat arrays: dense in the same order.
inline void check_ema_pair(const Tensor& average, const Tensor& value) {
  if (average.numel() == 0 && value.numel() == 0) return;
  const bool flat = average.dim() == value.dim() && same_strides(average, value);
  int64_t span = 1;
  for (int64_t d = 0; flat && d < average.dim(); ++d) span += (average.size(d) - 1) * average.stride(d);
  STD_TORCH_CHECK(flat && span == average.numel(),
                  "ema_update: averages and values must be dense, pair by pair in the same order");
}

inline void check_ema_lists(TensorList averages, TensorList values) {
  STD_TORCH_CHECK(averages.size() == values.size(), "ema_update: values must be as many as averages, ", averages.size(), ", got ",
                  values.size());
}

}  // namespace genengine
