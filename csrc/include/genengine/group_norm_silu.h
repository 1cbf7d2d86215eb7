// The scalar formulas of group_norm_silu, forward and backward, for host and device.
//
//   forward    v = (x^ weight + bias) (1 + scale) + shift = (x - mean) gain + offset,  x^ = (x - mean) rstd;  y = silu(v)
//   backward   dv = grad silu'(v);  per sample and channel P = sum(dv), Q = sum(dv x^);  k = weight (1 + scale)
//              dx = rstd (k dv - mean(k dv) - x^ mean(k dv x^)), means over the group: of k P and k Q
//              dweight = sum(Q (1 + scale)), dbias = sum(P (1 + scale)) over samples;  dscale = weight Q + bias P, dshift = P
//
// Per element, e bytes each: forward 2 e where the group is read once, else 3 e, and 9 FLOPs, an exponential, a division;
// backward 5 e (x and grad twice), 30 FLOPs, two exponentials, two divisions. All arithmetic float32; every sum over a
// group is of deviations from a value of the group or its mean, in a fixed order, without atomics.
#pragma once
#include "genengine/functions.h"

namespace genengine {

struct GroupNormFold {
  float gain, offset;  // v = (x - mean) gain + offset
};

// beyond: what the mean held beyond its float32 value.
GENENGINE_HD GroupNormFold group_norm_fold_channel(float rstd, float weight, float bias, float scale, float shift,
                                                   float beyond = 0.f) {
  const float k = rstd * weight;
  return {k * (1.f + scale), multiply_add(multiply_add(-beyond, k, bias), 1.f + scale, shift)};
}

GENENGINE_HD float group_norm_v(float x, float mean, const GroupNormFold& fold) {
  return multiply_add(x - mean, fold.gain, fold.offset);
}

// On the device two roundings instead of a division's subroutine, whose calls spill.
GENENGINE_HD float fast_sigmoid(float v) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.f, 1.f + exponential(-v));
#else
  return sigmoid(v);
#endif
}

GENENGINE_HD float silu(float v) { return v * fast_sigmoid(v); }

// d silu(v) / dv
GENENGINE_HD float silu_slope(float v) {
  const float s = fast_sigmoid(v);
  return s * multiply_add(v, 1.f - s, 1.f);
}

}  // namespace genengine
