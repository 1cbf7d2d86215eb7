// guidance_moments on CUDA. A block sums a run of one sample, every thread 16 bytes of both branches at a time; then a warp
// adds the runs of a sample. Which thread takes which elements depends on neither the batch nor the alignment, and zeros
// stand in beyond the end: the same bits for a sample in any batch. float32 within a block, double over blocks.
#include "genengine/guidance_moments.h"

#include "cuda/launch.h"

namespace genengine {

constexpr int kTurns = 4;  // 16-byte groups that each thread takes of either branch

struct MomentsArguments {
  Samples u, c;
  float* partial;  // (B, blocks of a sample, kMoments)
  int64_t batch, per;
};

// The sums over a block of kThreads, one moment in each of the first threads.
__device__ __forceinline__ float block_sums(float (&sums)[kMoments]) {
  __shared__ float warps[kMoments][kThreads / 32];
#pragma unroll
  for (int j = 0; j < kMoments; ++j) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], offset);
    if (threadIdx.x % 32 == 0) warps[j][threadIdx.x / 32] = sums[j];
  }
  __syncthreads();
  float total = 0.f;
  if (threadIdx.x < kMoments) {
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += warps[threadIdx.x][w];
  }
  __syncthreads();  // before the next sample's
  return total;
}

template <class T, bool Whole, int N>
__device__ __forceinline__ void load_group(const T* sample, int64_t item, int64_t per, float (&values)[N]) {
  const int64_t first = item * N;
  if constexpr (Whole) {  // per is a multiple of N, and samples are aligned
    Wide<N>::convert(Wide<N>(item).fetch(sample, first < per), values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = first + i < per ? widen(sample[first + i]) : 0.f;
  }
}

template <class T, bool Whole>
__device__ __forceinline__ void sum_runs(const MomentsArguments& a) {
  constexpr int kElements = 16 / sizeof(T);
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    float sums[kMoments] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t item = (static_cast<int64_t>(blockIdx.x) * kTurns + turn) * kThreads + threadIdx.x;
      float u[kElements], c[kElements];
      load_group<T, Whole>(a.u.at<const T>(b), item, a.per, u);
      load_group<T, Whole>(a.c.at<const T>(b), item, a.per, c);
#pragma unroll
      for (int i = 0; i < kElements; ++i) add_moments(u[i], c[i], sums);
    }
    const float total = block_sums(sums);
    if (threadIdx.x < kMoments) a.partial[(b * gridDim.x + blockIdx.x) * kMoments + threadIdx.x] = total;
  }
}

template <class T>
__global__ void GENENGINE_BOUNDS guidance_moments_vectorised(const __grid_constant__ MomentsArguments a) {
  sum_runs<T, true>(a);
}

template <class T>
__global__ void GENENGINE_BOUNDS guidance_moments_scattered(const __grid_constant__ MomentsArguments a) {
  sum_runs<T, false>(a);
}

// A warp for each sample and moment.
__global__ void GENENGINE_BOUNDS guidance_moments_sum(const float* partial, float* out, int64_t batch, int64_t blocks) {
  const int64_t k = item_index() / 32;
  if (k >= batch * kMoments) return;
  const int64_t b = k / kMoments, j = k % kMoments;
  double total = 0.0;
  for (int64_t i = threadIdx.x % 32; i < blocks; i += 32) total += partial[(b * blocks + i) * kMoments + j];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  if (threadIdx.x % 32 == 0) out[k] = static_cast<float>(total);
}

namespace {

Tensor guidance_moments(const Tensor& u, const Tensor& c) {
  const char* op = "guidance_moments";
  const int64_t batch = u.size(0), per = per_sample(u);
  Tensor out = torch::stable::new_zeros(u, {batch, kMoments}, ScalarType::Float);
  if (batch == 0 || per == 0) return out;
  require_layout(op, "c", c, u, common_layout(op, u));
  STD_TORCH_CHECK(c.scalar_type() == u.scalar_type(), op, ": c must have u's dtype");
  const Launcher launcher(op, u);
  launcher.require_here("c", c);
  const int64_t elements = 16 / static_cast<int64_t>(u.element_size()), run = kTurns * kThreads * elements;
  const int64_t blocks = (per + run - 1) / run, rows = batch < 65535 ? batch : 65535;
  Tensor partial = torch::stable::new_empty(u, {batch, blocks, kMoments}, ScalarType::Float);
  const MomentsArguments a{Samples(u), Samples(c), partial.mutable_data_ptr<float>(), batch, per};
  const Grid grid{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows)), dim3(kThreads)};
  const bool whole = per % elements == 0 && aligned_samples(u) && aligned_samples(c);
  with_type(type_of(op, "u", u), [&](auto tag) {
    using T = typename decltype(tag)::type;
    whole ? launcher.run<guidance_moments_vectorised<T>>(grid, a) : launcher.run<guidance_moments_scattered<T>>(grid, a);
  });
  launcher.run<guidance_moments_sum>(grid_over(32 * batch * kMoments), a.partial, out.mutable_data_ptr<float>(), batch, blocks);
  return out;
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) { m.impl("guidance_moments", TORCH_BOX(&genengine::guidance_moments)); }
