// adaln, gated_adaln and their backwards on the CPU: rows over threads, sums over tokens in chunks of fixed size, so that
// no bit depends on the number of threads.
#include "genengine/adaln.h"

#include "cpu/adaln_loops.h"
#include "elementwise_checks.h"

namespace genengine {
namespace {

// Rows are read through their strides; only an innermost stride other than 1 costs a copy.
Tensor unit_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

TokenView view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
RowView row_view(const Tensor& row) { return {row.const_data_ptr(), row.stride(0)}; }

struct Shape {
  int64_t batch, tokens, dim;
  bool empty() const { return batch == 0 || tokens == 0 || dim == 0; }
};

Shape shape_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be (B, N, D)");
  STD_TORCH_CHECK(x.size(2) <= kAdalnMaxDim, op, ": D must be at most ", kAdalnMaxDim, ", got ", x.size(2));
  return {x.size(0), x.size(1), x.size(2)};
}

void require_tokens(const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == shape.batch && t.size(1) == shape.tokens && t.size(2) == shape.dim, op, ": ",
                  name, " must be (B, N, D) = (", shape.batch, ", ", shape.tokens, ", ", shape.dim, ")");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype");
}

void require_row(const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == shape.batch && t.size(1) == shape.dim, op, ": ", name, " must be (B, D) = (",
                  shape.batch, ", ", shape.dim, ")");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype");
}

void require_mix(const char* op, const Tensor& x, const Tensor& scale) {
  STD_TORCH_CHECK(x.scalar_type() == scale.scalar_type() || type_of(op, "x", x) == Type::f32, op,
                  ": scale must have x's dtype, or x be float32");
}

// Beyond this many bytes read and written, most of a usual last-level cache of 32 MiB, the outputs are written past the
// caches: measured 30-40 % faster. (sysconf's cache size is no guide: glibc may report ten times one core's share.)
constexpr int64_t kStreamBytes = int64_t{24} << 20;

void run_forward(AdalnForward& op, const Shape& shape, int64_t bytes) {
  op.tokens = shape.tokens;
  op.dim = shape.dim;
  op.stream = bytes > kStreamBytes;
  const auto loop = GENENGINE_PICK(adaln_forward);
  const int64_t grain = kGrain / shape.dim + 1;
  torch::stable::parallel_for(0, shape.batch * shape.tokens, grain,
                              [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
}

Tensor adaln(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in, double eps) {
  const char* name = "adaln";
  const Shape shape = shape_of(name, x_in);
  const ScalarType narrow = scale_in.scalar_type();
  require_row(name, "scale", scale_in, shape, narrow);
  require_row(name, "shift", shift_in, shape, narrow);
  require_mix(name, x_in, scale_in);
  Tensor h = torch::stable::new_empty(x_in, {shape.batch, shape.tokens, shape.dim}, narrow);
  if (shape.empty()) return h;
  const Tensor x = unit_rows(x_in), scale = unit_rows(scale_in), shift = unit_rows(shift_in);
  AdalnForward op{};
  op.x = view(x);
  op.scale = row_view(scale);
  op.shift = row_view(shift);
  op.h = h.mutable_data_ptr();
  op.x_type = type_of(name, "x", x);
  op.h_type = type_of(name, "scale", h);
  op.eps = static_cast<float>(eps);
  run_forward(op, shape, h.numel() * (x.element_size() + h.element_size()));
  return h;
}

std::tuple<Tensor, Tensor> gated_adaln(const Tensor& x_in, const Tensor& branch_in, const Tensor& gate_in,
                                       const Tensor& scale_in, const Tensor& shift_in, double eps) {
  const char* name = "gated_adaln";
  const Shape shape = shape_of(name, x_in);
  const ScalarType narrow = scale_in.scalar_type();
  require_tokens(name, "branch", branch_in, shape, narrow);
  require_row(name, "gate", gate_in, shape, narrow);
  require_row(name, "scale", scale_in, shape, narrow);
  require_row(name, "shift", shift_in, shape, narrow);
  require_mix(name, x_in, scale_in);
  Tensor x_out = torch::stable::new_empty(x_in, {shape.batch, shape.tokens, shape.dim});
  Tensor h = torch::stable::new_empty(x_in, {shape.batch, shape.tokens, shape.dim}, narrow);
  if (shape.empty()) return {x_out, h};
  const Tensor x = unit_rows(x_in), branch = unit_rows(branch_in), gate = unit_rows(gate_in);
  const Tensor scale = unit_rows(scale_in), shift = unit_rows(shift_in);
  AdalnForward op{};
  op.x = view(x);
  op.branch = view(branch);
  op.gate = row_view(gate);
  op.scale = row_view(scale);
  op.shift = row_view(shift);
  op.x_out = x_out.mutable_data_ptr();
  op.h = h.mutable_data_ptr();
  op.x_type = type_of(name, "x", x);
  op.h_type = type_of(name, "scale", h);
  op.eps = static_cast<float>(eps);
  run_forward(op, shape, 2 * h.numel() * (x.element_size() + h.element_size()));
  return {x_out, h};
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Runs the chunks, then adds them up: sums[k] (B, D) from partial (B, chunks, 3, D).
template <size_t K>
void run_backward(AdalnBackward& op, const Shape& shape, const Tensor& like, const Tensor (&sums)[K]) {
  op.tokens = shape.tokens;
  op.dim = shape.dim;
  op.chunks = (shape.tokens + kAdalnChunk - 1) / kAdalnChunk;
  Tensor partial = torch::stable::new_empty(like, {shape.batch, op.chunks, 3, shape.dim}, ScalarType::Float);
  op.partial = partial.mutable_data_ptr<float>();
  const auto loop = GENENGINE_PICK(adaln_backward);
  torch::stable::parallel_for(0, shape.batch * op.chunks, 1,
                              [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
  const auto reduce = GENENGINE_PICK(adaln_reduce);
  char* out[K];
  for (size_t k = 0; k < K; ++k) out[k] = static_cast<char*>(sums[k].mutable_data_ptr());
  const int64_t pitch = shape.dim * static_cast<int64_t>(sums[0].element_size());
  const int64_t grain = kGrain / (shape.dim * op.chunks) + 1;
  torch::stable::parallel_for(0, shape.batch * static_cast<int64_t>(K), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / static_cast<int64_t>(K), k = i % static_cast<int64_t>(K);
      reduce(out[k] + b * pitch, op.h_type, op.partial + (b * op.chunks * 3 + k) * shape.dim, op.chunks, shape.dim);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& grad_h_in, const Tensor& x_in, const Tensor& scale_in,
                                                  double eps) {
  const char* name = "adaln_backward";
  const Shape shape = shape_of(name, x_in);
  const ScalarType narrow = scale_in.scalar_type();
  require_tokens(name, "grad_h", grad_h_in, shape, narrow);
  require_row(name, "scale", scale_in, shape, narrow);
  require_mix(name, x_in, scale_in);
  Tensor dx = torch::stable::new_empty(x_in, {shape.batch, shape.tokens, shape.dim});
  if (shape.empty()) {
    const auto zeros = [&] { return torch::stable::new_zeros(scale_in, {shape.batch, shape.dim}); };
    return {dx, zeros(), zeros()};
  }
  const Tensor grad_h = unit_rows(grad_h_in), x = unit_rows(x_in), scale = unit_rows(scale_in);
  const Tensor sums[2] = {torch::stable::new_empty(scale, {shape.batch, shape.dim}),
                          torch::stable::new_empty(scale, {shape.batch, shape.dim})};
  AdalnBackward op{};
  op.grad_h = view(grad_h);
  op.x = view(x);
  op.scale = row_view(scale);
  op.dx = dx.mutable_data_ptr();
  op.x_type = type_of(name, "x", x);
  op.h_type = type_of(name, "scale", scale);
  op.eps = static_cast<float>(eps);
  run_backward(op, shape, x, sums);
  return {dx, sums[0], sums[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_adaln_backward(const Tensor& grad_x_in, const Tensor& grad_h_in,
                                                                        const Tensor& x_out, const Tensor& branch_in,
                                                                        const Tensor& gate_in, const Tensor& scale_in,
                                                                        double eps) {
  const char* name = "gated_adaln_backward";
  const Shape shape = shape_of(name, x_out);
  const ScalarType narrow = scale_in.scalar_type();
  require_tokens(name, "grad_x", grad_x_in, shape, x_out.scalar_type());
  require_tokens(name, "grad_h", grad_h_in, shape, narrow);
  require_tokens(name, "branch", branch_in, shape, narrow);
  require_row(name, "gate", gate_in, shape, narrow);
  require_row(name, "scale", scale_in, shape, narrow);
  require_mix(name, x_out, scale_in);
  Tensor dx = torch::stable::new_empty(x_out, {shape.batch, shape.tokens, shape.dim});
  Tensor dbranch = torch::stable::new_empty(branch_in, {shape.batch, shape.tokens, shape.dim});
  if (shape.empty()) {
    const auto zeros = [&] { return torch::stable::new_zeros(scale_in, {shape.batch, shape.dim}); };
    return {dx, dbranch, zeros(), zeros(), zeros()};
  }
  const Tensor grad_x = unit_rows(grad_x_in), grad_h = unit_rows(grad_h_in), x = unit_rows(x_out);
  const Tensor branch = unit_rows(branch_in), gate = unit_rows(gate_in), scale = unit_rows(scale_in);
  const Tensor sums[3] = {torch::stable::new_empty(scale, {shape.batch, shape.dim}),
                          torch::stable::new_empty(scale, {shape.batch, shape.dim}),
                          torch::stable::new_empty(scale, {shape.batch, shape.dim})};
  AdalnBackward op{};
  op.grad_x = view(grad_x);
  op.grad_h = view(grad_h);
  op.x = view(x);
  op.branch = view(branch);
  op.gate = row_view(gate);
  op.scale = row_view(scale);
  op.dx = dx.mutable_data_ptr();
  op.dbranch = dbranch.mutable_data_ptr();
  op.x_type = type_of(name, "x", x);
  op.h_type = type_of(name, "scale", scale);
  op.eps = static_cast<float>(eps);
  run_backward(op, shape, x, sums);
  return {dx, dbranch, sums[2], sums[0], sums[1]};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("adaln", TORCH_BOX(&genengine::adaln));
  m.impl("adaln_backward", TORCH_BOX(&genengine::adaln_backward));
  m.impl("gated_adaln", TORCH_BOX(&genengine::gated_adaln));
  m.impl("gated_adaln_backward", TORCH_BOX(&genengine::gated_adaln_backward));
}
