// reparameterize on CUDA, forward and backward, eps drawn in registers in both. A thread takes 16 bytes of a sample in C
// order; channels_last, odd and unaligned samples go by scattered quads. The KL: every block leaves its part, a warp adds
// the parts of a sample in a fixed order. Accumulates in float32.
#include "genengine/reparameterize.h"

#include "cuda/launch.h"

namespace genengine {

constexpr const char* kOp = "reparameterize";

struct ReparameterizeArguments {
  Samples mean, logvar, grad_z, z, dmean, dlogvar;
  const float* grad_kl = nullptr;
  float* partial = nullptr;  // (B, blocks of a sample)
  Noise noise;
  Layout layout;
  int64_t batch, per, grad_kl_stride = 1;
  float free_bits;
  uint32_t step;
};

// The sum over a block of kThreads, in thread 0.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  __syncthreads();  // before the next sample's
  return total;
}

template <class T, Kl Kind, bool Drawn, class Access>
__device__ __forceinline__ float forward_elements(const ReparameterizeArguments& a, int64_t b, const Access& at) {
  constexpr int kElements = Access::kElements;
  float mean[kElements], logvar[kElements], eps[kElements], z[kElements], kl = 0.f;
  load(at, a.mean.at<const T>(b), mean);
  load(at, a.logvar.at<const T>(b), logvar);
  load_noise<Drawn>(a.noise, b, a.step, kReparameterizeStream, at, eps);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float term = reparameterize_element<Kind>(mean[i], logvar[i], eps[i], a.free_bits, z[i]);
    kl += i < at.inside() ? term : 0.f;
  }
  at.store(a.z.at<T>(b), z);
  return kl;
}

template <class T, Kl Kind, bool Drawn, class Access>
__device__ __forceinline__ void backward_elements(const ReparameterizeArguments& a, int64_t b, const Access& at) {
  constexpr int kElements = Access::kElements;
  float grad_z[kElements], mean[kElements], logvar[kElements], eps[kElements], dmean[kElements], dlogvar[kElements];
  load(at, a.grad_z.at<const T>(b), grad_z);
  load(at, a.mean.at<const T>(b), mean);
  load(at, a.logvar.at<const T>(b), logvar);
  load_noise<Drawn>(a.noise, b, a.step, kReparameterizeStream, at, eps);
  const float grad_kl = a.grad_kl[b * a.grad_kl_stride];
#pragma unroll
  for (int i = 0; i < kElements; ++i)
    reparameterize_gradient<Kind>(grad_z[i], grad_kl, mean[i], logvar[i], eps[i], a.free_bits, dmean[i], dlogvar[i]);
  at.store(a.dmean.at<T>(b), dmean);
  at.store(a.dlogvar.at<T>(b), dlogvar);
}

// A block takes kThreads items of one sample after another: threads beyond the sample's end still join the sum.
template <class T, Kl Kind, bool Drawn>
__global__ void GENENGINE_BOUNDS reparameterize_vectorised(const __grid_constant__ ReparameterizeArguments a) {
  const Wide<16 / sizeof(T)> at(item_index());
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const float kl = block_sum(at.first < a.per ? forward_elements<T, Kind, Drawn>(a, b, at) : 0.f);
    if (threadIdx.x == 0) a.partial[b * gridDim.x + blockIdx.x] = kl;
  }
}

template <class T, Kl Kind, bool Drawn>
__global__ void GENENGINE_BOUNDS reparameterize_scattered(const __grid_constant__ ReparameterizeArguments a) {
  const bool inside = 4 * item_index() < a.per;
  const Scattered at(inside ? item_index() : 0, a.per, a.layout);
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const float kl = block_sum(inside ? forward_elements<T, Kind, Drawn>(a, b, at) : 0.f);
    if (threadIdx.x == 0) a.partial[b * gridDim.x + blockIdx.x] = kl;
  }
}

template <class T, Kl Kind, bool Drawn>
__global__ void GENENGINE_BOUNDS reparameterize_backward_vectorised(const __grid_constant__ ReparameterizeArguments a) {
  const Wide<16 / sizeof(T)> at(item_index());
  if (at.first >= a.per) return;
  for (int64_t b = first_sample(); b < a.batch; b += sample_stride()) backward_elements<T, Kind, Drawn>(a, b, at);
}

template <class T, Kl Kind, bool Drawn>
__global__ void GENENGINE_BOUNDS reparameterize_backward_scattered(const __grid_constant__ ReparameterizeArguments a) {
  if (4 * item_index() >= a.per) return;
  const Scattered at(item_index(), a.per, a.layout);
  for (int64_t b = first_sample(); b < a.batch; b += sample_stride()) backward_elements<T, Kind, Drawn>(a, b, at);
}

// A warp for each sample.
__global__ void GENENGINE_BOUNDS reparameterize_sum(const float* partial, float* kl, int64_t batch, int64_t blocks) {
  const int64_t b = item_index() / 32;
  if (b >= batch) return;
  float total = 0.f;
  for (int64_t i = threadIdx.x % 32; i < blocks; i += 32) total += partial[b * blocks + i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (threadIdx.x % 32 == 0) kl[b] = total;
}

namespace {

struct Call {
  const Launcher launcher;
  ReparameterizeArguments a;
  Type type;
  Kl kl;
  bool wide;

  Call(const Tensor& mean, const Tensor& logvar, const OptionalTensor& seed, const OptionalTensor& sample_ids, int64_t step,
       const OptionalTensor& noise, double free_bits, bool monte_carlo)
      : launcher(kOp, mean), type(type_of(kOp, "mean", mean)), kl(kl_of(monte_carlo, free_bits)) {
    a.layout = common_layout(kOp, mean);
    a.batch = mean.size(0);
    a.per = per_sample(mean);
    a.free_bits = static_cast<float>(free_bits);
    a.step = static_cast<uint32_t>(step);
    if (noise) {
      require_layout(kOp, "noise", *noise, mean, a.layout);
      STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, kOp, ": noise must be float32");
    }
    STD_TORCH_CHECK(seed || noise, kOp, ": seed or noise must be given");
    a.noise = Noise(launcher, kOp, seed, sample_ids, noise, a.batch);
    wide = a.layout.channels == 1 && aligned_samples(noise) && a.per % (16 / static_cast<int64_t>(mean.element_size())) == 0;
    a.mean = take("mean", mean, mean);
    a.logvar = take("logvar", logvar, mean);
    if (!wide) require_countable(kOp, a.per);
  }

  Samples take(const char* name, const Tensor& x, const Tensor& mean) {
    launcher.require_here(name, x);
    require_layout(kOp, name, x, mean, a.layout);
    STD_TORCH_CHECK(x.scalar_type() == mean.scalar_type(), kOp, ": ", name, " must have mean's dtype");
    wide = wide && aligned_samples(x);
    return Samples(x);
  }

  int64_t items() const { return wide ? a.per / (type == Type::f32 ? 4 : 8) : (a.per + 3) / 4; }

  // body(T, Kl, drawn) as types
  template <class Body>
  void with_kind(Body body) const {
    with_type(type, [&](auto tag) {
      const auto pick = [&](auto kind) {
        a.noise.drawn() ? body(tag, kind, std::true_type{}) : body(tag, kind, std::false_type{});
      };
      switch (kl) {
        case Kl::analytic: return pick(std::integral_constant<Kl, Kl::analytic>{});
        case Kl::free_bits: return pick(std::integral_constant<Kl, Kl::free_bits>{});
        case Kl::monte_carlo: return pick(std::integral_constant<Kl, Kl::monte_carlo>{});
      }
    });
  }
};

std::tuple<Tensor, Tensor> reparameterize(const Tensor& mean, const Tensor& logvar, const OptionalTensor& seed,
                                          const OptionalTensor& sample_ids, int64_t step, const OptionalTensor& noise,
                                          double free_bits, bool monte_carlo) {
  Tensor z = torch::stable::empty_like(mean), kl = torch::stable::new_zeros(mean, {mean.size(0)}, ScalarType::Float);
  if (z.numel() == 0) return {z, kl};
  Call call(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo);
  call.a.z = call.take("z", z, mean);
  const int64_t columns = (call.items() + kThreads - 1) / kThreads, rows = call.a.batch < 65535 ? call.a.batch : 65535;
  Tensor partial = torch::stable::new_empty(mean, {call.a.batch, columns}, ScalarType::Float);
  call.a.partial = partial.mutable_data_ptr<float>();
  const Grid grid{dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows)), dim3(kThreads)};
  call.with_kind([&](auto tag, auto kind, auto drawn) {
    using T = typename decltype(tag)::type;
    call.wide ? call.launcher.run<reparameterize_vectorised<T, kind(), drawn()>>(grid, call.a)
              : call.launcher.run<reparameterize_scattered<T, kind(), drawn()>>(grid, call.a);
  });
  call.launcher.run<reparameterize_sum>(grid_over(32 * call.a.batch), call.a.partial, kl.mutable_data_ptr<float>(), call.a.batch,
                                        columns);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_backward(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mean,
                                                   const Tensor& logvar, const OptionalTensor& seed,
                                                   const OptionalTensor& sample_ids, int64_t step, const OptionalTensor& noise,
                                                   double free_bits, bool monte_carlo) {
  Tensor dmean = torch::stable::empty_like(mean), dlogvar = torch::stable::empty_like(logvar);
  if (dmean.numel() == 0) return {dmean, dlogvar};
  Call call(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo);
  call.launcher.require_here("grad_kl", grad_kl);
  STD_TORCH_CHECK(grad_kl.scalar_type() == ScalarType::Float && grad_kl.dim() == 1 && grad_kl.size(0) == call.a.batch, kOp,
                  ": grad_kl must be float32 (B,)");
  call.a.grad_kl = grad_kl.const_data_ptr<float>();
  call.a.grad_kl_stride = grad_kl.stride(0);
  call.a.grad_z = call.take("grad_z", grad_z, mean);
  call.a.dmean = call.take("dmean", dmean, mean);
  call.a.dlogvar = call.take("dlogvar", dlogvar, mean);
  if (!call.wide) require_countable(kOp, call.a.per);
  const Grid grid = grid_over(call.items(), call.a.batch);
  call.with_kind([&](auto tag, auto kind, auto drawn) {
    using T = typename decltype(tag)::type;
    call.wide ? call.launcher.run<reparameterize_backward_vectorised<T, kind(), drawn()>>(grid, call.a)
              : call.launcher.run<reparameterize_backward_scattered<T, kind(), drawn()>>(grid, call.a);
  });
  return {dmean, dlogvar};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("reparameterize", TORCH_BOX(&genengine::reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&genengine::reparameterize_backward));
}
