// The scalar formulas of qk_norm_rope, forward and backward, for host and device. V is float, or on the CPU sixteen.
//
//   forward    y = x r weight,  r = 1 / sqrt(mean(x^2) + eps);  (a, b) <- (a cos - b sin, b cos + a sin) of every pair of y
//   backward   g = grad rotated back;  t = g weight;  dx = r t - x r^3 mean(t x);  dweight = sum(g x r)
//
// An element and its partner in the pair: y cos + partner sin', with sin' = -sin for the first of the pair, sin for the
// second; rotated back with -sin'. Per element of q and k, e bytes each: forward moves 2 e (v too, unless in place), 7
// FLOPs; backward 3 e, 16 FLOPs. Type may be 16-bit; all arithmetic and all sums are float32. The sums over tokens and
// heads run in a fixed order, without atomics.
#pragma once
#include "genengine/functions.h"

namespace genengine {

constexpr int64_t kQkMaxDim = 256;

GENENGINE_HD float rms_rstd(float sum_of_squares, int64_t dim, float eps) {
  const float mean_square = sum_of_squares / static_cast<float>(dim) + eps;
#if defined(__CUDA_ARCH__)
  return 1.f / __fsqrt_rn(mean_square);
#else
  return 1.f / __builtin_sqrtf(mean_square);
#endif
}

template <class V>
GENENGINE_HD V rotate(V y, V partner, V cos, V signed_sin) {
  return multiply_add(partner, signed_sin, y * cos);
}

// The factor of x in dx; dot = sum(t x).
GENENGINE_HD float rms_dx_factor(float dot, int64_t dim, float rstd) {
  return -(dot * rstd / static_cast<float>(dim)) * rstd * rstd;
}

template <class V>
GENENGINE_HD V rms_dx(V t, V x, V rstd, V factor) {
  return multiply_add(x, factor, rstd * t);
}

}  // namespace genengine
