// The scalar formulas of adaln and gated_adaln, forward and backward, for host and device. V is float, or on the CPU a
// vector of them.
//
//   forward    h = x^ (1 + scale) + shift,  x^ = (x - mean) rstd;  gated: first x' = x + gate branch, rounded, for x
//   backward   g = grad_h (1 + scale);  dx = rstd (g - mean(g) - x^ mean(g x^));  dscale = sum(grad_h x^), dshift = sum(grad_h)
//              gated: d = grad_x + dx;  dbranch = gate d,  dgate = sum(branch d)
//
// Per element, e bytes each: forward moves 2 e (gated 4 e), 8 FLOPs (gated 10); backward 3 e (gated 6 e), 20 FLOPs (gated 24).
// Type may be 16-bit; all arithmetic and all sums are float32. Two passes over the row on chip, mean first, then the
// centred squares: E[x^2] - mean^2 would cancel. Sums over tokens run in a fixed order, without atomics.
#pragma once
#include "genengine/hd.h"

namespace genengine {

constexpr int64_t kAdalnMaxDim = 8192;

template <class V>
GENENGINE_HD V adaln_gate(V x, V gate, V branch) {
  return x + gate * branch;
}

GENENGINE_HD float adaln_rstd(float sum_of_squares, int64_t dim, float eps) {
  const float variance = sum_of_squares / static_cast<float>(dim) + eps;
#if defined(__CUDA_ARCH__)
  return 1.f / __fsqrt_rn(variance);
#else
  return 1.f / __builtin_sqrtf(variance);
#endif
}

template <class V>
GENENGINE_HD V adaln_normalise(V x, float mean, float rstd) {
  return (x - mean) * rstd;
}

// gain = 1 + scale
template <class V>
GENENGINE_HD V adaln_modulate(V x_hat, V gain, V shift) {
  return x_hat * gain + shift;
}

template <class V>
GENENGINE_HD V adaln_dx(V g, V x_hat, float rstd, float mean_g, float mean_gx) {
  return (g - mean_g - x_hat * mean_gx) * rstd;
}

}  // namespace genengine
