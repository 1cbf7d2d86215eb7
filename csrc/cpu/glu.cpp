// glu and its backward on the CPU: rows over threads; the bias gradient in chunks of fixed size, so that no bit depends on
// the number of threads.
#include "cpu/glu_loops.h"

#include "cpu/channel_sums.h"

namespace genengine {
namespace {

constexpr int64_t kStreamBytes = int64_t{24} << 20;  // outputs beyond this are written past the caches, as adaln's

// Rows are read through their strides; only an innermost stride other than 1 costs a copy.
Tensor unit_rows(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t); }

GluView view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Activation gate_of(const char* op, const std::string& name) {
  const Activation activation = activation_of(op, name);
  STD_TORCH_CHECK(activation == Activation::gelu || activation == Activation::gelu_tanh || activation == Activation::silu, op,
                  ": activation must be gelu, gelu_tanh or silu, got ", name);
  return activation;
}

// All but the views and the output.
Glu prepare(const char* name, const Tensor& x, const OptionalTensor& bias, const std::string& activation, bool gate_first) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, name, ": x must be (B, N, 2 D)");
  require_bias(name, "bias", bias, x, x.size(2));
  Glu op{};
  op.tokens = x.size(1);
  op.rows = x.size(0) * op.tokens;
  op.dim = x.size(2) / 2;
  op.gate = gate_first ? 0 : op.dim;
  op.value = op.dim - op.gate;
  op.type = type_of(name, "x", x);
  op.activation = gate_of(name, activation);
  return op;
}

Tensor glu(const Tensor& x_in, const OptionalTensor& bias, std::string activation, bool gate_first) {
  Glu op = prepare("glu", x_in, bias, activation, gate_first);
  Tensor y = torch::stable::new_empty(x_in, {x_in.size(0), x_in.size(1), op.dim});
  if (y.numel() == 0) return y;
  const Tensor x = unit_rows(x_in), biases = spread(bias, x, 1, 2 * op.dim, 1);
  op.x = view(x);
  op.bias = biases.const_data_ptr<float>();
  op.out = y.mutable_data_ptr();
  op.stream = y.numel() * static_cast<int64_t>(y.element_size()) > kStreamBytes;
  const auto loop = GENENGINE_PICK(glu_forward);
  torch::stable::parallel_for(0, op.rows, kGrain / op.dim + 1, [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias,
                                        std::string activation, bool gate_first) {
  const char* name = "glu_backward";
  Glu op = prepare(name, x_in, bias, activation, gate_first);
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == x_in.size(0) && grad_in.size(1) == x_in.size(1) &&
                      grad_in.size(2) == op.dim && grad_in.scalar_type() == x_in.scalar_type(),
                  name, ": grad must be (B, N, D) in x's dtype");
  Tensor dx = torch::stable::new_empty(x_in, {x_in.size(0), x_in.size(1), x_in.size(2)});
  if (dx.numel() == 0)
    return {dx, bias ? torch::stable::new_zeros(*bias, {bias->size(0)}) : torch::stable::new_empty(x_in, {0})};
  const Tensor x = unit_rows(x_in), grad = unit_rows(grad_in), biases = spread(bias, x, 1, 2 * op.dim, 1);
  const int64_t chunks = (op.rows + kGluChunk - 1) / kGluChunk;
  const Tensor partial = bias ? torch::stable::new_empty(x, {chunks * 2 * op.dim}, ScalarType::Float) : biases;
  op.x = view(x);
  op.grad = view(grad);
  op.bias = biases.const_data_ptr<float>();
  op.out = dx.mutable_data_ptr();
  op.partial = bias ? partial.mutable_data_ptr<float>() : nullptr;
  op.stream = dx.numel() * static_cast<int64_t>(dx.element_size()) > kStreamBytes;
  const auto loop = GENENGINE_PICK(glu_backward);
  const int64_t grain = kGrain / (kGluChunk * op.dim) + 1;
  torch::stable::parallel_for(0, chunks, grain, [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
  return {dx, bias ? channel_sums(*bias, partial, chunks, 2 * op.dim, 1) : torch::stable::new_empty(x, {0})};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("glu", TORCH_BOX(&genengine::glu));
  m.impl("glu_backward", TORCH_BOX(&genengine::glu_backward));
}
