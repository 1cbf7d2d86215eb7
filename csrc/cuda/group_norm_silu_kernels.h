// The CUDA kernels of group_norm_silu and its backward. A group of consecutive memory that fits in the registers of a block
// is read once; otherwise moments of every channel over chunks, their merging per group (Chan et al. 1983), and an
// elementwise pass, so that few groups still fill the GPU. Backward: sums per channel and chunk, per group, then dx.
// Bytes and FLOPs: genengine/group_norm_silu.h. Float32, sums in an order that depends on the shape alone, no atomics.
//
// A sample is a matrix of lines: channels_last has a line per pixel and a column per channel, C order a line per channel and
// a column per pixel. A thread takes V neighbouring columns in one 16-byte access where all is aligned, else V = 1.
#pragma once
#include "cuda/adaln_kernels.h"  // a team and its registers
#include "genengine/group_norm_silu.h"

namespace genengine {

constexpr int kLines = 4;         // that a thread of an elementwise kernel takes
constexpr int kChunkPixels = 64;  // channels_last: of a block of the summing kernels, 32 columns of threads by 8 lines
constexpr int kChunkLine = 2048;  // C order: of a warp, which takes one channel; 64 elements for each lane

struct GroupNormArguments {
  const void *x, *grad;
  void* out;
  int64_t x_batch, grad_batch;
  // add_group_norm_silu: sum = x + branch is written as x is read; its backward adds grad_x to dx. Or null.
  const void *branch, *grad_x;
  void* sum;  // dense
  int64_t branch_batch, grad_x_batch;
  const void *weight, *bias, *scale, *shift;  // or null
  int64_t scale_batch, shift_batch;
  Type parameter_type, modulation_type;
  float *mean, *rstd;  // (B, G)
  float* partial;      // (B, chunks, 2, C): means and centred squares, or sum(dv) and sum(dv x^)
  float* rows;         // (B, 5, C): mean, gain, offset, and of the backward rstd mean(g), rstd^2 mean(g x^)
  float* sums;         // (B, 2, C): sum(dv), sum(dv x^)
  void *dweight, *dbias, *dscale, *dshift;
  int64_t batch, channels, pixels;
  int groups, group_channels, chunks, chunk_pixels;  // 32 bits: a division of 64 is a call, and calls spill
  float eps;
  bool silu;
};

__device__ __forceinline__ float element(Type type, const void* from, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(from)[i];
  if (type == Type::f16) return widen(static_cast<const __half*>(from)[i]);
  return widen(static_cast<const __nv_bfloat16*>(from)[i]);
}
__device__ __forceinline__ void set_element(Type type, void* to, int64_t i, float value) {
  if (type == Type::f32) static_cast<float*>(to)[i] = value;
  if (type == Type::f16) static_cast<__half*>(to)[i] = narrow<__half>(value);
  if (type == Type::bf16) static_cast<__nv_bfloat16*>(to)[i] = narrow<__nv_bfloat16>(value);
}

// Within two units in the last place, and without the calls of an exact root and division.
__device__ __forceinline__ float group_norm_rstd(float squares, int64_t size, float eps) {
  return rsqrtf(__fdividef(squares, static_cast<float>(size)) + eps);
}

__device__ __forceinline__ GroupNormFold fold(const GroupNormArguments& a, int64_t b, int64_t c, float rstd) {
  const float weight = a.weight ? element(a.parameter_type, a.weight, c) : 1.f;
  const float bias = a.bias ? element(a.parameter_type, a.bias, c) : 0.f;
  const float scale = a.scale ? element(a.modulation_type, a.scale, b * a.scale_batch + c) : 0.f;
  const float shift = a.shift ? element(a.modulation_type, a.shift, b * a.shift_batch + c) : 0.f;
  return group_norm_fold_channel(rstd, weight, bias, scale, shift);
}

__device__ __forceinline__ void write_rows(const GroupNormArguments& a, int64_t b, int64_t c, float mean, float rstd) {
  const GroupNormFold folded = fold(a, b, c, rstd);
  float* row = a.rows + b * 5 * a.channels + c;
  row[0] = mean;
  row[a.channels] = folded.gain;
  row[2 * a.channels] = folded.offset;
}

// V elements of sample b from `at` of the rest; with a branch their sum, as it was rounded and written.
template <class T, int V>
__device__ __forceinline__ void read_sum(const GroupNormArguments& a, int64_t b, int64_t at, float* x) {
  read<V>(static_cast<const T*>(a.x) + b * a.x_batch + at, x);
  if (!a.branch) return;
  float branch[V];
  read<V>(static_cast<const T*>(a.branch) + b * a.branch_batch + at, branch);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = widen(narrow<T>(x[i] + branch[i]));
  write<V>(static_cast<T*>(a.sum) + b * a.channels * a.pixels + at, x);
}

// ---- moments ---------------------------------------------------------------------------------------------------------

struct Moments {
  float count, mean, squares;  // squares: of the deviations from the mean
};

__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count, share = count > 0.f ? __fdividef(b.count, count) : 0.f, apart = b.mean - a.mean;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * (a.count * share)};
}

// Over the lanes of a warp; a pair merges in one order, the lower lane's first.
__device__ __forceinline__ Moments merged_warp(Moments m) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float count = __shfl_xor_sync(0xffffffffu, m.count, offset), mean = __shfl_xor_sync(0xffffffffu, m.mean, offset);
    const float squares = __shfl_xor_sync(0xffffffffu, m.squares, offset);
    const bool upper = threadIdx.x & offset;
    const Moments low{upper ? count : m.count, upper ? mean : m.mean, upper ? squares : m.squares};
    const Moments high{upper ? m.count : count, upper ? m.mean : mean, upper ? m.squares : squares};
    m = merged(low, high);
  }
  return m;
}

// Sums of deviations from the first value seen: at most 64 values, so little is lost even if that one lies far off.
struct Deviations {
  float pivot = 0.f, first = 0.f, second = 0.f, count = 0.f;
  __device__ __forceinline__ void add(float x) {
    pivot = count == 0.f ? x : pivot;
    const float d = x - pivot;
    first += d;
    second += d * d;
    count += 1.f;
  }
  __device__ __forceinline__ Moments moments() const {
    const float mean = count > 0.f ? __fdividef(first, count) : 0.f, squares = second - first * mean;
    return {count, pivot + mean, squares < 0.f ? 0.f : squares};
  }
};

// ---- sums over chunks: Sum is Deviations and Moments, or sums of gradients -------------------------------------------

struct MomentSum {
  Deviations d;
  __device__ __forceinline__ void add(const GroupNormArguments&, float x, float, float, const GroupNormFold&) { d.add(x); }
};

struct GradientSum {
  float p = 0.f, q = 0.f;
  __device__ __forceinline__ void add(const GroupNormArguments& a, float x, float grad, float mean, const GroupNormFold& f) {
    const float dv = a.silu ? grad * silu_slope(group_norm_v(x, mean, f)) : grad;
    p += dv;
    q += dv * (x - mean);
  }
};

__device__ __forceinline__ void finish(const GroupNormArguments& a, int64_t b, int64_t chunk, int64_t c, float first, float second) {
  float* at = a.partial + (b * a.chunks + chunk) * 2 * a.channels + c;
  at[0] = first;
  at[a.channels] = second;
}

// channels_last. Blocks of (32, 8) threads: blockIdx.x over tiles of columns, blockIdx.y over (sample, chunk).
template <class T, int V, bool Backward>
__device__ __forceinline__ void column_sums(const GroupNormArguments& a) {
  using Sum = std::conditional_t<Backward, GradientSum, MomentSum>;
  __shared__ float shared[3][8][32 * V];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * V;
  const int tasks = static_cast<int>(a.batch) * a.chunks;
  for (int task = blockIdx.y; task < tasks; task += gridDim.y) {
    const int64_t b = task / a.chunks, chunk = task % a.chunks, first = chunk * kChunkPixels;
    const int64_t last = first + kChunkPixels < a.pixels ? first + kChunkPixels : a.pixels;
    Sum sums[V];
    if (column < a.channels) {
      const float* rows = a.rows + b * 5 * a.channels + column;
      float mean[V] = {}, gain[V] = {}, offset[V] = {};
      if constexpr (Backward) {
        read<V>(rows, mean);
        read<V>(rows + a.channels, gain);
        read<V>(rows + 2 * a.channels, offset);
      }
      for (int64_t pixel = first + threadIdx.y; pixel < last; pixel += 8) {
        float x[V], grad[V] = {};
        read_sum<T, V>(a, b, pixel * a.channels + column, x);
        if constexpr (Backward) read<V>(static_cast<const T*>(a.grad) + b * a.grad_batch + pixel * a.channels + column, grad);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i].add(a, x[i], grad[i], mean[i], {gain[i], offset[i]});
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int at = i * 32 + threadIdx.x;
      if constexpr (Backward) {
        shared[0][threadIdx.y][at] = sums[i].p;
        shared[1][threadIdx.y][at] = sums[i].q;
      } else {
        const Moments m = sums[i].d.moments();
        shared[0][threadIdx.y][at] = m.count;
        shared[1][threadIdx.y][at] = m.mean;
        shared[2][threadIdx.y][at] = m.squares;
      }
    }
    __syncthreads();
    for (int k = threadIdx.y; k < V; k += 8) {
      const int at = k * 32 + threadIdx.x;
      const int64_t c = column + k;
      if (c >= a.channels) continue;
      Moments total{0.f, 0.f, 0.f};
      for (int y = 0; y < 8; ++y) {
        if constexpr (Backward) {
          total.mean += shared[0][y][at];
          total.squares += shared[1][y][at];
        } else {
          total = merged(total, {shared[0][y][at], shared[1][y][at], shared[2][y][at]});
        }
      }
      finish(a, b, chunk, c, total.mean, Backward ? total.squares * a.rstd[b * a.groups + static_cast<int>(c) / a.group_channels] : total.squares);
    }
    __syncthreads();
  }
}

// C order. A warp for each (sample, chunk, channel), eight to a block.
template <class T, int V, bool Backward>
__device__ __forceinline__ void line_sums(const GroupNormArguments& a) {
  using Sum = std::conditional_t<Backward, GradientSum, MomentSum>;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (task >= a.batch * a.chunks * a.channels) return;  // a whole warp
  const int64_t c = task % a.channels, chunk = task / a.channels % a.chunks, b = task / a.channels / a.chunks;
  const int64_t first = chunk * a.chunk_pixels, end = first + a.chunk_pixels;
  const int64_t last = end < a.pixels ? end : a.pixels, group = b * a.groups + static_cast<int>(c) / a.group_channels;
  float mean = 0.f;
  GroupNormFold folded{};
  if constexpr (Backward) {
    mean = a.mean[group];
    folded = fold(a, b, c, a.rstd[group]);
  }
  Sum sum;
  for (int64_t pixel = first + threadIdx.x * V; pixel < last; pixel += 32 * V) {
    float x[V], grad[V] = {};
    read_sum<T, V>(a, b, c * a.pixels + pixel, x);
    if constexpr (Backward) read<V>(static_cast<const T*>(a.grad) + b * a.grad_batch + c * a.pixels + pixel, grad);
#pragma unroll
    for (int i = 0; i < V; ++i) sum.add(a, x[i], grad[i], mean, folded);
  }
  if constexpr (Backward) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum.p += __shfl_xor_sync(0xffffffffu, sum.p, offset);
      sum.q += __shfl_xor_sync(0xffffffffu, sum.q, offset);
    }
    if (threadIdx.x == 0) finish(a, b, chunk, c, sum.p, sum.q * a.rstd[group]);
  } else {
    const Moments total = merged_warp(sum.d.moments());
    if (threadIdx.x == 0) finish(a, b, chunk, c, total.mean, total.squares);
  }
}

template <class T, int V, bool Last, bool Backward>
__device__ __forceinline__ void chunk_sums(const GroupNormArguments& a) {
  if constexpr (Last)
    column_sums<T, V, Backward>(a);
  else
    line_sums<T, V, Backward>(a);
}

template <class T, int V, bool Last, bool Backward>
__global__ void GENENGINE_BOUNDS group_norm_sums_vectorised(const __grid_constant__ GroupNormArguments a) {
  chunk_sums<T, V, Last, Backward>(a);
}
template <class T, bool Last, bool Backward>
__global__ void GENENGINE_BOUNDS group_norm_sums_single(const __grid_constant__ GroupNormArguments a) {
  chunk_sums<T, 1, Last, Backward>(a);
}

// ---- a group from its chunks: a block for each (sample, group) ---------------------------------------------------------

static __global__ void __launch_bounds__(kThreads) group_norm_statistics_kernel(const __grid_constant__ GroupNormArguments a) {
  __shared__ Moments warps[kThreads / 32];
  const int group = static_cast<int>(blockIdx.x);
  const int64_t b = group / a.groups, begin = static_cast<int64_t>(group % a.groups) * a.group_channels;
  const int entries = a.chunks * a.group_channels;
  Moments total{0.f, 0.f, 0.f};
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int64_t chunk = i / a.group_channels, c = begin + i % a.group_channels;
    const float* at = a.partial + (b * a.chunks + chunk) * 2 * a.channels + c;
    const int64_t left = a.pixels - chunk * a.chunk_pixels;
    total = merged(total, {static_cast<float>(left < a.chunk_pixels ? left : a.chunk_pixels), at[0], at[a.channels]});
  }
  total = merged_warp(total);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  total = warps[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) total = merged(total, warps[warp]);
  const float rstd = group_norm_rstd(total.squares, a.group_channels * a.pixels, a.eps);
  if (threadIdx.x == 0) {
    a.mean[group] = total.mean;
    a.rstd[group] = rstd;
  }
  for (int64_t c = threadIdx.x; c < a.group_channels; c += kThreads) write_rows(a, b, begin + c, total.mean, rstd);
}

// Before the backward's sums: mean, gain and offset of every (sample, channel).
static __global__ void __launch_bounds__(kThreads) group_norm_rows_kernel(const __grid_constant__ GroupNormArguments a) {
  const int64_t i = item_index();
  if (i >= a.batch * a.channels) return;
  const int64_t b = i / a.channels, c = i % a.channels, group = b * a.groups + static_cast<int>(c) / a.group_channels;
  write_rows(a, b, c, a.mean[group], a.rstd[group]);
}

// A warp adds up the chunks of one channel at a time.
static __global__ void __launch_bounds__(kThreads) group_norm_backward_groups_kernel(const __grid_constant__ GroupNormArguments a) {
  __shared__ float slots[kMaxWarps][2];
  const int group = static_cast<int>(blockIdx.x);
  const int64_t b = group / a.groups, begin = static_cast<int64_t>(group % a.groups) * a.group_channels;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float means[2] = {0.f, 0.f};
  for (int64_t c = begin + warp; c < begin + a.group_channels; c += kThreads / 32) {
    float p = 0.f, q = 0.f;
    for (int64_t chunk = lane; chunk < a.chunks; chunk += 32) {
      const float* at = a.partial + (b * a.chunks + chunk) * 2 * a.channels + c;
      p += at[0];
      q += at[a.channels];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      p += __shfl_xor_sync(0xffffffffu, p, offset);
      q += __shfl_xor_sync(0xffffffffu, q, offset);
    }
    if (lane != 0) continue;
    a.sums[b * 2 * a.channels + c] = p;
    a.sums[(b * 2 + 1) * a.channels + c] = q;
    const float k = fold(a, b, c, 1.f).gain;
    means[0] += k * p;
    means[1] += k * q;
    if (a.scale) {
      const float weight = a.weight ? element(a.parameter_type, a.weight, c) : 1.f;
      const float bias = a.bias ? element(a.parameter_type, a.bias, c) : 0.f;
      set_element(a.modulation_type, a.dscale, b * a.channels + c, weight * q + bias * p);
      set_element(a.modulation_type, a.dshift, b * a.channels + c, p);
    }
  }
  team_sum(means, slots);
  const float size = static_cast<float>(a.group_channels * a.pixels), rstd = a.rstd[group];
  for (int64_t c = begin + threadIdx.x; c < begin + a.group_channels; c += kThreads) {
    float* row = a.rows + (b * 5 + 3) * a.channels + c;
    row[0] = __fdividef(means[0], size) * rstd;
    row[a.channels] = __fdividef(means[1], size) * rstd * rstd;
  }
}

static __global__ void __launch_bounds__(kThreads)
    group_norm_backward_parameters_kernel(const __grid_constant__ GroupNormArguments a) {
  const int64_t c = item_index();
  if (c >= a.channels) return;
  float dweight = 0.f, dbias = 0.f;
  for (int64_t first = 0; first < a.batch; first += kChunk) {  // in groups: the error grows with their size alone
    const int64_t last = first + kChunk < a.batch ? first + kChunk : a.batch;
    float some_weight = 0.f, some_bias = 0.f;
    for (int64_t b = first; b < last; ++b) {
      const float factor = 1.f + (a.scale ? element(a.modulation_type, a.scale, b * a.scale_batch + c) : 0.f);
      some_bias += a.sums[b * 2 * a.channels + c] * factor;
      some_weight += a.sums[(b * 2 + 1) * a.channels + c] * factor;
    }
    dweight += some_weight;
    dbias += some_bias;
  }
  set_element(a.parameter_type, a.dweight, c, dweight);
  set_element(a.parameter_type, a.dbias, c, dbias);
}

// ---- y, or dx ----------------------------------------------------------------------------------------------------------

template <int V>
struct Constants {
  float mean[V], gain[V], offset[V], mean_g[V], mean_gx[V];
};

// The constants of V columns, or of one line, in all V places.
template <int V, bool Last, bool Backward>
__device__ __forceinline__ void load_constants(const GroupNormArguments& a, int64_t b, int64_t c, Constants<V>& to) {
  const float* row = a.rows + b * 5 * a.channels + c;
  const auto get = [&](int k, float (&values)[V]) {
    if constexpr (Last) {
      read<V>(row + k * a.channels, values);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = row[k * a.channels];
    }
  };
  get(0, to.mean);
  get(1, to.gain);
  get(2, to.offset);
  if constexpr (Backward) {
    get(3, to.mean_g);
    get(4, to.mean_gx);
  }
}

template <class T, int V, bool Last, bool Backward>
__device__ __forceinline__ void apply_lines(const GroupNormArguments& a) {
  const int64_t width = Last ? a.channels : a.pixels, lines = Last ? a.pixels : a.channels, vectors = width / V;
  const int64_t column = item_index() % vectors * V, first = item_index() / vectors * kLines;
  if (first >= lines) return;
  for (int64_t b = first_sample(); b < a.batch; b += sample_stride()) {
    Constants<V> k;
    if constexpr (Last) load_constants<V, Last, Backward>(a, b, column, k);
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      if (first + line >= lines) break;
      if constexpr (!Last) load_constants<V, Last, Backward>(a, b, first + line, k);
      const int64_t at = (first + line) * width + column;
      float x[V], grad[V], grad_x[V] = {};
      read<V>(static_cast<const T*>(a.x) + b * a.x_batch + at, x);
      if constexpr (Backward) read<V>(static_cast<const T*>(a.grad) + b * a.grad_batch + at, grad);
      if constexpr (Backward)
        if (a.grad_x) read<V>(static_cast<const T*>(a.grad_x) + b * a.grad_x_batch + at, grad_x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float v = group_norm_v(x[i], k.mean[i], {k.gain[i], k.offset[i]});
        if constexpr (Backward) {
          const float dv = a.silu ? grad[i] * silu_slope(v) : grad[i];
          x[i] = grad_x[i] + (dv * k.gain[i] - multiply_add(x[i] - k.mean[i], k.mean_gx[i], k.mean_g[i]));
        } else {
          x[i] = a.silu ? silu(v) : v;
        }
      }
      write<V>(static_cast<T*>(a.out) + b * a.channels * a.pixels + at, x);
    }
  }
}

template <class T, int V, bool Last, bool Backward>
__global__ void GENENGINE_BOUNDS group_norm_apply_vectorised(const __grid_constant__ GroupNormArguments a) {
  apply_lines<T, V, Last, Backward>(a);
}
template <class T, bool Last, bool Backward>
__global__ void GENENGINE_BOUNDS group_norm_apply_single(const __grid_constant__ GroupNormArguments a) {
  apply_lines<T, 1, Last, Backward>(a);
}

// ---- a group in registers: C order, a block for each (sample, group) ----------------------------------------------------

template <class T, int V, int Items>
__global__ void __launch_bounds__(512) group_norm_group_vectorised(const __grid_constant__ GroupNormArguments a) {
  __shared__ float slots[2][kMaxWarps][1];
  const int group = static_cast<int>(blockIdx.x);
  const int64_t b = group / a.groups, begin = static_cast<int64_t>(group % a.groups) * a.group_channels;
  const int size = static_cast<int>(a.group_channels * a.pixels), pixels = static_cast<int>(a.pixels);
  float x[V * Items], sum[1] = {0.f}, squares[1] = {0.f};
  each_group<V, Items>(size, [&](int k, int at) {
    read_sum<T, V>(a, b, begin * a.pixels + at, x + k);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[0] += x[k + i];
  });
  team_sum(sum, slots[0]);
  const float mean = sum[0] / static_cast<float>(size);
  each_group<V, Items>(size, [&](int k, int) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[k + i] -= mean;
      squares[0] += x[k + i] * x[k + i];
    }
  });
  team_sum(squares, slots[1]);
  const float rstd = group_norm_rstd(squares[0], size, a.eps);
  if (threadIdx.x == 0) {
    a.mean[group] = mean;
    a.rstd[group] = rstd;
  }
  T* to = static_cast<T*>(a.out) + (b * a.channels + begin) * a.pixels;
  each_group<V, Items>(size, [&](int k, int at) {
    const GroupNormFold folded = fold(a, b, begin + at / pixels, rstd);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float v = group_norm_v(x[k + i], 0.f, folded);
      x[k + i] = a.silu ? silu(v) : v;
    }
    write<V>(to + at, x + k);
  });
}

}  // namespace genengine
