// The scalar formulas of bias_act and its first and second backward, for host and device.
//
//   forward     y = clamp(z, -clamp, clamp),  z = gain act(u),  u = x + bias[channel]
//   backward    dx = grad s(u),  s(u) = gain act'(u) where |z| < clamp, else 0;   dbias = sum(dx)
//   its own     with v = grad_dx + grad_dbias[channel]:   d_grad = v s(u),   d_x = v grad s'(u),   d_bias = sum(d_x)
//
// Per element, e bytes each: forward moves 2 e, backward 3 e, its own backward 5 e (3 e where act'' = 0). FLOPs: those of
// activations.h and 2, 3 and 6. All arithmetic and all sums are float32, sums over samples and pixels in a fixed order
// without atomics. No clamp is a NaN: no comparison with it holds.
#pragma once
#include "genengine/activations.h"

namespace genengine {

struct BiasActOptions {
  float alpha, gain, clamp;
};

template <Activation A, bool Rounded>
GENENGINE_HD float bias_act_value(float u, const BiasActOptions& o) {
  const float z = o.gain * activate<A, Rounded>(u, o.alpha), below = o.clamp < z ? o.clamp : z;
  return -o.clamp > below ? -o.clamp : below;
}

// factor where the clamp passes, 0 where it does not
template <Activation A>
GENENGINE_HD float bias_act_passed(float factor, float u, const BiasActOptions& o) {
  return absolute(o.gain * activate<A>(u, o.alpha)) >= o.clamp ? 0.f : factor;
}

template <Activation A, bool Clamped>
GENENGINE_HD float bias_act_slope(float u, const BiasActOptions& o) {
  const float slope = o.gain * activate_slope<A>(u, o.alpha);
  return Clamped ? bias_act_passed<A>(slope, u, o) : slope;
}

template <Activation A, bool Clamped>
GENENGINE_HD float bias_act_curvature(float u, const BiasActOptions& o) {
  const float curvature = o.gain * activate_curvature<A>(u, o.alpha);
  return Clamped ? bias_act_passed<A>(curvature, u, o) : curvature;
}

}  // namespace genengine
