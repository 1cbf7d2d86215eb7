// bias_act and its backwards on the CPU: x (outer, channels, inner) as dense rows with one bias each or, where those would
// be short, as longer rows that share a row of biases. Tasks depend on the shape alone, so no bit depends on the threads.
#include "cpu/bias_act_loops.h"

#include <limits>

#include "cpu/channel_sums.h"

namespace genengine {
namespace {

constexpr int64_t kShortRow = 256, kLongRow = 1024;
constexpr int64_t kStreamBytes = int64_t{24} << 20;  // outputs beyond this are written past the caches, as adaln's

struct Layout3 {
  int64_t outer, channels, inner, repeats = 1;
  BiasedRows rows{};

  Layout3(const Tensor& x, bool biased) : outer(x.size(0)), channels(x.size(1)), inner(x.size(2)) {
    rows.elements = x.numel();
    if (rows.elements == 0) return;
    if (!biased) {
      rows.length = rows.elements;
      rows.channels = 1;
    } else if (inner >= kShortRow) {
      rows.length = inner;
      rows.channels = channels;
    } else {
      const int64_t period = channels * inner;
      repeats = period < kLongRow ? kLongRow / period : 1;
      rows.length = repeats * period;
    }
    if (rows.channels > 0) {
      rows.segments = (rows.length + kBiasSegment - 1) / kBiasSegment;
      rows.tasks = rows.elements / rows.length * rows.segments;
    } else {
      const int64_t wanted = (int64_t{1} << 17) / rows.length, count = (rows.elements + rows.length - 1) / rows.length;
      rows.rows_per_task = wanted < 8 ? 8 : wanted > 32 ? 32 : wanted;
      rows.tasks = (count + rows.rows_per_task - 1) / rows.rows_per_task;
    }
  }
  bool empty() const { return rows.elements == 0; }
  int64_t grain() const { return kGrain / (rows.channels > 0 ? rows.elements / rows.tasks + 1 : rows.rows_per_task * rows.length) + 1; }

  // A vector along the channels as the loops read it.
  Tensor along(const OptionalTensor& vector, const Tensor& like) const {
    return rows.channels > 0 ? spread(vector, like, 1, rows.channels, 1) : spread(vector, like, repeats, channels, inner);
  }
  Tensor partial(const Tensor& like) const {
    return torch::stable::new_empty(like, {rows.tasks * (rows.channels > 0 ? 1 : rows.length)}, ScalarType::Float);
  }
  Tensor sums(const Tensor& vector, const Tensor& partial) const {
    if (rows.channels > 0) return channel_sums(vector, partial, outer, channels, rows.segments);
    return channel_sums(vector, partial, rows.tasks * repeats, channels, inner);
  }
};

BiasActOptions options(double alpha, double gain, std::optional<double> clamp) {
  const float limit = clamp ? static_cast<float>(*clamp) : std::numeric_limits<float>::quiet_NaN();
  return {static_cast<float>(alpha), static_cast<float>(gain), limit};
}

void require_x(const char* op, const Tensor& x) { STD_TORCH_CHECK(x.dim() == 3, op, ": x must be (outer, C, inner)"); }

Tensor bias_act(const Tensor& x_in, const OptionalTensor& bias, std::string activation, double alpha, double gain,
                std::optional<double> clamp) {
  const char* name = "bias_act";
  require_x(name, x_in);
  require_bias(name, "bias", bias, x_in, x_in.size(1));
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const Layout3 layout(x, bias.has_value());
  if (layout.empty()) return y;
  const Tensor biases = layout.along(bias, x);
  BiasActForward op{layout.rows, x.const_data_ptr(), y.mutable_data_ptr(), type_of(name, "x", x),
                    activation_of(name, activation), options(alpha, gain, clamp),
                    x.numel() * static_cast<int64_t>(x.element_size()) > kStreamBytes};
  op.rows.bias = biases.const_data_ptr<float>();
  const auto loop = GENENGINE_PICK(bias_act_forward);
  torch::stable::parallel_for(0, op.rows.tasks, layout.grain(), [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
  return y;
}

// Runs the tasks of either backward and adds up the sums of dx.
Tensor run_backward(BiasActBackward& op, const Layout3& layout, const OptionalTensor& bias, const Tensor& x) {
  const Tensor biases = layout.along(bias, x);
  op.rows = layout.rows;
  op.rows.bias = biases.const_data_ptr<float>();
  op.x = x.const_data_ptr();
  op.type = type_of("bias_act_backward", "x", x);
  op.stream = x.numel() * static_cast<int64_t>(x.element_size()) > kStreamBytes;
  const bool summed = bias.has_value() && op.dx != nullptr;
  const Tensor partial = summed ? layout.partial(x) : biases;
  op.partial = summed ? partial.mutable_data_ptr<float>() : nullptr;
  const auto loop = GENENGINE_PICK(bias_act_backward);
  torch::stable::parallel_for(0, op.rows.tasks, layout.grain(), [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
  return summed ? layout.sums(*bias, partial) : torch::stable::new_empty(x, {0});
}

Tensor no_sums(const OptionalTensor& bias, const Tensor& x) {
  return bias ? torch::stable::new_zeros(*bias, {bias->size(0)}) : torch::stable::new_empty(x, {0});
}

std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias,
                                             std::string activation, double alpha, double gain, std::optional<double> clamp) {
  const char* name = "bias_act_backward";
  require_x(name, x_in);
  require_like(name, "grad", grad_in, x_in);
  require_bias(name, "bias", bias, x_in, x_in.size(1));
  const Tensor x = torch::stable::contiguous(x_in), grad = torch::stable::contiguous(grad_in);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const Layout3 layout(x, bias.has_value());
  if (layout.empty()) return {dx, no_sums(bias, x)};
  BiasActBackward op{};
  op.grad = grad.const_data_ptr();
  op.dx = dx.mutable_data_ptr();
  op.activation = activation_of(name, activation);
  op.options = options(alpha, gain, clamp);
  return {dx, run_backward(op, layout, bias, x)};
}

std::tuple<Tensor, Tensor, Tensor> bias_act_backward_backward(const Tensor& grad_dx_in, const OptionalTensor& grad_dbias,
                                                              const Tensor& grad_in, const Tensor& x_in,
                                                              const OptionalTensor& bias, std::string activation, double alpha,
                                                              double gain, std::optional<double> clamp) {
  const char* name = "bias_act_backward_backward";
  require_x(name, x_in);
  require_like(name, "grad_dx", grad_dx_in, x_in);
  require_like(name, "grad", grad_in, x_in);
  require_bias(name, "bias", bias, x_in, x_in.size(1));
  STD_TORCH_CHECK(!grad_dbias || bias, name, ": grad_dbias without bias");
  require_bias(name, "grad_dbias", grad_dbias, x_in, x_in.size(1));
  const Tensor x = torch::stable::contiguous(x_in), grad = torch::stable::contiguous(grad_in);
  const Tensor grad_dx = torch::stable::contiguous(grad_dx_in);
  BiasActBackward op{};
  op.activation = activation_of(name, activation);
  op.options = options(alpha, gain, clamp);
  const auto like_x = [&] { return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}); };
  const bool curved = is_curved(op.activation);
  const Tensor d_grad = like_x(), d_x = curved ? like_x() : torch::stable::new_empty(x, {0});
  const Layout3 layout(x, bias.has_value());
  if (layout.empty()) return {d_grad, d_x, curved ? no_sums(bias, x) : torch::stable::new_empty(x, {0})};
  const Tensor grad_biases = layout.along(grad_dbias, x);
  op.grad = grad.const_data_ptr();
  op.grad_dx = grad_dx.const_data_ptr();
  op.grad_dbias = grad_biases.const_data_ptr<float>();
  op.d_grad = d_grad.mutable_data_ptr();
  op.dx = curved ? d_x.mutable_data_ptr() : nullptr;
  return {d_grad, d_x, run_backward(op, layout, bias, x)};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&genengine::bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&genengine::bias_act_backward));
  m.impl("bias_act_backward_backward", TORCH_BOX(&genengine::bias_act_backward_backward));
}
