// adaln, gated_adaln and their backwards on CUDA: checks, outputs and launches. The kernels: adaln_kernels.h.
#include "cuda/adaln_kernels.h"

namespace genengine {
namespace {

struct AdalnShape {
  int64_t batch, tokens, dim;
  bool empty() const { return batch == 0 || tokens == 0 || dim == 0; }
};

// One call's checks; it also notes whether 16-byte accesses are possible.
struct Inputs {
  const char* op;
  const Launcher& launcher;
  AdalnShape shape;
  ScalarType narrow_type;
  bool wide;

  Inputs(const char* name, const Launcher& on, const Tensor& x, const Tensor& scale)
      : op(name), launcher(on), narrow_type(scale.scalar_type()) {
    STD_TORCH_CHECK(x.dim() == 3, op, ": x must be (B, N, D)");
    STD_TORCH_CHECK(x.size(2) <= kAdalnMaxDim, op, ": D must be at most ", kAdalnMaxDim, ", got ", x.size(2));
    STD_TORCH_CHECK(x.scalar_type() == narrow_type || x.scalar_type() == ScalarType::Float, op,
                    ": scale must have x's dtype, or x be float32");
    shape = {x.size(0), x.size(1), x.size(2)};
    wide = shape.dim % (scale.element_size() == 2 ? 8 : 4) == 0;
  }

  Tensor prepare(const char* name, const Tensor& t, ScalarType type, bool is_row) {
    launcher.require_here(name, t);
    const int64_t last = is_row ? 1 : 2;
    const bool fits = t.dim() == last + 1 && t.size(0) == shape.batch && t.size(last) == shape.dim &&
                      (is_row || t.size(1) == shape.tokens);
    STD_TORCH_CHECK(fits, op, ": ", name, " must be (B, ", is_row ? "" : "N, ", "D) with B = ", shape.batch,
                    ", N = ", shape.tokens, ", D = ", shape.dim);
    STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype");
    Tensor unit = shape.dim <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
    const auto multiple = [&](int64_t d) { return unit.size(d) < 2 || unit.stride(d) * static_cast<int64_t>(unit.element_size()) % 16 == 0; };
    wide = wide && reinterpret_cast<uintptr_t>(unit.data_ptr()) % 16 == 0 && multiple(0) && (is_row || multiple(1));
    return unit;
  }
  Tensor tokens(const char* name, const Tensor& t, ScalarType type) { return prepare(name, t, type, false); }
  Tensor row(const char* name, const Tensor& t) { return prepare(name, t, narrow_type, true); }
  Tensor like_x(const Tensor& x, ScalarType type) const {
    return torch::stable::new_empty(x, {shape.batch, shape.tokens, shape.dim}, type);
  }
};

Tokens view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
Rows row_view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }

// Threads for `teams` rows (or chunks of rows) of dim elements, `elements` per thread.
Grid team_grid(const char* op, int64_t teams, int64_t dim, int elements) {
  const int64_t across = dim <= 32 * elements ? 32 : (dim + 32 * elements - 1) / (32 * elements) * 32;
  const int64_t down = across == 32 ? 8 : 1, blocks = (teams + down - 1) / down;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too many rows for one launch");
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(across), static_cast<unsigned>(down))};
}

template <class Body>
void with_types(Type x, Type narrow, Body body) {
  with_type(narrow, [&](auto m) {
    if (x == narrow)
      body(m, m);
    else
      body(std::type_identity<float>{}, m);
  });
}

template <class X, class M, bool Gated>
void forward(const char* op, const Launcher& launcher, const AdalnForwardArguments& a, bool wide) {
  constexpr int V = sizeof(M) == 2 ? 8 : 4;
  const auto run = [&]<int Elements>() {
    launcher.run<adaln_forward_vectorised<X, M, Gated, V, Elements / V>>(team_grid(op, a.rows, a.dim, Elements), a);
  };
  if (!wide) return launcher.run<adaln_forward_single<X, M, Gated>>(team_grid(op, a.rows, a.dim, 8), a);
  if (a.dim <= 32 * 8 || (a.dim > 32 * 32 && a.dim <= 256 * 8)) return run.template operator()<8>();
  if (a.dim <= 32 * 16 || (a.dim > 32 * 32 && a.dim <= 256 * 16)) return run.template operator()<16>();
  run.template operator()<32>();
}

template <class X, class M, bool Gated>
void backward(const char* op, const Launcher& launcher, const AdalnBackwardArguments& a, bool wide) {
  constexpr int V = sizeof(M) == 2 ? 8 : 4;
  if (!wide)  // any team walks any row: at most 256 threads, 32 columns each at D = 8192
    launcher.run<adaln_backward_single<X, M, Gated>>(team_grid(op, a.tasks, a.dim, a.dim > 2048 ? 32 : 8), a);
  else if (a.dim <= 256 * 8)
    launcher.run<adaln_backward_vectorised<X, M, Gated, V, 8 / V>>(team_grid(op, a.tasks, a.dim, 8), a);
  else
    launcher.run<adaln_backward_vectorised<X, M, Gated, V, 16 / V>>(team_grid(op, a.tasks, a.dim, 16), a);
}

void run_forward(const Inputs& in, AdalnForwardArguments& a, const Tensor& x, const Tensor& h, double eps, bool gated) {
  a.h = h.mutable_data_ptr();
  a.tokens = in.shape.tokens;
  a.rows = in.shape.batch * in.shape.tokens;
  a.dim = static_cast<int>(in.shape.dim);
  a.eps = static_cast<float>(eps);
  with_types(type_of(in.op, "x", x), type_of(in.op, "scale", h), [&](auto x_tag, auto m_tag) {
    using X = typename decltype(x_tag)::type;
    using M = typename decltype(m_tag)::type;
    gated ? forward<X, M, true>(in.op, in.launcher, a, in.wide) : forward<X, M, false>(in.op, in.launcher, a, in.wide);
  });
}

Tensor adaln(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in, double eps) {
  const char* op = "adaln";
  const Launcher launcher(op, x_in);
  Inputs in(op, launcher, x_in, scale_in);
  const Tensor x = in.tokens("x", x_in, x_in.scalar_type()), scale = in.row("scale", scale_in), shift = in.row("shift", shift_in);
  Tensor h = in.like_x(x, in.narrow_type);
  if (in.shape.empty()) return h;
  AdalnForwardArguments a{};
  a.x = view(x);
  a.scale = row_view(scale);
  a.shift = row_view(shift);
  run_forward(in, a, x, h, eps, false);
  return h;
}

std::tuple<Tensor, Tensor> gated_adaln(const Tensor& x_in, const Tensor& branch_in, const Tensor& gate_in,
                                       const Tensor& scale_in, const Tensor& shift_in, double eps) {
  const char* op = "gated_adaln";
  const Launcher launcher(op, x_in);
  Inputs in(op, launcher, x_in, scale_in);
  const Tensor x = in.tokens("x", x_in, x_in.scalar_type()), branch = in.tokens("branch", branch_in, in.narrow_type);
  const Tensor gate = in.row("gate", gate_in), scale = in.row("scale", scale_in), shift = in.row("shift", shift_in);
  Tensor x_out = in.like_x(x, x.scalar_type()), h = in.like_x(x, in.narrow_type);
  if (in.shape.empty()) return {x_out, h};
  AdalnForwardArguments a{};
  a.x = view(x);
  a.branch = view(branch);
  a.gate = row_view(gate);
  a.scale = row_view(scale);
  a.shift = row_view(shift);
  a.x_out = x_out.mutable_data_ptr();
  run_forward(in, a, x, h, eps, true);
  return {x_out, h};
}

// sums: dscale, dshift and, gated, dgate.
template <size_t Count>
void run_backward(const Inputs& in, AdalnBackwardArguments& a, const Tensor& x, const Tensor& scale, double eps,
                  const Tensor (&sums)[Count]) {
  constexpr bool kGated = Count == 3;
  a.tokens = in.shape.tokens;
  a.chunks = (in.shape.tokens + kChunk - 1) / kChunk;
  a.tasks = in.shape.batch * a.chunks;
  a.dim = static_cast<int>(in.shape.dim);
  a.eps = static_cast<float>(eps);
  Tensor partial = torch::stable::new_empty(x, {in.shape.batch, a.chunks, 3, in.shape.dim}, ScalarType::Float);
  a.partial = partial.mutable_data_ptr<float>();
  with_types(type_of(in.op, "x", x), type_of(in.op, "scale", scale), [&](auto x_tag, auto m_tag) {
    using X = typename decltype(x_tag)::type;
    using M = typename decltype(m_tag)::type;
    backward<X, M, kGated>(in.op, in.launcher, a, in.wide);
    Grid grid = grid_over(in.shape.dim);
    grid.blocks.y = static_cast<unsigned>(in.shape.batch < 65535 ? in.shape.batch : 65535);
    grid.blocks.z = Count;
    void* outputs[3] = {sums[0].mutable_data_ptr(), sums[1].mutable_data_ptr(), sums[Count - 1].mutable_data_ptr()};
    in.launcher.run<adaln_reduce_kernel<M>>(grid, a.partial, outputs[0], outputs[1], outputs[2], in.shape.batch, a.chunks, a.dim);
  });
}

std::tuple<Tensor, Tensor, Tensor> adaln_backward(const Tensor& grad_h_in, const Tensor& x_in, const Tensor& scale_in,
                                                  double eps) {
  const char* op = "adaln_backward";
  const Launcher launcher(op, x_in);
  Inputs in(op, launcher, x_in, scale_in);
  const Tensor x = in.tokens("x", x_in, x_in.scalar_type()), grad_h = in.tokens("grad_h", grad_h_in, in.narrow_type);
  const Tensor scale = in.row("scale", scale_in);
  Tensor dx = in.like_x(x, x.scalar_type());
  const auto zeros = [&] { return torch::stable::new_zeros(scale, {in.shape.batch, in.shape.dim}); };
  if (in.shape.empty()) return {dx, zeros(), zeros()};
  const auto row = [&] { return torch::stable::new_empty(scale, {in.shape.batch, in.shape.dim}); };
  const Tensor sums[2] = {row(), row()};
  AdalnBackwardArguments a{};
  a.grad_h = view(grad_h);
  a.x = view(x);
  a.scale = row_view(scale);
  a.dx = dx.mutable_data_ptr();
  run_backward(in, a, x, scale, eps, sums);
  return {dx, sums[0], sums[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_adaln_backward(const Tensor& grad_x_in, const Tensor& grad_h_in,
                                                                        const Tensor& x_in, const Tensor& branch_in,
                                                                        const Tensor& gate_in, const Tensor& scale_in,
                                                                        double eps) {
  const char* op = "gated_adaln_backward";
  const Launcher launcher(op, x_in);
  Inputs in(op, launcher, x_in, scale_in);
  const ScalarType type = x_in.scalar_type();
  const Tensor x = in.tokens("x_out", x_in, type), grad_x = in.tokens("grad_x", grad_x_in, type);
  const Tensor grad_h = in.tokens("grad_h", grad_h_in, in.narrow_type), branch = in.tokens("branch", branch_in, in.narrow_type);
  const Tensor gate = in.row("gate", gate_in), scale = in.row("scale", scale_in);
  Tensor dx = in.like_x(x, type), dbranch = in.like_x(x, in.narrow_type);
  const auto zeros = [&] { return torch::stable::new_zeros(scale, {in.shape.batch, in.shape.dim}); };
  if (in.shape.empty()) return {dx, dbranch, zeros(), zeros(), zeros()};
  const auto row = [&] { return torch::stable::new_empty(scale, {in.shape.batch, in.shape.dim}); };
  const Tensor sums[3] = {row(), row(), row()};
  AdalnBackwardArguments a{};
  a.grad_x = view(grad_x);
  a.grad_h = view(grad_h);
  a.x = view(x);
  a.branch = view(branch);
  a.gate = row_view(gate);
  a.scale = row_view(scale);
  a.dx = dx.mutable_data_ptr();
  a.dbranch = dbranch.mutable_data_ptr();
  run_backward(in, a, x, scale, eps, sums);
  return {dx, dbranch, sums[2], sums[0], sums[1]};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("adaln", TORCH_BOX(&genengine::adaln));
  m.impl("adaln_backward", TORCH_BOX(&genengine::adaln_backward));
  m.impl("gated_adaln", TORCH_BOX(&genengine::gated_adaln));
  m.impl("gated_adaln_backward", TORCH_BOX(&genengine::gated_adaln_backward));
}
