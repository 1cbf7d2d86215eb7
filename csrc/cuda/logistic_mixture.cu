// logistic_mixture on CUDA: a thread for each pixel, over the components one by one. In C order the accesses of a warp
// coalesce; channels_last parameters pass through shared memory, a warp's pixels at a time, there and back. The backward goes
// over the parameters twice, for the sums and for the derivatives. Accumulates in float32, in the order of the components.
#include "logistic_mixture_checks.h"

#include "cuda/launch.h"

namespace genengine {

constexpr int kTile = 32;                   // pixels of a shared tile: one warp
constexpr int64_t kSharedBytes = 48 << 10;  // what every GPU gives without being asked

struct MixtureArguments {
  Samples params, dparams;
  int64_t param_stride, pixel_stride, batch, image;
  int components, params_count, pitch;  // pitch: of a pixel in shared memory, odd, so that a warp meets all banks
  Bins bins;
  const float* grad = nullptr;
  float *x = nullptr, *log_prob = nullptr;
  Noise noise;
  uint32_t step = 0;
  float temperature = 1.f, inverse_temperature = 1.f;
};

// ---- the parameters of one pixel ---------------------------------------------------------------------------------------

template <class T>
struct Strided {
  const T* from;
  T* to;
  int64_t stride;
  __device__ __forceinline__ float get(int64_t row) const { return widen(from[row * stride]); }
  __device__ __forceinline__ void set(int64_t row, float value) const { to[row * stride] = narrow<T>(value); }
};

struct Shared {
  float* pixel;
  __device__ __forceinline__ float get(int64_t row) const { return pixel[row]; }
  __device__ __forceinline__ void set(int64_t row, float value) const { pixel[row] = value; }
};

template <class T>
__device__ __forceinline__ Strided<T> strided(const MixtureArguments& a, int64_t b, int64_t pixel) {
  const int64_t offset = pixel * a.pixel_stride;
  return {a.params.at<const T>(b) + offset, a.dparams.at<T>(b) + offset, a.param_stride};
}

// The block's pixels to or from shared memory, each by the whole warp: move(element, float) for its parameters.
template <class T, class Move>
__device__ __forceinline__ void each_of_tile(const MixtureArguments& a, const Samples& tensor, int64_t first_b, float* tile,
                                             Move move) {
  const int across = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = 0; i < kTile; ++i) {
    const int64_t b = first_b + i / across, pixel = static_cast<int64_t>(blockIdx.x) * across + i % across;
    if (b >= a.batch || pixel >= a.image) continue;
    T* row = tensor.at<T>(b) + pixel * a.pixel_stride;
    for (int p = lane; p < a.params_count; p += kTile) move(row[p], tile[i * a.pitch + p]);
  }
  __syncwarp();
}

// ---- log-probability and its gradient ----------------------------------------------------------------------------------

template <int C>
struct Pixel {
  float x[C], bin[C];
  __device__ __forceinline__ Pixel(const MixtureArguments& a, int64_t b, int64_t pixel) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      bin[c] = nearest_bin(a.x[(b * C + c) * a.image + pixel], a.bins.last);
      x[c] = bin_value(bin[c], a.bins.last);
    }
  }
};

// log p(k, pixel) less the logarithm of the logits' sum; gradients null: not wanted.
template <int C, class Params>
__device__ __forceinline__ float joint_of(const MixtureArguments& a, const Params& params, const Pixel<C>& at, int k,
                                          SliceGradient* gradients) {
  const int64_t components = a.components;
  float linear = params.get(k), numerator = 1.f, denominator = 1.f;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float mean = params.get((1 + c) * components + k);
#pragma unroll
    for (int j = 0; j < c; ++j) {
      const float coupling = params.get((1 + 2 * C + mixture_pairs(c) + j) * components + k);
      mean = multiply_add(hyperbolic_tangent(coupling), at.x[j], mean);
    }
    const float log_scale = params.get((1 + C + c) * components + k);
    const Slice slice = logistic_slice(at.x[c], at.bin[c], mean, log_scale, a.bins, gradients ? gradients + c : nullptr);
    linear += slice.linear;
    numerator *= slice.numerator;
    denominator *= slice.denominator;
  }
  return joint_log_prob(linear, numerator, denominator);
}

struct Sums {
  float joint_largest = kNothing, joint = 0.f, logit_largest = kNothing, logit = 0.f;
};
template <int C, class Params>
__device__ __forceinline__ Sums sums_of(const MixtureArguments& a, const Params& params, const Pixel<C>& at) {
  Sums sums;
#pragma unroll 1
  for (int k = 0; k < a.components; ++k) {
    add_exponential(sums.joint_largest, sums.joint, joint_of(a, params, at, k, nullptr));
    add_exponential(sums.logit_largest, sums.logit, params.get(k));
  }
  return sums;
}

template <int C, class Params>
__device__ __forceinline__ void write_log_prob(const MixtureArguments& a, const Params& params, int64_t b, int64_t pixel) {
  const Sums sums = sums_of(a, params, Pixel<C>(a, b, pixel));
  a.log_prob[b * a.image + pixel] = (sums.joint_largest - sums.logit_largest) + logarithm(sums.joint / sums.logit);
}

template <int C, class Params>
__device__ __forceinline__ void write_gradient(const MixtureArguments& a, const Params& params, int64_t b, int64_t pixel) {
  const Pixel<C> at(a, b, pixel);
  const Sums sums = sums_of(a, params, at);
  const float grad = a.grad[b * a.image + pixel], joint_weight = grad / sums.joint, logit_weight = grad / sums.logit;
  const int64_t components = a.components;
#pragma unroll 1
  for (int k = 0; k < a.components; ++k) {
    SliceGradient gradients[C];
    const float logit = params.get(k);
    const float weight = exponential(joint_of(a, params, at, k, gradients) - sums.joint_largest) * joint_weight;
    params.set(k, weight - exponential(logit - sums.logit_largest) * logit_weight);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float dmean = weight * gradients[c].mean;
      params.set((1 + c) * components + k, dmean);
      params.set((1 + C + c) * components + k, weight * gradients[c].log_scale);
#pragma unroll
      for (int j = 0; j < c; ++j) {
        const int64_t row = (1 + 2 * C + mixture_pairs(c) + j) * components + k;
        const float t = hyperbolic_tangent(params.get(row));
        params.set(row, dmean * at.x[j] * (1.f - t * t));
      }
    }
  }
}

template <class T, int C, bool Backward>
__global__ void GENENGINE_BOUNDS mixture_strided(const __grid_constant__ MixtureArguments a) {
  const int64_t pixel = item_index();
  if (pixel >= a.image) return;
  for (int64_t b = first_sample(); b < a.batch; b += sample_stride()) {
    const Strided<T> params = strided<T>(a, b, pixel);
    Backward ? write_gradient<C>(a, params, b, pixel) : write_log_prob<C>(a, params, b, pixel);
  }
}

// A block is one warp; blockDim.y samples where these are smaller than a tile.
template <class T, int C, bool Backward>
__global__ void __launch_bounds__(kTile) mixture_tiled(const __grid_constant__ MixtureArguments a) {
  extern __shared__ float tile[];
  const int64_t pixel = item_index();
  const Shared params{tile + (threadIdx.y * blockDim.x + threadIdx.x) * a.pitch};
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y; first < a.batch; first += sample_stride()) {
    const int64_t b = first + threadIdx.y;
    each_of_tile<const T>(a, a.params, first, tile, [](const T& element, float& value) { value = widen(element); });
    if (pixel < a.image && b < a.batch)
      Backward ? write_gradient<C>(a, params, b, pixel) : write_log_prob<C>(a, params, b, pixel);
    __syncwarp();
    if (Backward)
      each_of_tile<T>(a, a.dparams, first, tile, [](T& element, float& value) { element = narrow<T>(value); });
  }
}

// ---- sampling: IEEE operations alone, in the order of the reference ----------------------------------------------------

// Uniform j of a pixel: element pixel (1 + C) + j.
template <int C>
__device__ __forceinline__ void draw(const MixtureArguments& a, int64_t b, int64_t pixel, float (&u)[1 + C]) {
  constexpr int kEach = 1 + C, kQuads = 4 % kEach == 0 ? 1 : 2;
  const int64_t element = pixel * kEach;
  const uint32_t sample = a.noise.sample(b);
  const uint64_t key = a.noise.key(b);
  const int offset = static_cast<int>(element % 4);
  uint32_t words[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const Words four = philox(static_cast<uint32_t>(element / 4) + q, sample, a.step, kMixtureStream, key);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * q + i] = four.w[i];
  }
  if (kQuads > 1) {  // move the pixel's words to the front: an array indexed at run time would lie in local memory
#pragma unroll
    for (int by = 1; by <= 2; by *= 2)
#pragma unroll
      for (int i = 0; i + by < 4 * kQuads; ++i) words[i] = offset & by ? words[i + by] : words[i];
  } else {
#pragma unroll
    for (int i = 0; i + kEach < 4; ++i) words[i] = offset ? words[i + kEach] : words[i];
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) u[j] = unit(words[j]);
}

// The component of a pixel; total: the sum of the weights.
template <class Params>
__device__ __forceinline__ int choose(const MixtureArguments& a, const Params& params, float u, float& total) {
  float largest = params.get(0), partial = 0.f;
  for (int k = 1; k < a.components; ++k) {
    const float logit = params.get(k);
    largest = logit > largest ? logit : largest;
  }
  total = 0.f;
  for (int k = 0; k < a.components; ++k) total = total + component_weight(params.get(k), largest, a.inverse_temperature);
  const float target = u * total;
  int chosen = 0;
  for (int k = 0; k + 1 < a.components; ++k) {
    partial = partial + component_weight(params.get(k), largest, a.inverse_temperature);
    chosen += partial <= target ? 1 : 0;
  }
  return chosen;
}

template <class T, int C>
__global__ void GENENGINE_BOUNDS mixture_sample(const __grid_constant__ MixtureArguments a) {
  const int64_t pixel = item_index(), components = a.components;
  if (pixel >= a.image) return;
  for (int64_t b = first_sample(); b < a.batch; b += sample_stride()) {
    const Strided<T> params = strided<T>(a, b, pixel);
    float u[1 + C], x[C], total;
    draw<C>(a, b, pixel, u);
    const int k = choose(a, params, u[0], total);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float mean = params.get((1 + c) * components + k) + total * 0.f;  // NaN of NaN logits
#pragma unroll
      for (int j = 0; j < c; ++j)
        mean = mean + tanh_ieee(params.get((1 + 2 * C + mixture_pairs(c) + j) * components + k)) * x[j];
      x[c] = sample_channel(mean, params.get((1 + C + c) * components + k), u[1 + c], a.temperature, a.bins.last);
      a.x[(b * C + c) * a.image + pixel] = x[c];
    }
  }
}

namespace {

struct Call {
  const Launcher launcher;
  MixtureSizes sizes;
  MixtureArguments a;

  Call(const char* op, const Tensor& params, const MixtureSizes& checked) : launcher(op, params), sizes(checked) {
    const MixtureStrides strides(params, sizes);
    a.params = Samples(params);
    a.param_stride = strides.param;
    a.pixel_stride = strides.pixel;
    a.batch = sizes.batch;
    a.image = sizes.image;
    a.components = static_cast<int>(sizes.components);
    a.params_count = static_cast<int>(sizes.params);
    a.pitch = a.params_count | 1;
    a.bins = sizes.bins;
  }

  void take_x(const Tensor& x) {
    launcher.require_here("x", x);
    a.x = static_cast<float*>(x.data_ptr());
  }

  int64_t tile_bytes() const { return int64_t{kTile} * a.pitch * static_cast<int64_t>(sizeof(float)); }

  // The grid of `threads` a block: like grid_over, with another size.
  Grid grid(unsigned threads) const {
    unsigned across = 1;
    while (across < threads && across < a.image) across *= 2;
    const unsigned down = threads / across;
    const int64_t columns = (a.image + across - 1) / across, rows = (a.batch + down - 1) / down;
    return {dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows < 65535 ? rows : 65535)), dim3(across, down)};
  }

  // body(T, C) as types
  template <class Body>
  void with_kind(Body body) const {
    with_type(sizes.type, [&](auto tag) {
      switch (sizes.channels) {
        case 1: return body(tag, std::integral_constant<int, 1>{});
        case 2: return body(tag, std::integral_constant<int, 2>{});
        case 3: return body(tag, std::integral_constant<int, 3>{});
        default: return body(tag, std::integral_constant<int, 4>{});
      }
    });
  }

  template <bool Backward>
  void run() const {
    with_kind([&](auto tag, auto channels) {
      using T = typename decltype(tag)::type;
      if (a.param_stride == 1 && tile_bytes() <= kSharedBytes) {
        Grid tiles = grid(kTile);
        tiles.shared = static_cast<size_t>(tile_bytes());
        launcher.run<mixture_tiled<T, channels(), Backward>>(tiles, a);
      } else {
        launcher.run<mixture_strided<T, channels(), Backward>>(grid(128), a);
      }
    });
  }
};

Tensor logistic_mixture_log_prob(const Tensor& x, const Tensor& params, int64_t bins) {
  const char* op = "logistic_mixture_log_prob";
  const MixtureSizes sizes = check_mixture(op, x, params, bins);
  std::vector<int64_t> shape;
  Tensor log_prob = torch::stable::new_empty(params, mixture_shape(params, 0, shape), ScalarType::Float);
  if (log_prob.numel() == 0) return log_prob;
  Call call(op, params, sizes);
  call.take_x(x);
  call.a.log_prob = log_prob.mutable_data_ptr<float>();
  call.run<false>();
  return log_prob;
}

Tensor logistic_mixture_log_prob_backward(const Tensor& grad, const Tensor& x, const Tensor& params, int64_t bins) {
  const char* op = "logistic_mixture_log_prob_backward";
  const MixtureSizes sizes = check_mixture(op, x, params, bins);
  require_mixture_grad(op, grad, sizes);
  Tensor dparams = torch::stable::empty_like(params);
  if (dparams.numel() == 0) return dparams;
  Call call(op, params, sizes);
  call.take_x(x);
  call.launcher.require_here("grad", grad);
  call.a.grad = grad.const_data_ptr<float>();
  call.a.dparams = Samples(dparams);
  call.run<true>();
  return dparams;
}

Tensor logistic_mixture_sample(const Tensor& params, int64_t channels, int64_t bins, double temperature, const Tensor& seed,
                               const OptionalTensor& sample_ids, int64_t step) {
  const char* op = "logistic_mixture_sample";
  const MixtureSizes sizes = check_mixture(op, params, channels, bins);
  std::vector<int64_t> shape;
  Tensor x = torch::stable::new_empty(params, mixture_shape(params, channels, shape), ScalarType::Float);
  if (x.numel() == 0) return x;
  Call call(op, params, sizes);
  call.a.x = x.mutable_data_ptr<float>();
  call.a.noise = Noise(call.launcher, op, seed, sample_ids, std::nullopt, sizes.batch);
  call.a.step = static_cast<uint32_t>(step);
  call.a.temperature = static_cast<float>(temperature);
  call.a.inverse_temperature = static_cast<float>(1 / temperature);
  call.with_kind([&](auto tag, auto count) {
    using T = typename decltype(tag)::type;
    call.launcher.run<mixture_sample<T, count()>>(call.grid(128), call.a);
  });
  return x;
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("logistic_mixture_log_prob", TORCH_BOX(&genengine::logistic_mixture_log_prob));
  m.impl("logistic_mixture_log_prob_backward", TORCH_BOX(&genengine::logistic_mixture_log_prob_backward));
  m.impl("logistic_mixture_sample", TORCH_BOX(&genengine::logistic_mixture_sample));
}
