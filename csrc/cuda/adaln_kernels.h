// The kernels of adaln, gated_adaln and their backwards. A team of threads holds one row in registers: a warp for
// D <= 1024 (then eight rows share a block), else a block. Forward: one read, one write (gated two and two). Backward: a
// team walks over kChunk tokens and keeps their dscale, dshift, dgate in registers; a second kernel adds the chunks up.
// Accumulates in float32, without fused multiply-add, in an order that depends on D and N alone: no atomics.
// 16-byte accesses where pointers, strides and D allow, else single elements in larger teams.
#pragma once
#include "cuda/launch.h"
#include "genengine/adaln.h"

namespace genengine {

constexpr int kChunk = 16;     // tokens per partial sum, and partial sums per group
constexpr int kMaxWarps = 32;   // of a team

struct Tokens {  // (B, N, D), innermost stride 1
  const void* base = nullptr;
  int64_t batch = 0, token = 0;
  template <class T>
  __device__ __forceinline__ const T* at(int64_t b, int64_t n) const {
    return static_cast<const T*>(base) + b * batch + n * token;
  }
};

struct Rows {  // (B, D), innermost stride 1
  const void* base = nullptr;
  int64_t batch = 0;
  template <class T>
  __device__ __forceinline__ const T* at(int64_t b) const {
    return static_cast<const T*>(base) + b * batch;
  }
};

struct AdalnForwardArguments {
  Tokens x, branch;
  Rows gate, scale, shift;
  void *x_out, *h;
  int64_t tokens, rows;
  int dim;
  float eps;
};

struct AdalnBackwardArguments {
  Tokens grad_x, grad_h, x, branch;
  Rows gate, scale;
  void *dx, *dbranch;
  float* partial;  // (B, chunks, 3, D): dscale, dshift, dgate
  int64_t tokens, chunks, tasks;
  int dim;
  float eps;
};

// ---- a team and its registers ----------------------------------------------------------------------------------------

// body(k, column) for the groups of V elements that this thread holds, at registers k .. k + V - 1.
template <int V, int Items, class Body>
__device__ __forceinline__ void each_group(int dim, Body body) {
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int column = (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V;
    if (column < dim) body(i * V, column);
  }
}

// Sums over the team, in every thread. `slots` must not be read by an earlier sum that some thread may not have finished:
// two other sums, or a barrier, in between.
template <int Count>
__device__ __forceinline__ void team_sum(float (&values)[Count], float (&slots)[kMaxWarps][Count]) {
#pragma unroll
  for (int k = 0; k < Count; ++k)
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
  if (blockDim.x == 32) return;  // the team is this warp
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < Count; ++k) slots[threadIdx.x / 32][k] = values[k];
  __syncthreads();
  const int warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < Count; ++k) values[k] = 0.f;
  for (int warp = 0; warp < warps; ++warp)
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] += slots[warp][k];
}

// x becomes x - mean; registers outside the row stay as they are. Returns 1 / sqrt(var + eps).
template <int V, int Items>
__device__ __forceinline__ float centre(float (&x)[V * Items], int dim, float eps, float (&slots)[2][kMaxWarps][1]) {
  float sum[1] = {0.f}, squares[1] = {0.f};
  each_group<V, Items>(dim, [&](int k, int) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[0] += x[k + i];
  });
  team_sum(sum, slots[0]);
  const float mean = sum[0] / static_cast<float>(dim);
  each_group<V, Items>(dim, [&](int k, int) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[k + i] -= mean;
      squares[0] += x[k + i] * x[k + i];
    }
  });
  team_sum(squares, slots[1]);
  return adaln_rstd(squares[0], dim, eps);
}

// ---- forward ---------------------------------------------------------------------------------------------------------

template <class X, class M, bool Gated, int V, int Items>
__device__ __forceinline__ void forward_row(const AdalnForwardArguments& a, float (&slots)[2][kMaxWarps][1]) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;  // a whole team: no barrier waits for it
  const int64_t b = row / a.tokens, n = row - b * a.tokens;
  const X* x_row = a.x.at<X>(b, n);
  float x[V * Items];
  each_group<V, Items>(a.dim, [&](int k, int column) {
    read<V>(x_row + column, x + k);
    if constexpr (Gated) {
      float gate[V], branch[V];
      read<V>(a.gate.at<M>(b) + column, gate);
      read<V>(a.branch.at<M>(b, n) + column, branch);
#pragma unroll
      for (int i = 0; i < V; ++i) x[k + i] = widen(narrow<X>(adaln_gate(x[k + i], gate[i], branch[i])));
      write<V>(static_cast<X*>(a.x_out) + row * a.dim + column, x + k);
    }
  });
  const float rstd = centre<V, Items>(x, a.dim, a.eps, slots);
  each_group<V, Items>(a.dim, [&](int k, int column) {
    float scale[V], shift[V];
    read<V>(a.scale.at<M>(b) + column, scale);
    read<V>(a.shift.at<M>(b) + column, shift);
#pragma unroll
    for (int i = 0; i < V; ++i) x[k + i] = adaln_modulate(x[k + i] * rstd, 1.f + scale[i], shift[i]);
    write<V>(static_cast<M*>(a.h) + row * a.dim + column, x + k);
  });
}

// Groups of V elements, 16-byte accesses. Blocks of 256 threads, of which so many must fit at once: it bounds the registers.
template <int Elements>
constexpr int kForwardBlocks = Elements > 16 ? 2 : 4;

template <class X, class M, bool Gated, int V, int Items>
__global__ void __launch_bounds__(256, kForwardBlocks<V * Items>)
    adaln_forward_vectorised(const __grid_constant__ AdalnForwardArguments a) {
  __shared__ float slots[2][kMaxWarps][1];
  forward_row<X, M, Gated, V, Items>(a, slots);
}

// Single elements, eight per thread: D = 8192 takes 1024 threads.
template <class X, class M, bool Gated>
__global__ void __launch_bounds__(1024, 1) adaln_forward_single(const __grid_constant__ AdalnForwardArguments a) {
  __shared__ float slots[2][kMaxWarps][1];
  forward_row<X, M, Gated, 1, 8>(a, slots);
}

// ---- backward --------------------------------------------------------------------------------------------------------

template <int Elements>
struct Sums {
  float dscale[Elements] = {}, dshift[Elements] = {}, dgate[Elements] = {};
};

// Large teams have too few registers for three sums beside the row: dgate then takes a second loop, over the dx just written.
template <int V, int Items>
constexpr bool kSplit = V * Items > 8;

// dbranch = gate dx, dgate += branch dx, at V columns.
template <class M, int V>
__device__ __forceinline__ void backward_gate(const AdalnBackwardArguments& a, int64_t b, int64_t n, int column,
                                              const float (&dx)[V], float* dgate) {
  float other[V];
  read<V>(a.branch.at<M>(b, n) + column, other);
#pragma unroll
  for (int i = 0; i < V; ++i) dgate[i] += other[i] * dx[i];
  read<V>(a.gate.at<M>(b) + column, other);
#pragma unroll
  for (int i = 0; i < V; ++i) other[i] *= dx[i];
  write<V>(static_cast<M*>(a.dbranch) + (b * a.tokens + n) * a.dim + column, other);
}

template <class X, class M, bool Gated, int V, int Items>
__device__ __forceinline__ void backward_row(const AdalnBackwardArguments& a, int64_t b, int64_t n, Sums<V * Items>& sums,
                                             float (&slots)[2][kMaxWarps][1], float (&pair_slots)[kMaxWarps][2]) {
  const X* x_row = a.x.at<X>(b, n);
  float x[V * Items], g[V * Items], means[2] = {0.f, 0.f};
  each_group<V, Items>(a.dim, [&](int k, int column) {
    read<V>(x_row + column, x + k);
    read<V>(a.grad_h.at<M>(b, n) + column, g + k);
  });
  const float rstd = centre<V, Items>(x, a.dim, a.eps, slots);
  each_group<V, Items>(a.dim, [&](int k, int column) {
    float scale[V];
    read<V>(a.scale.at<M>(b) + column, scale);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[k + i] *= rstd;
      sums.dscale[k + i] += g[k + i] * x[k + i];
      sums.dshift[k + i] += g[k + i];
      g[k + i] *= 1.f + scale[i];
      means[0] += g[k + i];
      means[1] += g[k + i] * x[k + i];
    }
  });
  team_sum(means, pair_slots);
  const float mean_g = means[0] / static_cast<float>(a.dim), mean_gx = means[1] / static_cast<float>(a.dim);
  const int64_t out = (b * a.tokens + n) * a.dim;
  each_group<V, Items>(a.dim, [&](int k, int column) {
    float dx[V];
#pragma unroll
    for (int i = 0; i < V; ++i) dx[i] = adaln_dx(g[k + i], x[k + i], rstd, mean_g, mean_gx);
    if constexpr (Gated) {
      float grad_x[V];
      read<V>(a.grad_x.at<X>(b, n) + column, grad_x);
#pragma unroll
      for (int i = 0; i < V; ++i) dx[i] += grad_x[i];
      if constexpr (!kSplit<V, Items>) backward_gate<M, V>(a, b, n, column, dx, sums.dgate + k);
    }
    write<V>(static_cast<X*>(a.dx) + out + column, dx);
  });
}

template <class X, class M, bool Gated, int V, int Items>
__global__ void __launch_bounds__(V* Items > 8 ? 512 : 256)
    adaln_backward_vectorised(const __grid_constant__ AdalnBackwardArguments a) {
  __shared__ float slots[2][kMaxWarps][1], pair_slots[kMaxWarps][2];
  const int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (task >= a.tasks) return;  // a whole team
  const int64_t b = task / a.chunks, first = (task - b * a.chunks) * kChunk;
  const int64_t last = first + kChunk < a.tokens ? first + kChunk : a.tokens;
  Sums<V * Items> sums;
  for (int64_t n = first; n < last; ++n) backward_row<X, M, Gated, V, Items>(a, b, n, sums, slots, pair_slots);
  if constexpr (Gated && kSplit<V, Items>) {
    for (int64_t n = first; n < last; ++n) {
      const X* own = static_cast<const X*>(a.dx) + (b * a.tokens + n) * a.dim;
      each_group<V, Items>(a.dim, [&](int k, int column) {
        float dx[V];
        read<V, true>(own + column, dx);
        backward_gate<M, V>(a, b, n, column, dx, sums.dgate + k);
      });
    }
  }
  float* partial = a.partial + task * 3 * a.dim;
  each_group<V, Items>(a.dim, [&](int k, int column) {
    write<V>(partial + column, sums.dscale + k);
    write<V>(partial + a.dim + column, sums.dshift + k);
    if constexpr (Gated) write<V>(partial + 2 * a.dim + column, sums.dgate + k);
  });
}

// Single elements: the row is read again in every pass, and the sums stay in the partial sums' own memory, where each
// address belongs to one thread. In registers, eight columns each with its own addresses would spill.
template <class X, class M, bool Gated>
__device__ __forceinline__ void backward_row_single(const AdalnBackwardArguments& a, int64_t b, int64_t n, float* partial,
                                                    float (&slots)[2][kMaxWarps][1], float (&pair_slots)[kMaxWarps][2]) {
  const X* x = a.x.at<X>(b, n);
  const M *grad_h = a.grad_h.at<M>(b, n), *scale = a.scale.at<M>(b);
  const int first = threadIdx.x, step = blockDim.x, dim = a.dim;
  float sum[1] = {0.f}, squares[1] = {0.f}, means[2] = {0.f, 0.f};
  for (int c = first; c < dim; c += step) sum[0] += widen(x[c]);
  team_sum(sum, slots[0]);
  const float size = static_cast<float>(dim), mean = sum[0] / size;
  for (int c = first; c < dim; c += step) squares[0] += (widen(x[c]) - mean) * (widen(x[c]) - mean);
  team_sum(squares, slots[1]);
  const float rstd = adaln_rstd(squares[0], dim, a.eps);
  for (int c = first; c < dim; c += step) {
    const float x_hat = adaln_normalise(widen(x[c]), mean, rstd), g = widen(grad_h[c]) * (1.f + widen(scale[c]));
    partial[c] += widen(grad_h[c]) * x_hat;
    partial[dim + c] += widen(grad_h[c]);
    means[0] += g;
    means[1] += g * x_hat;
  }
  team_sum(means, pair_slots);
  for (int c = first; c < dim; c += step) {
    const float x_hat = adaln_normalise(widen(x[c]), mean, rstd), g = widen(grad_h[c]) * (1.f + widen(scale[c]));
    float dx[1] = {adaln_dx(g, x_hat, rstd, means[0] / size, means[1] / size)};
    if constexpr (Gated) {
      dx[0] += widen(a.grad_x.at<X>(b, n)[c]);
      backward_gate<M, 1>(a, b, n, c, dx, partial + 2 * dim + c);
    }
    static_cast<X*>(a.dx)[(b * a.tokens + n) * dim + c] = narrow<X>(dx[0]);
  }
}

template <class X, class M, bool Gated>
__global__ void __launch_bounds__(kThreads) adaln_backward_single(const __grid_constant__ AdalnBackwardArguments a) {
  __shared__ float slots[2][kMaxWarps][1], pair_slots[kMaxWarps][2];
  const int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (task >= a.tasks) return;  // a whole team
  const int64_t b = task / a.chunks, first = (task - b * a.chunks) * kChunk;
  const int64_t last = first + kChunk < a.tokens ? first + kChunk : a.tokens;
  float* partial = a.partial + task * 3 * a.dim;
  for (int c = threadIdx.x; c < a.dim; c += blockDim.x) partial[c] = partial[a.dim + c] = partial[2 * a.dim + c] = 0.f;
  for (int64_t n = first; n < last; ++n) backward_row_single<X, M, Gated>(a, b, n, partial, slots, pair_slots);
}

// out (B, D) = the sum over chunks of partial (B, chunks, 3, D)[:, :, blockIdx.z], in groups of kChunk.
template <class M>
__global__ void __launch_bounds__(kThreads)
    adaln_reduce_kernel(const float* partial, void* dscale, void* dshift, void* dgate, int64_t batch, int64_t chunks, int dim) {
  const int column = static_cast<int>(item_index());
  if (column >= dim) return;
  void* const outputs[3] = {dscale, dshift, dgate};
  M* out = static_cast<M*>(blockIdx.z == 0 ? outputs[0] : blockIdx.z == 1 ? outputs[1] : outputs[2]);
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    float total = 0.f;
    for (int64_t first = 0; first < chunks; first += kChunk) {
      const int64_t last = first + kChunk < chunks ? first + kChunk : chunks;
      float some = 0.f;
      for (int64_t c = first; c < last; ++c) some += partial[((b * chunks + c) * 3 + blockIdx.z) * dim + column];
      total += some;
    }
    out[b * dim + column] = narrow<M>(total);
  }
}

}  // namespace genengine
