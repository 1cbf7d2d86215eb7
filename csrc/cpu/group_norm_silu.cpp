// group_norm_silu and its backward on the CPU. channels_last: a thread takes whole samples, which stay in its second-level
// cache between the passes, or where there are fewer samples than threads blocks of one; C order: groups.
#include "cpu/group_norm_silu_loops.h"
#include "elementwise_checks.h"
#include "group_norm_silu_checks.h"

namespace genengine {
namespace {

// Columns of a channels_last row: whole pixels, whole vectors of sixteen, and not too few.
int64_t row_width(int64_t channels) {
  int64_t pixels = 1;
  while (pixels * channels % 16 != 0) pixels *= 2;
  while (pixels * channels < kGroupNormColumns) pixels *= 2;
  return pixels * channels;
}

GroupNorm operands(const GroupNormInputs& in) {
  GroupNorm op{};
  op.x = in.x.const_data_ptr();
  op.x_batch = batch_stride(in.x);
  op.type = in.type;
  op.parameter_type = in.parameter_type;
  op.modulation_type = in.modulation_type;
  if (in.weight) op.weight = in.weight->const_data_ptr();
  if (in.bias) op.bias = in.bias->const_data_ptr();
  if (in.scale) {
    op.scale = in.scale->const_data_ptr();
    op.scale_batch = in.scale->stride(0);
    op.shift = in.shift->const_data_ptr();
    op.shift_batch = in.shift->stride(0);
  }
  op.channels = in.channels;
  op.pixels = in.pixels;
  op.groups = in.groups;
  op.width = in.by_pixel ? row_width(in.channels) : 0;
  return op;
}

using BlockLoop = void (*)(const GroupNorm&, int64_t, int64_t);
using SampleLoop = void (*)(const GroupNorm&, int64_t);

void each_block(const GroupNorm& op, int64_t batch, BlockLoop loop) {
  const int64_t blocks = op.blocks();
  torch::stable::parallel_for(0, batch * blocks, kGrain / op.block() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loop(op, i / blocks, i % blocks);
  });
}

void each_sample(const GroupNorm& op, int64_t batch, SampleLoop loop) {
  torch::stable::parallel_for(0, batch, kGrain / op.channels + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) loop(op, b);
  });
}

// Sums over the blocks of a sample, one fold, and the blocks again; all three while the sample is in the cache, if
// there are samples enough for the threads.
void two_passes(const GroupNorm& op, int64_t batch, BlockLoop sums, SampleLoop fold, BlockLoop apply) {
  if (batch < static_cast<int64_t>(torch::stable::get_num_threads())) {
    each_block(op, batch, sums);
    each_sample(op, batch, fold);
    return each_block(op, batch, apply);
  }
  const int64_t blocks = op.blocks();
  torch::stable::parallel_for(0, batch, kGrain / (op.channels * op.pixels) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t block = 0; block < blocks; ++block) sums(op, b, block);
      fold(op, b);
      for (int64_t block = blocks - 1; block >= 0; --block) apply(op, b, block);  // the last one read is the nearest
    }
  });
}

void each_group(const GroupNorm& op, int64_t batch, BlockLoop loop) {
  const int64_t grain = kGrain / (op.group_channels() * op.pixels) + 1;
  torch::stable::parallel_for(0, batch * op.groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loop(op, i / op.groups, i % op.groups);
  });
}

// Outputs that cannot stay in the caches gain from non-temporal stores; smaller ones lose by them.
constexpr int64_t kStreamBytes = int64_t{24} << 20;

// y, mean and rstd of the operands, whose x may be still to be written.
std::tuple<Tensor, Tensor, Tensor> forward(const GroupNormInputs& in, GroupNorm op, double eps, bool silu) {
  Tensor y = in.like_x();
  if (in.empty()) return {y, in.no_statistics(), in.no_statistics()};
  Tensor mean = in.statistics(), rstd = in.statistics();
  op.out = y.mutable_data_ptr();
  op.mean = mean.mutable_data_ptr<float>();
  op.rstd = rstd.mutable_data_ptr<float>();
  op.eps = static_cast<float>(eps);
  op.silu = silu;
  op.stream = y.numel() * static_cast<int64_t>(y.element_size()) > kStreamBytes;
  if (!in.by_pixel) {
    each_group(op, in.batch, GENENGINE_PICK(group_norm_run));
    return {y, mean, rstd};
  }
  Tensor partial = torch::stable::new_empty(in.x, {in.batch, op.blocks(), 2, op.width}, ScalarType::Double);
  Tensor rows = torch::stable::new_empty(in.x, {in.batch, 5, op.width}, ScalarType::Float);
  op.partial = partial.mutable_data_ptr<double>();
  op.rows = rows.mutable_data_ptr<float>();
  two_passes(op, in.batch, GENENGINE_PICK(group_norm_sums), GENENGINE_PICK(group_norm_fold), GENENGINE_PICK(group_norm_apply));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& scale, const OptionalTensor& shift, int64_t num_groups,
                                                   double eps, bool silu, bool channels_last) {
  const GroupNormInputs in("group_norm_silu", x, weight, bias, scale, shift, num_groups, channels_last);
  return forward(in, operands(in), eps, silu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_group_norm_silu(
    const Tensor& x, const Tensor& branch_in, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, int64_t num_groups, double eps, bool silu, bool channels_last) {
  const GroupNormInputs in("add_group_norm_silu", x, weight, bias, scale, shift, num_groups, channels_last);
  const Tensor branch = in.dense_like_x("branch", branch_in);
  Tensor sum = in.like_x();
  GroupNorm op = operands(in);
  op.left = op.x, op.left_batch = op.x_batch;
  op.branch = branch.const_data_ptr(), op.branch_batch = batch_stride(branch);
  op.sum = sum.mutable_data_ptr();
  op.x = op.sum, op.x_batch = batch_stride(sum);
  const auto [y, mean, rstd] = forward(in, op, eps, silu);
  return {sum, y, mean, rstd};
}

void parameter_gradients(GroupNorm& op, const GroupNormInputs& in, const GroupNormGradients& out) {
  if (in.weight) {
    op.dweight = out.dweight.mutable_data_ptr();
    op.dbias = out.dbias.mutable_data_ptr();
    const auto loop = GENENGINE_PICK(group_norm_parameter_gradients);
    torch::stable::parallel_for(0, in.channels, kGrain / in.batch + 1,
                                [&](int64_t begin, int64_t end) { loop(op, in.batch, begin, end); });
  }
  if (in.scale) {
    op.dscale = out.dscale.mutable_data_ptr();
    op.dshift = out.dshift.mutable_data_ptr();
    const auto loop = GENENGINE_PICK(group_norm_modulation_gradients);
    torch::stable::parallel_for(0, in.batch, kGrain / in.channels + 1,
                                [&](int64_t begin, int64_t end) { loop(op, begin, end); });
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// grad_x: the gradient of x itself, which is added to dx, or nothing.
Gradients backward(const GroupNormInputs& in, const OptionalTensor& grad_x, const Tensor& grad_in, const Tensor& mean_in,
                   const Tensor& rstd_in, bool silu) {
  const Tensor grad = in.dense_like_x("grad", grad_in);
  const Tensor mean = in.given_statistics("mean", mean_in), rstd = in.given_statistics("rstd", rstd_in);
  const GroupNormGradients out(in);
  if (in.empty()) return out.zeroed();
  Tensor sums = torch::stable::new_empty(in.x, {in.batch, 2, in.channels}, ScalarType::Double);
  GroupNorm op = operands(in);
  op.grad = grad.const_data_ptr();
  op.grad_batch = batch_stride(grad);
  if (grad_x) op.grad_x = grad_x->const_data_ptr(), op.grad_x_batch = batch_stride(*grad_x);
  op.out = out.dx.mutable_data_ptr();
  op.mean = mean.mutable_data_ptr<float>();
  op.rstd = rstd.mutable_data_ptr<float>();
  op.sums = sums.mutable_data_ptr<double>();
  op.silu = silu;
  if (in.by_pixel) {
    Tensor partial = torch::stable::new_empty(in.x, {in.batch, op.blocks(), 2, op.width}, ScalarType::Double);
    Tensor rows = torch::stable::new_empty(in.x, {in.batch, 5, op.width}, ScalarType::Float);
    op.partial = partial.mutable_data_ptr<double>();
    op.rows = rows.mutable_data_ptr<float>();
    each_sample(op, in.batch, GENENGINE_PICK(group_norm_backward_prepare));
    two_passes(op, in.batch, GENENGINE_PICK(group_norm_backward_sums), GENENGINE_PICK(group_norm_backward_fold),
               GENENGINE_PICK(group_norm_backward_apply));
    parameter_gradients(op, in, out);
  } else {
    each_group(op, in.batch, GENENGINE_PICK(group_norm_backward_run));
    parameter_gradients(op, in, out);
  }
  return {out.dx, out.dweight, out.dbias, out.dscale, out.dshift};
}

Gradients group_norm_silu_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& mean,
                                   const Tensor& rstd, int64_t num_groups, bool silu, bool channels_last) {
  const GroupNormInputs in("group_norm_silu_backward", x, weight, bias, scale, shift, num_groups, channels_last);
  return backward(in, {}, grad, mean, rstd, silu);
}

Gradients add_group_norm_silu_backward(const Tensor& grad_x, const Tensor& grad, const Tensor& sum, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                                       const Tensor& mean, const Tensor& rstd, int64_t num_groups, bool silu, bool channels_last) {
  const GroupNormInputs in("add_group_norm_silu_backward", sum, weight, bias, scale, shift, num_groups, channels_last);
  return backward(in, in.dense_like_x("grad_x", grad_x), grad, mean, rstd, silu);
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&genengine::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&genengine::group_norm_silu_backward));
  m.impl("add_group_norm_silu", TORCH_BOX(&genengine::add_group_norm_silu));
  m.impl("add_group_norm_silu_backward", TORCH_BOX(&genengine::add_group_norm_silu_backward));
}
