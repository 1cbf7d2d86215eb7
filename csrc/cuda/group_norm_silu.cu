// group_norm_silu and its backward on CUDA: checks, outputs and launches. The kernels: group_norm_silu_kernels.h.
#include "cuda/group_norm_silu_kernels.h"
#include "group_norm_silu_checks.h"

namespace genengine {
namespace {

constexpr int64_t kGroupThreads = 512, kGroupElements = 16;  // the largest group that a block holds

// One call: its arguments but for the outputs, and whether 16-byte accesses are possible.
struct Call {
  const GroupNormInputs& in;
  const Launcher& launcher;
  GroupNormArguments a{};
  int64_t vector;  // elements of a 16-byte access
  bool wide;
  Tensor rows, partial;

  Call(const GroupNormInputs& inputs, const Launcher& on)
      : in(inputs), launcher(on), vector(in.type == Type::f32 ? 4 : 8),
        wide((in.by_pixel ? in.channels : in.pixels) % vector == 0 && aligned_samples(in.x)),
        rows(torch::stable::new_empty(in.x, {in.batch, 5, in.channels}, ScalarType::Float)) {
    a.x = in.x.const_data_ptr();
    a.x_batch = batch_stride(in.x);
    a.parameter_type = in.parameter_type;
    a.modulation_type = in.modulation_type;
    if (in.weight) a.weight = in.weight->const_data_ptr(), a.bias = in.bias->const_data_ptr();
    if (in.scale) {
      a.scale = in.scale->const_data_ptr(), a.scale_batch = in.scale->stride(0);
      a.shift = in.shift->const_data_ptr(), a.shift_batch = in.shift->stride(0);
    }
    a.rows = rows.mutable_data_ptr<float>();
    a.batch = in.batch, a.channels = in.channels, a.pixels = in.pixels;
    a.groups = static_cast<int>(in.groups), a.group_channels = static_cast<int>(in.channels / in.groups);
    STD_TORCH_CHECK(in.channels < (int64_t{1} << 31), in.op, ": C must be below 2^31");
  }

  void require_here() const {
    launcher.require_here("weight", in.weight);
    launcher.require_here("bias", in.bias);
    launcher.require_here("scale", in.scale);
    launcher.require_here("shift", in.shift);
  }

  void divide() {
    a.chunk_pixels = in.by_pixel ? kChunkPixels : kChunkLine;
    const int64_t chunks = (in.pixels + a.chunk_pixels - 1) / a.chunk_pixels;
    STD_TORCH_CHECK(chunks * (in.batch > a.group_channels ? in.batch : a.group_channels) < (int64_t{1} << 31), in.op,
                    ": too many pixels for one launch");
    a.chunks = static_cast<int>(chunks);
    partial = torch::stable::new_empty(in.x, {in.batch, a.chunks, 2, in.channels}, ScalarType::Float);
    a.partial = partial.mutable_data_ptr<float>();
  }

  Grid blocks(int64_t count) const {
    STD_TORCH_CHECK(count < (int64_t{1} << 31), in.op, ": too many groups or chunks for one launch");
    return {dim3(static_cast<unsigned>(count)), dim3(kThreads)};
  }

  template <bool Backward>
  void sums() const {
    const int64_t tasks = a.batch * a.chunks;
    dispatch([&]<class T, int V, bool Last>() {
      Grid grid = blocks(Last ? (a.channels / V + 31) / 32 : (tasks * a.channels + 7) / 8);
      grid.threads = dim3(32, 8);
      if (Last) grid.blocks.y = static_cast<unsigned>(tasks < 65535 ? tasks : 65535);
      if constexpr (V == 1)
        launcher.run<group_norm_sums_single<T, Last, Backward>>(grid, a);
      else
        launcher.run<group_norm_sums_vectorised<T, V, Last, Backward>>(grid, a);
    });
  }

  template <bool Backward>
  void apply() const {
    dispatch([&]<class T, int V, bool Last>() {
      const int64_t width = Last ? a.channels : a.pixels, lines = Last ? a.pixels : a.channels;
      const Grid grid = grid_over(width / V * ((lines + kLines - 1) / kLines), a.batch);
      if constexpr (V == 1)
        launcher.run<group_norm_apply_single<T, Last, Backward>>(grid, a);
      else
        launcher.run<group_norm_apply_vectorised<T, V, Last, Backward>>(grid, a);
    });
  }

  // False if no block holds a group.
  bool whole_groups() const {
    const int64_t size = a.group_channels * a.pixels;
    if (in.by_pixel || !wide || size > kGroupThreads * kGroupElements) return false;
    with_type(in.type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      constexpr int V = 16 / sizeof(T);
      const auto run = [&]<int Elements>() {
        Grid grid = blocks(a.batch * a.groups);
        grid.threads = dim3(static_cast<unsigned>((size + 32 * Elements - 1) / (32 * Elements) * 32));
        launcher.run<group_norm_group_vectorised<T, V, Elements / V>>(grid, a);
      };
      size <= kGroupThreads * 8 ? run.template operator()<8>() : run.template operator()<kGroupElements>();
    });
    return true;
  }

 private:
  template <class Body>
  void dispatch(Body body) const {
    with_type(in.type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      constexpr int V = 16 / sizeof(T);
      if (wide)
        in.by_pixel ? body.template operator()<T, V, true>() : body.template operator()<T, V, false>();
      else
        in.by_pixel ? body.template operator()<T, 1, true>() : body.template operator()<T, 1, false>();
    });
  }
};

// y, mean and rstd. branch: added to x first, their sum written to `sum`; or nothing.
std::tuple<Tensor, Tensor, Tensor> forward(const GroupNormInputs& in, const OptionalTensor& branch, const OptionalTensor& sum,
                                           double eps, bool silu) {
  const Launcher launcher(in.op, in.x);
  Tensor y = in.like_x();
  if (in.empty()) return {y, in.no_statistics(), in.no_statistics()};
  Tensor mean = in.statistics(), rstd = in.statistics();
  Call call(in, launcher);
  call.require_here();
  launcher.require_here("branch", branch);
  call.a.out = y.mutable_data_ptr();
  call.a.mean = mean.mutable_data_ptr<float>();
  call.a.rstd = rstd.mutable_data_ptr<float>();
  call.a.eps = static_cast<float>(eps);
  call.a.silu = silu;
  if (branch) {
    call.wide = call.wide && aligned_samples(*branch);
    call.a.branch = branch->const_data_ptr(), call.a.branch_batch = batch_stride(*branch);
    call.a.sum = sum->mutable_data_ptr();
  }
  if (call.whole_groups()) return {y, mean, rstd};
  call.divide();
  call.sums<false>();
  launcher.run<group_norm_statistics_kernel>(call.blocks(in.batch * in.groups), call.a);
  if (branch) call.a.x = call.a.sum, call.a.x_batch = batch_stride(*sum);
  call.apply<false>();
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& scale, const OptionalTensor& shift, int64_t num_groups,
                                                   double eps, bool silu, bool channels_last) {
  const GroupNormInputs in("group_norm_silu", x, weight, bias, scale, shift, num_groups, channels_last);
  return forward(in, {}, {}, eps, silu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_group_norm_silu(
    const Tensor& x, const Tensor& branch, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, int64_t num_groups, double eps, bool silu, bool channels_last) {
  const GroupNormInputs in("add_group_norm_silu", x, weight, bias, scale, shift, num_groups, channels_last);
  const Tensor sum = in.like_x();
  const auto [y, mean, rstd] = forward(in, in.dense_like_x("branch", branch), sum, eps, silu);
  return {sum, y, mean, rstd};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// grad_x: the gradient of x itself, which is added to dx, or nothing.
Gradients backward(const GroupNormInputs& in, const OptionalTensor& grad_x, const Tensor& grad_in, const Tensor& mean_in,
                   const Tensor& rstd_in, bool silu) {
  const Launcher launcher(in.op, in.x);
  launcher.require_here("grad", grad_in);
  launcher.require_here("grad_x", grad_x);
  launcher.require_here("mean", mean_in);
  launcher.require_here("rstd", rstd_in);
  const Tensor grad = in.dense_like_x("grad", grad_in);
  const Tensor mean = in.given_statistics("mean", mean_in), rstd = in.given_statistics("rstd", rstd_in);
  const GroupNormGradients out(in);
  if (in.empty()) return out.zeroed();
  Tensor sums = torch::stable::new_empty(in.x, {in.batch, 2, in.channels}, ScalarType::Float);
  Call call(in, launcher);
  call.require_here();
  call.wide = call.wide && aligned_samples(grad) && aligned_samples(grad_x);
  call.a.grad = grad.const_data_ptr();
  call.a.grad_batch = batch_stride(grad);
  if (grad_x) call.a.grad_x = grad_x->const_data_ptr(), call.a.grad_x_batch = batch_stride(*grad_x);
  call.a.out = out.dx.mutable_data_ptr();
  call.a.mean = mean.mutable_data_ptr<float>();
  call.a.rstd = rstd.mutable_data_ptr<float>();
  call.a.sums = sums.mutable_data_ptr<float>();
  call.a.dweight = out.dweight.mutable_data_ptr();
  call.a.dbias = out.dbias.mutable_data_ptr();
  call.a.dscale = out.dscale.mutable_data_ptr();
  call.a.dshift = out.dshift.mutable_data_ptr();
  call.a.silu = silu;
  call.divide();
  launcher.run<group_norm_rows_kernel>(call.blocks((in.batch * in.channels + kThreads - 1) / kThreads), call.a);
  call.sums<true>();
  launcher.run<group_norm_backward_groups_kernel>(call.blocks(in.batch * in.groups), call.a);
  if (in.weight) launcher.run<group_norm_backward_parameters_kernel>(grid_over(in.channels), call.a);
  call.apply<true>();
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

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&genengine::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&genengine::group_norm_silu_backward));
  m.impl("add_group_norm_silu", TORCH_BOX(&genengine::add_group_norm_silu));
  m.impl("add_group_norm_silu_backward", TORCH_BOX(&genengine::add_group_norm_silu_backward));
}
