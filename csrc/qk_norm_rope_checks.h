// What the CPU and CUDA sides of qk_norm_rope check alike, in the same words.
#pragma once
#include <array>

#include "elementwise_checks.h"
#include "genengine/qk_norm_rope.h"

namespace genengine {

constexpr const char* kQkOp = "qk_norm_rope";

struct QkShape {
  int64_t batch, tokens, heads, dim;
  bool empty() const { return batch == 0 || tokens == 0 || heads == 0 || dim == 0; }
  std::array<int64_t, 5> sizes() const { return {batch, tokens, 3, heads, dim}; }
};

struct QkOptions {
  const OptionalTensor &q_weight, &k_weight, &cos, &sin;
  double eps;
  bool norm, interleaved;
};

inline QkShape qk_shape(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, kQkOp, ": qkv must be (B, N, 3, H, D)");
  STD_TORCH_CHECK(qkv.size(4) <= kQkMaxDim, kQkOp, ": D must be at most ", kQkMaxDim, ", got ", qkv.size(4));
  return {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
}

// Rows are read through their strides; only an innermost stride other than 1 costs a copy.
inline bool has_unit_rows(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }
inline Tensor unit_rows(const Tensor& t) { return has_unit_rows(t) ? t : torch::stable::contiguous(t); }
inline OptionalTensor unit_rows(const OptionalTensor& t) { return t ? OptionalTensor(unit_rows(*t)) : t; }

inline void require_writable_rows(const Tensor& qkv) {
  STD_TORCH_CHECK(has_unit_rows(qkv), kQkOp, ": qkv must have an innermost stride of 1 to be written in place");
}

inline void check_qk_weight(const char* name, const Tensor& weight, const QkShape& shape, const Tensor& qkv, const Tensor& first) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == shape.dim, kQkOp, ": ", name, " must be (D,) = (", shape.dim, ",)");
  const bool fits = weight.scalar_type() == qkv.scalar_type() || weight.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(fits && weight.scalar_type() == first.scalar_type(), kQkOp, ": ", name, " must have qkv's dtype or float32");
}

inline void check_qk_table(const char* name, const Tensor& table, const QkShape& shape, const Tensor& cos) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float, kQkOp, ": ", name, " must be float32");
  const bool fits = table.dim() == 3 && (table.size(0) == 1 || table.size(0) == shape.batch) && table.size(1) == shape.tokens &&
                    2 * table.size(2) <= shape.dim && table.size(2) == cos.size(2) && table.size(2) > 0;
  STD_TORCH_CHECK(fits, kQkOp, ": ", name, " must be (1 or B, N, R/2) with 2 <= R <= D");
}

inline void check_qk_options(const QkShape& shape, const Tensor& qkv, const QkOptions& given) {
  STD_TORCH_CHECK(given.q_weight.has_value() == given.k_weight.has_value(), kQkOp, ": q_weight and k_weight go together");
  STD_TORCH_CHECK(given.cos.has_value() == given.sin.has_value(), kQkOp, ": cos and sin go together");
  STD_TORCH_CHECK(given.norm || !given.q_weight, kQkOp, ": weights need norm=True");
  if (given.q_weight) {
    check_qk_weight("q_weight", *given.q_weight, shape, qkv, *given.q_weight);
    check_qk_weight("k_weight", *given.k_weight, shape, qkv, *given.q_weight);
  }
  if (given.cos) {
    check_qk_table("cos", *given.cos, shape, *given.cos);
    check_qk_table("sin", *given.sin, shape, *given.cos);
  }
}

inline void check_qk_grad(const QkShape& shape, const Tensor& grad, const Tensor& qkv) {
  const QkShape got = qk_shape(grad);
  STD_TORCH_CHECK(got.sizes() == shape.sizes() && grad.scalar_type() == qkv.scalar_type(), kQkOp,
                  "_backward: grad must have qkv's shape and dtype");
}

}  // namespace genengine
