// The kernels of qk_norm_rope, in place too, and its backward. A team of 8, 16 or 32 threads of one warp holds a head in
// registers, eight elements each, and walks over a few heads of one token, for which weight, cos and sin are read once.
// Eight consecutive elements per thread where pointers, strides, D and R/2 allow 16-byte accesses (and, as halves, the
// partners eight elements together in another thread); else elements 32 apart, whose partners pass through shared memory.
// Backward: a block adds up its teams' dweight in order, a second kernel the blocks': no atomics. Accumulates in float32.
#pragma once
#include "cuda/launch.h"
#include "genengine/qk_norm_rope.h"

namespace genengine {

constexpr int kQkElements = 8;  // per thread
constexpr int kQkHeads = 4;     // per team of the forward
constexpr int kQkRows = 16;     // (token, head) pairs per team of the backward
constexpr int kReduceRows = 16;

struct Packed {  // (B, N, 3, H, D), innermost stride 1
  void* base = nullptr;
  int64_t batch = 0, token = 0, part = 0, head = 0;
  template <class T>
  __device__ __forceinline__ T* at(int64_t b, int64_t n, int part_index, int64_t h) const {
    return static_cast<T*>(base) + b * batch + n * token + part_index * part + h * head;
  }
};

struct Table {  // (1 or B, N, R/2), innermost stride 1
  const float* base = nullptr;
  int64_t batch = 0, token = 0;
  __device__ __forceinline__ const float* at(int64_t b, int64_t n) const { return base + b * batch + n * token; }
};

struct QkArguments {
  Packed qkv, grad, out;
  const void* weight[2] = {nullptr, nullptr};
  Table cos, sin;
  float* partial = nullptr;  // (blocks, 2, D): dweight
  uint32_t batch = 0, tokens = 0, heads = 0;  // with 64 bits, divisions would cost more than the rest
  int dim = 0, half = 0, parts = 3;
  float eps = 0.f, sign = 1.f;  // sign: -1 undoes the rotation
  bool norm = true, interleaved = true, weight_is_float = false;
};

// ---- a team and its eight elements per thread ------------------------------------------------------------------------

template <class T, int Team, bool Vectorised>
struct QkTeam {
  using Wide8 = Wide<kQkElements>;
  struct Scalars {
    T element[kQkElements];
  };
  using Raw = std::conditional_t<Vectorised, typename Wide8::template Raw<T>, Scalars>;
  static constexpr int kTeams = kThreads / Team;  // per block

  int lane, dim, half;
  bool interleaved;
  float weight[kQkElements], cos[kQkElements], sin[kQkElements];  // sin: of the partner, signed

  __device__ __forceinline__ explicit QkTeam(const QkArguments& a)
      : lane(static_cast<int>(threadIdx.x) % Team), dim(a.dim), half(a.half), interleaved(a.interleaved) {}

  __device__ __forceinline__ static int index() { return static_cast<int>(threadIdx.x) / Team; }
  __device__ __forceinline__ int element(int i) const { return Vectorised ? lane * kQkElements + i : i * Team + lane; }
  __device__ __forceinline__ bool rotated(int e) const { return e < 2 * half; }
  __device__ __forceinline__ int partner(int e) const { return interleaved ? e ^ 1 : e < half ? e + half : e - half; }

  __device__ __forceinline__ Raw fetch(const T* row, bool needed) const {
    if constexpr (Vectorised) {
      return Wide8(lane).fetch(row, needed && lane * kQkElements < dim);
    } else {
      Raw raw;
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) {
        raw.element[i] = narrow<T>(0.f);
        if (needed && element(i) < dim) raw.element[i] = row[element(i)];
      }
      return raw;
    }
  }
  __device__ __forceinline__ static void convert(const Raw& raw, float (&values)[kQkElements]) {
    if constexpr (Vectorised) {
      Wide8::template convert<T>(raw, values);
    } else {
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) values[i] = widen(raw.element[i]);
    }
  }
  __device__ __forceinline__ void store(T* row, const float (&values)[kQkElements]) const {
    if constexpr (Vectorised) {
      if (lane * kQkElements < dim) Wide8(lane).store(row, values);
    } else {
#pragma unroll
      for (int i = 0; i < kQkElements; ++i)
        if (element(i) < dim) row[element(i)] = narrow<T>(values[i]);
    }
  }

  __device__ __forceinline__ void read_weight(const QkArguments& a, int part) {
    const void* from = part < 2 ? a.weight[part] : nullptr;
#pragma unroll
    for (int i = 0; i < kQkElements; ++i) {
      const int e = element(i);
      weight[i] = 1.f;
      if (from && e < dim) weight[i] = a.weight_is_float ? static_cast<const float*>(from)[e] : widen(static_cast<const T*>(from)[e]);
    }
  }
  __device__ __forceinline__ void read_tables(const QkArguments& a, int64_t b, int64_t n, bool needed) {
    const float *c = a.cos.at(b, n), *s = a.sin.at(b, n);
#pragma unroll
    for (int i = 0; i < kQkElements; ++i) {
      const int e = element(i), pair = interleaved ? e / 2 : e < half ? e : e - half;
      const bool is_first = interleaved ? e % 2 == 0 : e < half;
      cos[i] = 1.f;
      sin[i] = 0.f;
      if (needed && rotated(e)) {
        cos[i] = c[pair];
        sin[i] = is_first ? -a.sign * s[pair] : a.sign * s[pair];
      }
    }
  }

  // Every thread of the warp must be here. places: of this warp.
  __device__ __forceinline__ void turn(float (&y)[kQkElements], float* places) const {
    if (half == 0) return;
    float other[kQkElements];
    if constexpr (Vectorised) {
      const int distance = half / kQkElements, source = lane < distance ? lane + distance : lane - distance;
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) other[i] = interleaved ? y[i ^ 1] : __shfl_sync(0xffffffffu, y[i], source & (Team - 1), Team);
    } else {
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) places[element(i)] = y[i];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) other[i] = rotated(element(i)) ? places[partner(element(i))] : 0.f;
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kQkElements; ++i)
      if (rotated(element(i))) y[i] = rotate(y[i], other[i], cos[i], sin[i]);
  }

  __device__ __forceinline__ static float sum(float value) {
#pragma unroll
    for (int offset = Team / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
  }
};

// Where the elements of a block's warps meet their partners, if they do not in registers.
constexpr int kQkPlaces = kThreads * kQkElements;
__device__ __forceinline__ float* places_of_warp(float* places) { return places + threadIdx.x / 32 * 32 * kQkElements; }

// ---- forward: items are (token, part, group of kQkHeads heads) -------------------------------------------------------

template <class T, int Team, bool Vectorised>
__device__ __forceinline__ void qk_forward(const QkArguments& a, float* places) {
  using Mine = QkTeam<T, Team, Vectorised>;
  Mine team(a);
  const uint32_t groups = (a.heads + kQkHeads - 1) / kQkHeads, parts = static_cast<uint32_t>(a.parts);
  const uint32_t item = blockIdx.x * Mine::kTeams + static_cast<uint32_t>(Mine::index());
  const uint32_t rest = item / groups, token = rest / parts, first = (item - rest * groups) * kQkHeads;
  const uint32_t b = token / a.tokens, n = token - b * a.tokens;
  const int part = static_cast<int>(rest - token * parts);
  const bool exists = b < a.batch, is_v = part == 2;
  typename Mine::Raw raw[kQkHeads];  // all asked for before the first is used
#pragma unroll
  for (int h = 0; h < kQkHeads; ++h) raw[h] = team.fetch(a.qkv.at<const T>(b, n, part, first + h), exists && first + h < a.heads);
  team.read_weight(a, part);
  team.read_tables(a, b, n, exists && !is_v);
#pragma unroll
  for (int h = 0; h < kQkHeads; ++h) {
    float y[kQkElements];
    Mine::convert(raw[h], y);
    if (a.norm) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) squares = multiply_add(y[i], y[i], squares);
      const float rstd = rms_rstd(Mine::sum(squares), a.dim, a.eps);
#pragma unroll
      for (int i = 0; i < kQkElements; ++i) y[i] = is_v ? y[i] : y[i] * rstd * team.weight[i];
    }
    float turned[kQkElements];
#pragma unroll
    for (int i = 0; i < kQkElements; ++i) turned[i] = y[i];
    team.turn(turned, places);
#pragma unroll
    for (int i = 0; i < kQkElements; ++i) y[i] = is_v ? y[i] : turned[i];
    if (exists && first + h < a.heads) team.store(a.out.at<T>(b, n, part, first + h), y);
  }
}

template <class T, int Team>
__global__ void GENENGINE_BOUNDS qk_norm_rope_vectorised(const __grid_constant__ QkArguments a) {
  qk_forward<T, Team, true>(a, nullptr);
}

template <class T>
__global__ void GENENGINE_BOUNDS qk_norm_rope_single(const __grid_constant__ QkArguments a) {
  __shared__ float places[kQkPlaces];
  qk_forward<T, 32, false>(a, places_of_warp(places));
}

// ---- backward: rows are (token, head); blockIdx.y is the part --------------------------------------------------------

struct QkRow {
  uint32_t b, n, h;
  __device__ __forceinline__ QkRow(uint32_t row, const QkArguments& a) {
    const uint32_t token = row / a.heads;
    h = row - token * a.heads;
    b = token / a.tokens;
    n = token - b * a.tokens;
  }
  __device__ __forceinline__ void next(const QkArguments& a) {
    if (++h < a.heads) return;
    h = 0;
    if (++n < a.tokens) return;
    n = 0;
    ++b;
  }
};

template <class T, int Team, bool Vectorised>
__device__ __forceinline__ void qk_backward_row(const QkArguments& a, const QkTeam<T, Team, Vectorised>& team, const QkRow& row,
                                                int part, float (&dweight)[kQkElements], float* places) {
  using Mine = QkTeam<T, Team, Vectorised>;
  const bool exists = row.b < a.batch;
  float g[kQkElements], x[kQkElements];
  const auto raw_g = team.fetch(a.grad.at<const T>(row.b, row.n, part, row.h), exists);
  const auto raw_x = team.fetch(a.qkv.at<const T>(row.b, row.n, part, row.h), exists);
  Mine::convert(raw_g, g);
  Mine::convert(raw_x, x);
  team.turn(g, places);
  float squares = 0.f, dot = 0.f;
#pragma unroll
  for (int i = 0; i < kQkElements; ++i) {
    squares = multiply_add(x[i], x[i], squares);
    dot = multiply_add(g[i] * team.weight[i], x[i], dot);
  }
  const float rstd = rms_rstd(Mine::sum(squares), a.dim, a.eps), factor = rms_dx_factor(Mine::sum(dot), a.dim, rstd);
  if (!exists) return;  // no thread waits for another from here on
#pragma unroll
  for (int i = 0; i < kQkElements; ++i) {
    dweight[i] = multiply_add(g[i], x[i] * rstd, dweight[i]);
    x[i] = rms_dx(g[i] * team.weight[i], x[i], rstd, factor);
  }
  team.store(a.out.at<T>(row.b, row.n, part, row.h), x);
}

template <class T, int Team, bool Vectorised>
__device__ __forceinline__ void qk_backward(const QkArguments& a, float* places, float (&sums)[kThreads * kQkElements]) {
  using Mine = QkTeam<T, Team, Vectorised>;
  Mine team(a);
  const int part = static_cast<int>(blockIdx.y);
  QkRow row((blockIdx.x * Mine::kTeams + static_cast<uint32_t>(Mine::index())) * kQkRows, a);
  if (part == 2) {  // v, for the whole block
    for (int r = 0; r < kQkRows; ++r, row.next(a)) {
      float v[kQkElements];
      Mine::convert(team.fetch(a.grad.at<const T>(row.b, row.n, part, row.h), row.b < a.batch), v);
      if (row.b < a.batch) team.store(a.out.at<T>(row.b, row.n, part, row.h), v);
    }
    return;
  }
  float dweight[kQkElements] = {};
  team.read_weight(a, part);
  team.read_tables(a, row.b, row.n, row.b < a.batch);
  for (int r = 0; r < kQkRows; ++r, row.next(a)) {
    if (r > 0 && row.h == 0) team.read_tables(a, row.b, row.n, row.b < a.batch);
    __syncwarp();
    qk_backward_row<T, Team, Vectorised>(a, team, row, part, dweight, places);
    __syncwarp();
  }
  if (!a.partial) return;
#pragma unroll
  for (int i = 0; i < kQkElements; ++i) sums[Mine::index() * Team * kQkElements + team.element(i)] = dweight[i];
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < a.dim; e += kThreads) {
    float total = 0.f;
    for (int k = 0; k < Mine::kTeams; ++k) total += sums[k * Team * kQkElements + e];
    a.partial[(static_cast<int64_t>(blockIdx.x) * 2 + part) * a.dim + e] = total;
  }
}

template <class T, int Team>
__global__ void GENENGINE_BOUNDS qk_norm_rope_backward_vectorised(const __grid_constant__ QkArguments a) {
  __shared__ float sums[kThreads * kQkElements];
  qk_backward<T, Team, true>(a, nullptr, sums);
}

template <class T>
__global__ void GENENGINE_BOUNDS qk_norm_rope_backward_single(const __grid_constant__ QkArguments a) {
  __shared__ float places[kQkPlaces], sums[kThreads * kQkElements];
  qk_backward<T, 32, false>(a, places_of_warp(places), sums);
}

// dq_weight and dk_weight (D,), blockIdx.y: the sums over the blocks' partial (blocks, 2, D). Each of kReduceRows threads
// of a column takes every kReduceRows-th, and their sums are added in order.
template <class W>
__global__ void __launch_bounds__(32 * kReduceRows)
    qk_norm_rope_reduce_kernel(const float* partial, void* dq_weight, void* dk_weight, int64_t blocks, int dim) {
  __shared__ float sums[kReduceRows][32];
  const int column = static_cast<int>(blockIdx.x) * 32 + static_cast<int>(threadIdx.x);
  float some = 0.f;
  if (column < dim)
    for (int64_t c = threadIdx.y; c < blocks; c += kReduceRows) some += partial[(c * 2 + blockIdx.y) * dim + column];
  sums[threadIdx.y][threadIdx.x] = some;
  __syncthreads();
  if (threadIdx.y > 0 || column >= dim) return;
  float total = 0.f;
  for (int k = 0; k < kReduceRows; ++k) total += sums[k][threadIdx.x];
  static_cast<W*>(blockIdx.y == 0 ? dq_weight : dk_weight)[column] = narrow<W>(total);
}

}  // namespace genengine
