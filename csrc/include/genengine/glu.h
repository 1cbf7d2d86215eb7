// The scalar formulas of glu, forward and backward, for host and device; act is gelu, gelu_tanh or silu.
//
//   forward     y = act(gate) value
//   backward    d_gate = grad value act'(gate),   d_value = grad act(gate)
//
// Per output element, e bytes each: forward moves 3 e, backward 5 e. FLOPs: those of activations.h and 1 or 3. Arithmetic
// and the sums of a bias's gradient are float32, the sums over rows in a fixed order without atomics.
#pragma once
#include "genengine/activations.h"

namespace genengine {

template <Activation A, bool Rounded>
GENENGINE_HD float glu_value(float gate, float value) {
  return activate<A, Rounded>(gate, 0.f) * value;
}

template <Activation A>
GENENGINE_HD float glu_gate_slope(float gate, float value) {
  return activate_slope<A>(gate, 0.f) * value;
}

}  // namespace genengine
