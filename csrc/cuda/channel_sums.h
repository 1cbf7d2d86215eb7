// What bias_act and glu share on CUDA: teams of threads over columns, activations chosen at run time (uniform branches, and
// an eighth of the kernels), and the second stage of sums over all dimensions but the channels'.
#pragma once
#include "activation_checks.h"
#include "cuda/launch.h"

namespace genengine {

constexpr int kGroup = 32;  // partial sums added before they join the total: the error grows with its size alone

template <class Body>
__device__ __forceinline__ void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::linear: return body(Tag<Activation::linear>{});
    case Activation::relu: return body(Tag<Activation::relu>{});
    case Activation::lrelu: return body(Tag<Activation::lrelu>{});
    case Activation::silu: return body(Tag<Activation::silu>{});
    case Activation::gelu: return body(Tag<Activation::gelu>{});
    case Activation::gelu_tanh: return body(Tag<Activation::gelu_tanh>{});
    case Activation::tanh: return body(Tag<Activation::tanh>{});
    case Activation::sigmoid: return body(Tag<Activation::sigmoid>{});
  }
}

// V values of a vector along the channels, whatever its dtype and alignment; zeros if there is none.
struct ChannelVector {
  const void* base = nullptr;
  int64_t stride = 0;
  Type type = Type::f32;
  ChannelVector() = default;
  explicit ChannelVector(const OptionalTensor& vector) {
    if (!vector) return;
    base = vector->const_data_ptr();
    stride = vector->stride(0);
    type = type_of("bias", "bias", *vector);
  }
  __device__ __forceinline__ float at(int64_t channel) const {
    if (base == nullptr) return 0.f;
    const int64_t i = channel * stride;
    if (type == Type::f32) return static_cast<const float*>(base)[i];
    if (type == Type::f16) return widen(static_cast<const __half*>(base)[i]);
    return widen(static_cast<const __nv_bfloat16*>(base)[i]);
  }
};

// Threads for `teams` teams that each cover `items` columns (of V elements) or a tile of 256 of them.
inline Grid team_grid(const char* op, int64_t teams, int across) {
  const int down = kThreads / across;
  const int64_t blocks = (teams + down - 1) / down;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too many elements for one launch");
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(across), static_cast<unsigned>(down))};
}

inline int threads_across(int64_t items) {
  int across = 32;
  while (across < kThreads && across < items) across *= 2;
  return across;
}

__device__ __forceinline__ int64_t team_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// out (C) = the sum of partial (outer, C, inner), terms in the order of memory, in groups.
template <class T>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(const float* partial, T* out, int64_t outer, int64_t channels, int64_t inner) {
  const int64_t channel = item_index();
  if (channel >= channels) return;
  float total = 0.f, some = 0.f;
  int count = 0;
  for (int64_t a = 0; a < outer; ++a) {
    for (int64_t b = 0; b < inner; ++b) {
      some += partial[(a * channels + channel) * inner + b];
      if (++count == kGroup) {
        total += some;
        some = 0.f;
        count = 0;
      }
    }
  }
  out[channel] = narrow<T>(total + some);
}

inline Tensor channel_sums(const Launcher& launcher, const Tensor& like, const Tensor& partial, int64_t outer, int64_t inner) {
  const int64_t channels = like.size(0);
  Tensor out = torch::stable::new_empty(like, {channels});
  with_type(type_of("bias", "bias", like), [&](auto tag) {
    using T = typename decltype(tag)::type;
    launcher.run<channel_sums_kernel<T>>(grid_over(channels), partial.const_data_ptr<float>(), static_cast<T*>(out.mutable_data_ptr()),
                                         outer, channels, inner);
  });
  return out;
}

}  // namespace genengine
