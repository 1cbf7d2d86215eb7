// What the CPU and CUDA sides of bias_act and glu check alike: names of activations, shapes, dtypes; and the same words.
#pragma once
#include <string>

#include "elementwise_checks.h"
#include "genengine/activations.h"

namespace genengine {

inline Activation activation_of(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"linear", "relu", "lrelu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid"};
  for (int i = 0; i < 8; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, op, ": unknown activation ", name);
  return Activation::linear;
}

inline void require_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = tensor.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and dtype of x");
}

inline void require_bias(const char* op, const char* name, const OptionalTensor& bias, const Tensor& x, int64_t channels) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, op, ": ", name, " must be (", channels, ",)");
  STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() || bias->scalar_type() == ScalarType::Float, op, ": ", name,
                  " must have x's dtype or float32");
}

}  // namespace genengine
