// diffuse on CUDA: x_t and the regression target in one read and two writes, eps drawn in registers or given. A thread
// takes 16 bytes of samples in C order; channels_last, odd and unaligned samples go by scattered quads.
// Accumulates in float32, without fused multiply-add.
#include "cuda/launch.h"

namespace genengine {

constexpr uint32_t kDiffuseStream = 3;

struct DiffuseArguments {
  Samples x0, x_t, target;
  const float *alpha, *sigma, *c_x0, *c_eps;
  Noise noise;
  Layout layout;
  int64_t batch, per;
  uint32_t step;
};

template <class T, bool Drawn, class Access>
__device__ __forceinline__ void diffuse_elements(const DiffuseArguments& d, int64_t b, const Access& at) {
  constexpr int kElements = Access::kElements;
  float x0[kElements], eps[kElements], out[kElements];
  load(at, d.x0.at<const T>(b), x0);
  load_noise<Drawn>(d.noise, b, d.step, kDiffuseStream, at, eps);
  const float alpha = d.alpha[b], sigma = d.sigma[b], c_x0 = d.c_x0[b], c_eps = d.c_eps[b];
#pragma unroll
  for (int i = 0; i < kElements; ++i) out[i] = alpha * x0[i] + sigma * eps[i];
  at.store(d.x_t.at<T>(b), out);
#pragma unroll
  for (int i = 0; i < kElements; ++i) out[i] = c_x0 * x0[i] + c_eps * eps[i];
  at.store(d.target.at<T>(b), out);
}

template <class T, bool Drawn>
__global__ void GENENGINE_BOUNDS diffuse_vectorised(const __grid_constant__ DiffuseArguments d) {
  const Wide<16 / sizeof(T)> at(item_index());
  if (at.first >= d.per) return;
  for (int64_t b = first_sample(); b < d.batch; b += sample_stride()) diffuse_elements<T, Drawn>(d, b, at);
}

template <class T, bool Drawn>
__global__ void GENENGINE_BOUNDS diffuse_scattered(const __grid_constant__ DiffuseArguments d) {
  if (4 * item_index() >= d.per) return;
  const Scattered at(item_index(), d.per, d.layout);
  for (int64_t b = first_sample(); b < d.batch; b += sample_stride()) diffuse_elements<T, Drawn>(d, b, at);
}

namespace {

template <class T, bool Drawn>
void launch(const Launcher& launcher, const DiffuseArguments& d, bool wide) {
  constexpr int64_t kElements = 16 / sizeof(T);
  if (wide && d.per % kElements == 0)
    return launcher.run<diffuse_vectorised<T, Drawn>>(grid_over(d.per / kElements, d.batch), d);
  require_countable("diffuse", d.per);
  launcher.run<diffuse_scattered<T, Drawn>>(grid_over((d.per + 3) / 4, d.batch), d);
}

std::tuple<Tensor, Tensor> diffuse(const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& c_x0,
                                   const Tensor& c_eps, const OptionalTensor& seed, const OptionalTensor& sample_ids,
                                   int64_t step, const OptionalTensor& noise) {
  const char* op = "diffuse";
  DiffuseArguments d;
  d.layout = common_layout(op, x0);
  const Launcher launcher(op, x0);
  Tensor x_t = torch::stable::empty_like(x0), target = torch::stable::empty_like(x0);
  d.batch = x0.size(0);
  d.per = per_sample(x0);
  if (d.batch == 0 || d.per == 0) return {x_t, target};
  const Type type = type_of(op, "x0", x0);
  if (noise) {
    require_layout(op, "noise", *noise, x0, d.layout);
    STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, op, ": noise must be float32");
  }
  STD_TORCH_CHECK(seed || noise, op, ": seed or noise must be given");
  const auto coefficient = [&](const char* name, const Tensor& value) {
    launcher.require_here(name, value);
    return diffuse_coefficient(name, value, d.batch);
  };
  d.alpha = coefficient("alpha", alpha);
  d.sigma = coefficient("sigma", sigma);
  d.c_x0 = coefficient("c_x0", c_x0);
  d.c_eps = coefficient("c_eps", c_eps);
  d.noise = Noise(launcher, op, seed, sample_ids, noise, d.batch);
  d.x0 = Samples(x0);
  d.x_t = Samples(x_t);
  d.target = Samples(target);
  d.step = static_cast<uint32_t>(step);
  const bool wide = d.layout.channels == 1 && aligned_samples(x0) && aligned_samples(x_t) && aligned_samples(target) &&
                    aligned_samples(noise);
  with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    d.noise.drawn() ? launch<T, true>(launcher, d, wide) : launch<T, false>(launcher, d, wide);
  });
  return {x_t, target};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) { m.impl("diffuse", TORCH_BOX(&genengine::diffuse)); }
