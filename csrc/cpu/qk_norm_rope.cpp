// qk_norm_rope, in place too, and its backward on the CPU: tokens over threads, the weights' gradients summed in chunks of
// fixed size, so that no bit depends on the number of threads.
#include "cpu/qk_norm_rope_loops.h"

#include "cpu/elementwise.h"
#include "genengine/qk_norm_rope.h"
#include "qk_norm_rope_checks.h"

namespace genengine {
namespace {

PackedView view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

TableView table_view(const Tensor& t) { return {t.const_data_ptr<float>(), t.size(0) > 1 ? t.stride(0) : 0, t.stride(1)}; }

// One call's operands, checked; they must live as long as the loops run.
struct Call {
  QkNormRope op{};
  OptionalTensor q_weight, k_weight, cos, sin;

  Call(const QkShape& shape, const Tensor& qkv, const QkOptions& given)
      : q_weight(unit_rows(given.q_weight)), k_weight(unit_rows(given.k_weight)), cos(unit_rows(given.cos)), sin(unit_rows(given.sin)) {
    check_qk_options(shape, qkv, given);
    op.qkv = view(qkv);
    op.type = type_of(kQkOp, "qkv", qkv);
    op.batch = shape.batch;
    op.tokens = shape.tokens;
    op.heads = shape.heads;
    op.dim = shape.dim;
    op.eps = static_cast<float>(given.eps);
    op.norm = given.norm;
    op.interleaved = given.interleaved;
    if (q_weight) {
      op.weight[0] = q_weight->const_data_ptr();
      op.weight[1] = k_weight->const_data_ptr();
      op.weight_type = type_of(kQkOp, "q_weight", *q_weight);
    }
    if (cos) {
      op.half = cos->size(2);
      op.cos = table_view(*cos);
      op.sin = table_view(*sin);
    }
  }
};

void run_forward(QkNormRope& op, const Tensor& out, bool in_place) {
  op.out = view(out);
  op.copy_v = !in_place;
  op.stream = !in_place && should_stream(Bytes(out), out.numel(), 1);
  const auto loop = GENENGINE_PICK(qk_norm_rope_forward);
  const int64_t grain = kGrain / (3 * op.heads * op.dim) + 1;
  torch::stable::parallel_for(0, op.batch * op.tokens, grain,
                              [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
}

Tensor qk_norm_rope(const Tensor& qkv_in, const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& cos,
                    const OptionalTensor& sin, double eps, bool norm, bool interleaved) {
  const QkShape shape = qk_shape(qkv_in);
  const Tensor qkv = unit_rows(qkv_in);
  Call call(shape, qkv, {q_weight, k_weight, cos, sin, eps, norm, interleaved});
  Tensor out = torch::stable::new_empty(qkv, shape.sizes());
  if (!shape.empty()) run_forward(call.op, out, false);
  return out;
}

void qk_norm_rope_in_place(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                           const OptionalTensor& cos, const OptionalTensor& sin, double eps, bool norm, bool interleaved) {
  const QkShape shape = qk_shape(qkv);
  require_writable_rows(qkv);
  Call call(shape, qkv, {q_weight, k_weight, cos, sin, eps, norm, interleaved});
  if (!shape.empty()) run_forward(call.op, qkv, true);
}

// Runs the chunks, then adds them up.
void run_backward(QkNormRope& op, const Tensor& like, const Tensor& dq_weight, const Tensor& dk_weight) {
  const int64_t chunks = (op.batch * op.tokens + kQkChunk - 1) / kQkChunk;
  const bool weighted = op.weight[0] != nullptr;
  Tensor partial = torch::stable::new_empty(like, {weighted ? chunks : 0, 2, op.dim}, ScalarType::Float);
  if (weighted) op.partial = partial.mutable_data_ptr<float>();
  const auto loop = GENENGINE_PICK(qk_norm_rope_backward);
  const int64_t grain = kGrain / (3 * op.heads * op.dim * kQkChunk) + 1;
  torch::stable::parallel_for(0, chunks, grain, [loop, &op](int64_t begin, int64_t end) { loop(op, begin, end); });
  if (!weighted) return;
  const auto reduce = GENENGINE_PICK(qk_norm_rope_reduce);
  reduce(dq_weight.data_ptr(), op.weight_type, op.partial, chunks, op.dim);
  reduce(dk_weight.data_ptr(), op.weight_type, op.partial + op.dim, chunks, op.dim);
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_in, const Tensor& qkv_in, const OptionalTensor& q_weight,
                                                         const OptionalTensor& k_weight, const OptionalTensor& cos,
                                                         const OptionalTensor& sin, double eps, bool norm, bool interleaved) {
  const QkShape shape = qk_shape(qkv_in);
  check_qk_grad(shape, grad_in, qkv_in);
  const Tensor qkv = unit_rows(qkv_in), grad = unit_rows(grad_in);
  Call call(shape, qkv, {q_weight, k_weight, cos, sin, eps, norm, interleaved});
  Tensor dqkv = torch::stable::new_empty(qkv, shape.sizes());
  const auto like_weight = [&](const OptionalTensor& weight) {
    return weight ? torch::stable::new_zeros(*weight, {shape.dim}) : torch::stable::new_empty(qkv, {0});
  };
  const Tensor dq_weight = like_weight(q_weight), dk_weight = like_weight(k_weight);
  if (shape.empty()) return {dqkv, dq_weight, dk_weight};
  call.op.back = true;
  if (norm) {
    call.op.grad = view(grad);
    call.op.out = view(dqkv);
    run_backward(call.op, qkv, dq_weight, dk_weight);
  } else {  // the gradient of a rotation is the rotation back
    call.op.qkv = view(grad);
    run_forward(call.op, dqkv, false);
  }
  return {dqkv, dq_weight, dk_weight};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&genengine::qk_norm_rope));
  m.impl("qk_norm_rope_", TORCH_BOX(&genengine::qk_norm_rope_in_place));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&genengine::qk_norm_rope_backward));
}
