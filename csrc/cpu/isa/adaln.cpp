// adaln and gated_adaln, a row at a time: the row stays in the first-level cache between its passes. Sums run over 64
// lanes and then a fixed tree, so a row has the same bits wherever it stands in the batch and on every instruction set.
#include "genengine/adaln.h"

#include "cpu/adaln_loops.h"
#include "cpu/isa/span.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

constexpr int kSums = 4;  // independent accumulators, to hide the latency of an addition
constexpr int64_t kPad = 32;  // floats between two scratch rows, so that rows of 1024 k do not share cache sets
constexpr int64_t kScratch = kAdalnMaxDim + kPad;

// Zeros beyond the row's end.
GENENGINE_INLINE Lanes clip(Lanes lanes, Whole) { return lanes; }
GENENGINE_RARE Lanes clip(Lanes lanes, Part part) {
  float v[kLanes];
  store(v, lanes);
  for (int64_t i = part.count; i < kLanes; ++i) v[i] = 0.f;
  return load(v);
}

template <class T>
GENENGINE_INLINE Lanes rounded(Lanes lanes) {
  T stored[kLanes];
  store(stored, lanes);
  return load(stored);
}
template <>
GENENGINE_INLINE Lanes rounded<float>(Lanes lanes) {
  return lanes;
}

struct Sum {
  Lanes lanes[kSums] = {zero_lanes(), zero_lanes(), zero_lanes(), zero_lanes()};
  GENENGINE_INLINE void add(int k, Lanes v) { lanes[k] = lanes[k] + v; }
  GENENGINE_INLINE float total() const { return sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }
};

// body(i, k, span) for the elements i.. of a row; k is the accumulator to use.
template <class Body>
GENENGINE_INLINE void each(int64_t dim, Body body) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= dim; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) body(i + k * kLanes, k, Whole{});
  }
  for (; i + kLanes <= dim; i += kLanes) body(i, 0, Whole{});
  if (i < dim) body(i, 1, Part{tail(dim)});
}
#define GENENGINE_BODY [&](int64_t i, [[maybe_unused]] int k, auto span) __attribute__((always_inline))

GENENGINE_INLINE float square_sum(const float* row, float mean, int64_t dim) {
  Sum squares;
  each(dim, GENENGINE_BODY {
    const Lanes v = clip(read(row + i, span) - mean, span);
    squares.add(k, v * v);
  });
  return squares.total();
}

template <class T>
GENENGINE_INLINE const T* at(const TokenView& view, int64_t b, int64_t n) {
  return static_cast<const T*>(view.data) + b * view.batch + n * view.token;
}
template <class T>
GENENGINE_INLINE const T* at(const RowView& view, int64_t b) {
  return static_cast<const T*>(view.data) + b * view.batch;
}

GENENGINE_INLINE void add_one(float* row, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) row[i] = 1.f + row[i];
}

// A row's tokens and the modulation of its sample.
template <class X, class M>
struct Row {
  const X* x;
  const M* branch;
  const float *gate, *gain, *shift;
  X* x_out;
  M* h;
};

// ahead: elements to the row after the next, whose lines are asked for here: the passes over one row leave the memory
// idle, and the hardware's prefetcher stops at every page. Fetching x in one pass and branch in the other measured best.
template <class X, class M, bool Gated, bool Stream>
GENENGINE_INLINE void forward_row(const Row<X, M>& at, float* scratch, int64_t dim, float eps, int64_t x_ahead,
                                  [[maybe_unused]] int64_t branch_ahead) {
  const float* row = scratch;
  Sum sum;
  if constexpr (!Gated && sizeof(X) == 4) row = at.x;
  each(dim, GENENGINE_BODY {
    Lanes v = read(at.x + i, span);
    if constexpr (Gated) {
      v = adaln_gate(v, read(at.gate + i, span), read(at.branch + i, span));
      if constexpr (sizeof(X) == 2) {
        emit<Stream>(at.x_out + i, v, span);
        v = rounded<X>(v);
      }
    }
    if constexpr (Gated || sizeof(X) == 2) write(scratch + i, v, span);
    sum.add(k, v);
  });
  const float mean = sum.total() / static_cast<float>(dim);
  Sum squares;
  each(dim, GENENGINE_BODY {
    if (sizeof(X) == 4 || k % 2 == 0) __builtin_prefetch(at.x + x_ahead + i, 0, 2);  // once per line
    const Lanes v = read(row + i, span), centred = clip(v - mean, span);
    if constexpr (Gated && sizeof(X) == 4) emit<Stream>(at.x_out + i, v, span);
    squares.add(k, centred * centred);
  });
  const float rstd = adaln_rstd(squares.total(), dim, eps);
  each(dim, GENENGINE_BODY {
    if (Gated && (sizeof(M) == 4 || k % 2 == 0)) __builtin_prefetch(at.branch + branch_ahead + i, 0, 2);
    const Lanes x_hat = adaln_normalise(read(row + i, span), mean, rstd);
    emit<Stream>(at.h + i, adaln_modulate(x_hat, read(at.gain + i, span), read(at.shift + i, span)), span);
  });
}

// Streaming stores need every group of sixteen elements aligned to itself.
template <class T>
GENENGINE_INLINE bool streamable(const T* out, int64_t dim) {
  return dim % kLanes == 0 && reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0;
}

template <class X, class M, bool Gated, bool Stream>
void forward_rows(const AdalnForward& op, int64_t begin, int64_t end) {
  alignas(64) float scratch[4 * kScratch];
  const int64_t dim = op.dim, pitch = (dim + kLanes - 1) / kLanes * kLanes + kPad;
  float *gate = scratch, *gain = scratch + pitch, *shift = scratch + 2 * pitch, *row = scratch + 3 * pitch;
  int64_t loaded = -1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / op.tokens, n = r - b * op.tokens;
    if (b != loaded) {
      loaded = b;
      load_row(gain, at<M>(op.scale, b), dim);
      add_one(gain, dim);
      load_row(shift, at<M>(op.shift, b), dim);
      if constexpr (Gated) load_row(gate, at<M>(op.gate, b), dim);
    }
    const Row<X, M> current{at<X>(op.x, b, n), Gated ? at<M>(op.branch, b, n) : nullptr, gate, gain, shift,
                            Gated ? static_cast<X*>(op.x_out) + r * dim : nullptr, static_cast<M*>(op.h) + r * dim};
    const int64_t rows_ahead = n + 2 < op.tokens ? 2 : 0;
    forward_row<X, M, Gated, Stream>(current, row, dim, op.eps, rows_ahead * op.x.token, rows_ahead * op.branch.token);
  }
  if (Stream) fence();
}

template <class X, class M, bool Gated>
GENENGINE_INLINE void forward(const AdalnForward& op, int64_t begin, int64_t end) {
  const bool aligned = streamable(static_cast<M*>(op.h), op.dim) && (!Gated || streamable(static_cast<X*>(op.x_out), op.dim));
  if (op.stream && aligned)
    forward_rows<X, M, Gated, true>(op, begin, end);
  else
    forward_rows<X, M, Gated, false>(op, begin, end);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class X, class M>
struct GradRow {
  const X *x, *grad_x;
  const M *grad_h, *branch;
  const float *gate, *gain;
  X* dx;
  M* dbranch;
  float *dscale, *dshift, *dgate;
};

// row and g_row: scratch.
template <class X, class M, bool Gated>
GENENGINE_INLINE void backward_row(const GradRow<X, M>& at, float* row, float* g_row, int64_t dim, float eps) {
  Sum sum, sum_g, sum_gx;
  each(dim, GENENGINE_BODY {
    const Lanes v = read(at.x + i, span);
    write(row + i, v, span);
    sum.add(k, v);
  });
  const float size = static_cast<float>(dim), mean = sum.total() / size;
  const float rstd = adaln_rstd(square_sum(row, mean, dim), dim, eps);
  each(dim, GENENGINE_BODY {
    const Lanes x_hat = adaln_normalise(read(row + i, span), mean, rstd), grad_h = read(at.grad_h + i, span);
    const Lanes g = grad_h * read(at.gain + i, span);
    write(at.dshift + i, read(at.dshift + i, span) + grad_h, span);
    write(at.dscale + i, read(at.dscale + i, span) + grad_h * x_hat, span);
    write(row + i, x_hat, span);
    write(g_row + i, g, span);
    sum_g.add(k, g);
    sum_gx.add(k, clip(g * x_hat, span));
  });
  const float mean_g = sum_g.total() / size, mean_gx = sum_gx.total() / size;
  each(dim, GENENGINE_BODY {
    Lanes dx = adaln_dx(read(g_row + i, span), read(row + i, span), rstd, mean_g, mean_gx);
    if constexpr (Gated) {
      dx = read(at.grad_x + i, span) + dx;
      write(at.dbranch + i, read(at.gate + i, span) * dx, span);
      write(at.dgate + i, read(at.dgate + i, span) + read(at.branch + i, span) * dx, span);
    }
    write(at.dx + i, dx, span);
  });
}

template <class X, class M, bool Gated>
void backward(const AdalnBackward& op, int64_t begin, int64_t end) {
  alignas(64) float scratch[4 * kScratch];
  const int64_t dim = op.dim, pitch = (dim + kLanes - 1) / kLanes * kLanes + kPad;
  float *gate = scratch, *gain = scratch + pitch, *row = scratch + 2 * pitch, *g_row = scratch + 3 * pitch;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / op.chunks, first = (task - b * op.chunks) * kAdalnChunk;
    const int64_t last = first + kAdalnChunk < op.tokens ? first + kAdalnChunk : op.tokens;
    load_row(gain, at<M>(op.scale, b), dim);
    add_one(gain, dim);
    if constexpr (Gated) load_row(gate, at<M>(op.gate, b), dim);
    float* sums = op.partial + task * 3 * dim;
    memset(sums, 0, sizeof(float) * 3 * static_cast<size_t>(dim));
    for (int64_t n = first; n < last; ++n) {
      const int64_t offset = (b * op.tokens + n) * dim;
      const GradRow<X, M> current{at<X>(op.x, b, n),
                                  Gated ? at<X>(op.grad_x, b, n) : nullptr,
                                  at<M>(op.grad_h, b, n),
                                  Gated ? at<M>(op.branch, b, n) : nullptr,
                                  gate,
                                  gain,
                                  static_cast<X*>(op.dx) + offset,
                                  Gated ? static_cast<M*>(op.dbranch) + offset : nullptr,
                                  sums,
                                  sums + dim,
                                  sums + 2 * dim};
      backward_row<X, M, Gated>(current, row, g_row, dim, op.eps);
    }
  }
}

template <class T>
void reduce(T* out, const float* partial, int64_t chunks, int64_t dim) {
  each(dim, GENENGINE_BODY {
    Lanes total = zero_lanes();
    for (int64_t first = 0; first < chunks; first += kAdalnChunk) {  // in groups: the error grows with their size alone
      const int64_t last = first + kAdalnChunk < chunks ? first + kAdalnChunk : chunks;
      Lanes some = zero_lanes();
      for (int64_t c = first; c < last; ++c) some = some + read(partial + c * 3 * dim + i, span);
      total = total + some;
    }
    write(out + i, total, span);
  });
}

}  // namespace

// f is a template over the storage types of x and h.
#define GENENGINE_STORAGE(op, f, gated, ...)                                                              \
  switch (static_cast<int>(op.x_type) * 3 + static_cast<int>(op.h_type)) {                                \
    case 0: return gated ? f<float, float, true>(__VA_ARGS__) : f<float, float, false>(__VA_ARGS__);      \
    case 1: return gated ? f<float, Half, true>(__VA_ARGS__) : f<float, Half, false>(__VA_ARGS__);        \
    case 2: return gated ? f<float, BFloat, true>(__VA_ARGS__) : f<float, BFloat, false>(__VA_ARGS__);    \
    case 4: return gated ? f<Half, Half, true>(__VA_ARGS__) : f<Half, Half, false>(__VA_ARGS__);          \
    case 8: return gated ? f<BFloat, BFloat, true>(__VA_ARGS__) : f<BFloat, BFloat, false>(__VA_ARGS__);  \
    default: return;                                                                                      \
  }

void adaln_forward(const AdalnForward& op, int64_t begin, int64_t end) {
  GENENGINE_STORAGE(op, forward, op.branch.data != nullptr, op, begin, end)
}

void adaln_backward(const AdalnBackward& op, int64_t begin, int64_t end) {
  GENENGINE_STORAGE(op, backward, op.branch.data != nullptr, op, begin, end)
}

void adaln_reduce(void* out, Type type, const float* partial, int64_t chunks, int64_t dim) {
  switch (type) {
    case Type::f32: return reduce(static_cast<float*>(out), partial, chunks, dim);
    case Type::f16: return reduce(static_cast<Half*>(out), partial, chunks, dim);
    case Type::bf16: return reduce(static_cast<BFloat*>(out), partial, chunks, dim);
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
