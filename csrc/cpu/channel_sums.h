// Vectors along the channels as float32 rows, on the torch-facing CPU side.
#pragma once
#include "activation_checks.h"
#include "cpu/channel_sums_loops.h"

namespace genengine {

// (repeats, channels, inner) float32: the vector spread, or zeros.
inline Tensor spread(const OptionalTensor& vector, const Tensor& like, int64_t repeats, int64_t channels, int64_t inner) {
  if (!vector) return torch::stable::new_zeros(like, {repeats * channels * inner}, ScalarType::Float);
  Tensor row = torch::stable::new_empty(like, {repeats * channels * inner}, ScalarType::Float);
  GENENGINE_PICK(spread_channels)(row.mutable_data_ptr<float>(), vector->const_data_ptr(), type_of("bias", "bias", *vector),
                                  vector->stride(0), repeats, channels, inner);
  return row;
}

// partial (outer, channels, inner) float32 -> sums (channels) like the vector.
inline Tensor channel_sums(const Tensor& vector, const Tensor& partial, int64_t outer, int64_t channels, int64_t inner) {
  Tensor sums = torch::stable::new_empty(vector, {channels});
  GENENGINE_PICK(sum_channels)(sums.mutable_data_ptr(), type_of("bias", "bias", vector), partial.const_data_ptr<float>(), outer,
                               channels, inner);
  return sums;
}

}  // namespace genengine
