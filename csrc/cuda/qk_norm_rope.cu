// qk_norm_rope, in place too, and its backward on CUDA: checks, outputs and launches. The kernels: qk_norm_rope_kernels.h.
#include "cuda/qk_norm_rope_kernels.h"
#include "qk_norm_rope_checks.h"

namespace genengine {
namespace {

Packed view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Table table_view(const Tensor& t) { return {t.const_data_ptr<float>(), t.size(0) > 1 ? t.stride(0) : 0, t.stride(1)}; }

// True if every row of a packed tensor starts on a 16-byte boundary.
bool aligned_rows(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 4; ++d)
    aligned = aligned && (t.size(d) < 2 || t.stride(d) * static_cast<int64_t>(t.element_size()) % 16 == 0);
  return aligned;
}

// One call's operands, checked; they must live until the kernels are launched.
struct Call {
  QkArguments a;
  Launcher launcher;
  OptionalTensor q_weight, k_weight, cos, sin;
  Type type;
  bool wide;

  Call(const QkShape& shape, const Tensor& qkv, const QkOptions& given)
      : launcher(kQkOp, qkv),
        q_weight(unit_rows(given.q_weight)),
        k_weight(unit_rows(given.k_weight)),
        cos(unit_rows(given.cos)),
        sin(unit_rows(given.sin)),
        type(type_of(kQkOp, "qkv", qkv)) {
    check_qk_options(shape, qkv, given);
    launcher.require_here("q_weight", q_weight);
    launcher.require_here("k_weight", k_weight);
    launcher.require_here("cos", cos);
    launcher.require_here("sin", sin);
    a.qkv = view(qkv);
    STD_TORCH_CHECK(shape.empty() || 3 * shape.batch * shape.tokens * shape.heads < (int64_t{1} << 32) - kThreads * kQkRows, kQkOp,
                    ": at most 2^32 heads of all tokens fit one launch; split the batch");
    a.batch = static_cast<uint32_t>(shape.batch);
    a.tokens = static_cast<uint32_t>(shape.tokens);
    a.heads = static_cast<uint32_t>(shape.heads);
    a.dim = static_cast<int>(shape.dim);
    a.eps = static_cast<float>(given.eps);
    a.norm = given.norm;
    a.interleaved = given.interleaved;
    if (q_weight) {
      a.weight[0] = q_weight->const_data_ptr();
      a.weight[1] = k_weight->const_data_ptr();
      a.weight_is_float = q_weight->scalar_type() == ScalarType::Float;
    }
    if (cos) {
      a.half = static_cast<int>(cos->size(2));
      a.cos = table_view(*cos);
      a.sin = table_view(*sin);
    }
    wide = a.dim % kQkElements == 0 && (a.interleaved || a.half % kQkElements == 0) && aligned_rows(qkv);
  }
};

// run.template operator()<T, Team>() with the storage type and the least team that holds a head.
template <class Body>
void with_team(Type type, int dim, Body body) {
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (dim <= 8 * kQkElements) return body.template operator()<T, 8>();
    if (dim <= 16 * kQkElements) return body.template operator()<T, 16>();
    body.template operator()<T, 32>();
  });
}

Grid blocks_of(int64_t teams, int team) {
  const int64_t per_block = kThreads / team, blocks = (teams + per_block - 1) / per_block;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)};
}

void run_forward(Call& call, const Tensor& out, int parts) {
  QkArguments& a = call.a;
  a.out = view(out);
  a.parts = parts;
  const int64_t items = int64_t{a.batch} * a.tokens * parts * ((a.heads + kQkHeads - 1) / kQkHeads);
  if (call.wide && aligned_rows(out))
    with_team(call.type, a.dim, [&]<class T, int Team>() {
      call.launcher.run<qk_norm_rope_vectorised<T, Team>>(blocks_of(items, Team), a);
    });
  else
    with_type(call.type, [&](auto tag) {
      call.launcher.run<qk_norm_rope_single<typename decltype(tag)::type>>(blocks_of(items, 32), a);
    });
}

Tensor qk_norm_rope(const Tensor& qkv_in, const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& cos,
                    const OptionalTensor& sin, double eps, bool norm, bool interleaved) {
  const QkShape shape = qk_shape(qkv_in);
  const Tensor qkv = unit_rows(qkv_in);
  Call call(shape, qkv, {q_weight, k_weight, cos, sin, eps, norm, interleaved});
  Tensor out = torch::stable::new_empty(qkv, shape.sizes());
  if (!shape.empty()) run_forward(call, out, 3);
  return out;
}

void qk_norm_rope_in_place(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                           const OptionalTensor& cos, const OptionalTensor& sin, double eps, bool norm, bool interleaved) {
  const QkShape shape = qk_shape(qkv);
  require_writable_rows(qkv);
  Call call(shape, qkv, {q_weight, k_weight, cos, sin, eps, norm, interleaved});
  if (!shape.empty()) run_forward(call, qkv, 2);
}

// Launches the rows' kernel, then adds up its blocks' sums.
void run_backward(Call& call, const Tensor& like, const Tensor& dq_weight, const Tensor& dk_weight) {
  QkArguments& a = call.a;
  const int64_t teams = (int64_t{a.batch} * a.tokens * a.heads + kQkRows - 1) / kQkRows;
  const int team = !call.wide || a.dim > 16 * kQkElements ? 32 : a.dim > 8 * kQkElements ? 16 : 8;
  Grid grid = blocks_of(teams, team);
  const int64_t blocks = grid.blocks.x;
  grid.blocks.y = 3;
  const bool weighted = a.weight[0] != nullptr;
  Tensor partial = torch::stable::new_empty(like, {weighted ? blocks : 0, 2, a.dim}, ScalarType::Float);
  if (weighted) a.partial = partial.mutable_data_ptr<float>();
  if (call.wide)
    with_team(call.type, a.dim, [&]<class T, int Team>() { call.launcher.run<qk_norm_rope_backward_vectorised<T, Team>>(grid, a); });
  else
    with_type(call.type, [&](auto tag) { call.launcher.run<qk_norm_rope_backward_single<typename decltype(tag)::type>>(grid, a); });
  if (!weighted) return;
  const Grid columns{dim3(static_cast<unsigned>((a.dim + 31) / 32), 2), dim3(32, kReduceRows)};
  with_type(type_of(kQkOp, "q_weight", dq_weight), [&](auto tag) {
    using W = typename decltype(tag)::type;
    call.launcher.run<qk_norm_rope_reduce_kernel<W>>(columns, a.partial, dq_weight.data_ptr(), dk_weight.data_ptr(), blocks, a.dim);
  });
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_in, const Tensor& qkv_in, const OptionalTensor& q_weight,
                                                         const OptionalTensor& k_weight, const OptionalTensor& cos,
                                                         const OptionalTensor& sin, double eps, bool norm, bool interleaved) {
  const QkShape shape = qk_shape(qkv_in);
  check_qk_grad(shape, grad_in, qkv_in);
  const Tensor qkv = unit_rows(qkv_in), grad = unit_rows(grad_in);
  Call call(shape, qkv, {q_weight, k_weight, cos, sin, eps, norm, interleaved});
  call.launcher.require_here("grad", grad);
  Tensor dqkv = torch::stable::new_empty(qkv, shape.sizes());
  const auto like_weight = [&](const OptionalTensor& weight) {
    return weight ? torch::stable::new_zeros(*weight, {shape.dim}) : torch::stable::new_empty(qkv, {0});
  };
  const Tensor dq_weight = like_weight(q_weight), dk_weight = like_weight(k_weight);
  if (shape.empty()) return {dqkv, dq_weight, dk_weight};
  call.a.sign = -1.f;
  call.wide = call.wide && aligned_rows(grad) && aligned_rows(dqkv);
  if (norm) {
    call.a.grad = view(grad);
    call.a.out = view(dqkv);
    run_backward(call, qkv, dq_weight, dk_weight);
  } else {  // the gradient of a rotation is the rotation back
    call.a.qkv = view(grad);
    run_forward(call, dqkv, 3);
  }
  return {dqkv, dq_weight, dk_weight};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&genengine::qk_norm_rope));
  m.impl("qk_norm_rope_", TORCH_BOX(&genengine::qk_norm_rope_in_place));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&genengine::qk_norm_rope_backward));
}
