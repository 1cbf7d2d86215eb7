// group_norm_silu: sums of columns, their fold into one multiplier and offset per column, and the pass that applies it.
//
// A column's elements are summed as deviations from the first of them in each block of kGroupNormRows: float32 loses at
// most that factor however large the mean is. Blocks, columns and channels are then added in double.
#include "genengine/group_norm_silu.h"

#include "cpu/group_norm_silu_loops.h"
#include "cpu/isa/lanes_math.h"
#include "cpu/isa/span.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// ---- reading and writing -------------------------------------------------------------------------------------------

float element(Type type, const void* from, int64_t i) {
  if (type == Type::f16) return to_float(static_cast<const Half*>(from)[i]);
  if (type == Type::bf16) return to_float(static_cast<const BFloat*>(from)[i]);
  return static_cast<const float*>(from)[i];
}

void set_element(Type type, void* to, int64_t i, float value) {
  if (type == Type::f32) static_cast<float*>(to)[i] = value;
  if (type == Type::f16) from_float(static_cast<Half*>(to)[i], value);
  if (type == Type::bf16) from_float(static_cast<BFloat*>(to)[i], value);
}

// The constants of one channel, or of sixteen columns.
struct Forward {
  Lanes mean, gain, offset;
};
struct Backward {
  Lanes mean, gain, offset, mean_g, mean_gx;  // dx = dv gain - ((x - mean) mean_gx + mean_g)
};

template <bool Silu, bool Rough>
GENENGINE_INLINE Lanes activate(Lanes x, const Forward& c, const Sigmoid<Rough>& sigmoid) {
  const Lanes v = multiply_add(x - c.mean, c.gain, c.offset);
  return Silu ? sigmoid.silu(v) : v;
}

template <bool Silu, class Constants>
GENENGINE_INLINE Lanes grad_v(Lanes x, Lanes grad, const Constants& c, const Sigmoid<false>& sigmoid) {
  if (!Silu) return grad;
  const Lanes v = multiply_add(x - c.mean, c.gain, c.offset), s = sigmoid(v);
  return grad * s * multiply_add(v, sigmoid.one - s, sigmoid.one);
}

template <bool Silu>
GENENGINE_INLINE Lanes grad_x(Lanes x, Lanes grad, const Backward& c, const Sigmoid<false>& sigmoid) {
  return grad_v<Silu>(x, grad, c, sigmoid) * c.gain - multiply_add(x - c.mean, c.mean_gx, c.mean_g);
}

// The five rows of a sample, `width` apart.
struct Rows {
  float* row;
  int64_t width;
  GENENGINE_INLINE Forward forward(int64_t i) const {
    return {load(row + i), load(row + width + i), load(row + 2 * width + i)};
  }
  GENENGINE_INLINE Backward backward(int64_t i) const {
    return {load(row + i), load(row + width + i), load(row + 2 * width + i), load(row + 3 * width + i), load(row + 4 * width + i)};
  }
};

Rows rows_of(const GroupNorm& op, int64_t b) { return {op.rows + b * 5 * op.width, op.width}; }
double* partial_of(const GroupNorm& op, int64_t b, int64_t block) {
  return op.partial + (b * op.blocks() + block) * 2 * op.width;
}

// ---- the sum of a residual branch ----------------------------------------------------------------------------------

template <class T>
GENENGINE_INLINE const T* input(const void* base, int64_t batch_stride, int64_t b) {
  return static_cast<const T*>(base) + b * batch_stride;
}

// x = left + branch, `count` elements of a sample from `first`; nothing where there is no branch.
template <class T>
void add_branch(const GroupNorm& op, int64_t b, int64_t first, int64_t count) {
  if (!op.branch) return;
  const T* left = input<T>(op.left, op.left_batch, b) + first;
  const T* branch = input<T>(op.branch, op.branch_batch, b) + first;
  T* sum = static_cast<T*>(op.sum) + b * op.channels * op.pixels + first;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(sum + i, load(left + i) + load(branch + i));
  if (const int64_t some = count - i; some > 0)
    write(sum + i, read(left + i, Part{some}) + read(branch + i, Part{some}), Part{some});
}

// ---- moments -------------------------------------------------------------------------------------------------------

constexpr int64_t kSlab = 512;  // columns whose sums stay in the first-level cache

// The sums over a block so far, as deviations from its first row.
struct Deviations {
  float first[kSlab], second[kSlab];
};

// Count rows more of `columns` columns; their lines are read in the order of memory, as the prefetcher expects.
template <int Count, class T>
GENENGINE_INLINE void add_rows(const T* x, const T* pivot, int64_t columns, int64_t width, Deviations& to) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Lanes about = load(pivot + i);
    Lanes first = load(to.first + i), second = load(to.second + i);
#pragma GCC unroll 8
    for (int k = 0; k < Count; ++k) {
      const Lanes d = load(x + k * width + i) - about;
      first = first + d;
      second = multiply_add(d, d, second);
    }
    store(to.first + i, first);
    store(to.second + i, second);
  }
}

// sums[i] = sum(x), sums[width + i] = sum(x^2) over the rows of column i; width is a multiple of sixteen.
template <class T>
GENENGINE_INLINE void column_moments(const T* x, int64_t rows, int64_t width, double* sums) {
  Deviations to;
  const double n = static_cast<double>(rows);
  for (int64_t slab = 0; slab < width; slab += kSlab, x += kSlab) {
    const int64_t columns = width - slab < kSlab ? width - slab : kSlab;
    memset(&to, 0, sizeof to);
    int64_t r = 1;
    for (; r + 8 <= rows; r += 8) add_rows<8>(x + r * width, x, columns, width, to);
    for (; r < rows; ++r) add_rows<1>(x + r * width, x, columns, width, to);
    for (int64_t i = 0; i < columns; ++i) {
      const double about = to_float(x[i]), deviations = to.first[i], sum = deviations + n * about;
      sums[slab + i] = sum;
      sums[width + slab + i] = to.second[i] + about * (sum + deviations);
    }
  }
}

// A short last row: `count` columns more.
template <class T>
void add_row_moments(const T* x, int64_t count, int64_t width, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    const double value = to_float(x[i]);
    sums[i] += value;
    sums[width + i] += value * value;
  }
}

template <class T>
void block_moments(const T* x, int64_t count, int64_t width, double* sums) {
  const int64_t rows = count / width;
  if (rows > 0)
    column_moments(x, rows, width, sums);
  else
    memset(sums, 0, sizeof(double) * 2 * static_cast<size_t>(width));
  add_row_moments(x + rows * width, count - rows * width, width, sums);
}

struct Moments {
  double sum = 0, squares = 0;
};

struct Statistics {
  float mean, beyond, rstd;  // the mean is mean + beyond
};

Statistics statistics(const Moments& m, double count, float eps) {
  const double mean = m.sum / count, deviation = m.squares / count - mean * mean;
  const double variance = deviation < 0 ? 0 : deviation;  // NaN stays
  const float rounded = static_cast<float>(mean);
  return {rounded, static_cast<float>(mean - rounded), static_cast<float>(1.0 / __builtin_sqrt(variance + eps))};
}

GroupNormFold fold(const GroupNorm& op, int64_t b, int64_t c, float rstd, float beyond) {
  const float weight = op.weight ? element(op.parameter_type, op.weight, c) : 1.f;
  const float bias = op.bias ? element(op.parameter_type, op.bias, c) : 0.f;
  const float scale = op.scale ? element(op.modulation_type, op.scale, b * op.scale_batch + c) : 0.f;
  const float shift = op.shift ? element(op.modulation_type, op.shift, b * op.shift_batch + c) : 0.f;
  return group_norm_fold_channel(rstd, weight, bias, scale, shift, beyond);
}

// The first `channels` columns of each row, repeated to its end.
void repeat(const Rows& rows, int count, int64_t channels) {
  for (int k = 0; k < count; ++k)
    for (int64_t i = channels; i < rows.width; ++i) rows.row[k * rows.width + i] = rows.row[k * rows.width + i - channels];
}

// Columns of all blocks, added up: sums (2, channels), in the memory of the first block.
double* channel_sums(const GroupNorm& op, int64_t b) {
  double* sums = partial_of(op, b, 0);
  const int64_t width = op.width, channels = op.channels;
  for (int64_t block = 1, blocks = op.blocks(); block < blocks; ++block) {
    const double* more = partial_of(op, b, block);
    for (int64_t i = 0; i < 2 * width; ++i) sums[i] += more[i];
  }
  for (int64_t i = channels; i < width; i += channels)
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += sums[i + c];
      sums[width + c] += sums[width + i + c];
    }
  return sums;
}

// ---- channels_last, forward ----------------------------------------------------------------------------------------

struct Span {
  int64_t first, count;
};
Span span_of(const GroupNorm& op, int64_t block) {
  const int64_t size = op.channels * op.pixels, first = block * op.block();
  return {first, size - first < op.block() ? size - first : op.block()};
}

// body.template vectors<Count>(i): the columns i.. of the Count rows from body's position; body.advance(Count) moves it on;
// body.tail(i, count): the first elements of a vector. Eight rows share one reading of their constants, which otherwise
// compete with the pending stores to addresses equal modulo 4096.
template <class Body>
GENENGINE_INLINE void each_vector(int64_t count, int64_t width, Body body) {
  for (; count >= 8 * width; count -= 8 * width, body.advance(8))
    for (int64_t i = 0; i < width; i += kLanes) body.template vectors<8>(i);
  for (; count >= width; count -= width, body.advance(1))
    for (int64_t i = 0; i < width; i += kLanes) body.template vectors<1>(i);
  for (int64_t i = 0; i < count; i += kLanes) body.tail(i, count - i < kLanes ? count - i : kLanes);
}

template <class T, bool Silu, bool Stream>
struct Apply {
  static constexpr bool kRough = sizeof(T) == 2;
  const T* x;
  T* y;
  const Rows rows;
  const Sigmoid<kRough> sigmoid;

  template <int Count>
  GENENGINE_INLINE void vectors(int64_t i) const {
    const Forward c = rows.forward(i);
#pragma GCC unroll 8
    for (int k = 0; k < Count; ++k)
      emit<Stream>(y + k * rows.width + i, activate<Silu, kRough>(load(x + k * rows.width + i), c, sigmoid), Whole{});
  }
  GENENGINE_INLINE void tail(int64_t i, int64_t count) const {
    write(y + i, activate<Silu, kRough>(read(x + i, Part{count}), rows.forward(i), sigmoid), Part{count});
  }
  GENENGINE_INLINE void advance(int64_t count) {
    x += count * rows.width;
    y += count * rows.width;
  }
};

template <class T>
GENENGINE_INLINE T* output(const GroupNorm& op, int64_t b) {
  return static_cast<T*>(op.out) + b * op.channels * op.pixels;
}

// Streaming stores need every group of sixteen elements aligned to itself.
template <class T>
bool streamable(const GroupNorm& op, const T* out) {
  return op.stream && reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0;
}

template <class T, bool Silu>
void apply(const GroupNorm& op, int64_t b, int64_t block) {
  const Span at = span_of(op, block);
  const T* x = input<T>(op.x, op.x_batch, b) + at.first;
  T* y = output<T>(op, b) + at.first;
  if (streamable(op, y)) {
    each_vector(at.count, op.width, Apply<T, Silu, true>{x, y, rows_of(op, b), {}});
    fence();
  } else {
    each_vector(at.count, op.width, Apply<T, Silu, false>{x, y, rows_of(op, b), {}});
  }
}

// ---- channels_last, backward ---------------------------------------------------------------------------------------

template <class T, bool Silu>
void backward_sums(const GroupNorm& op, int64_t b, int64_t block) {
  const Span at = span_of(op, block);
  const T *x = input<T>(op.x, op.x_batch, b) + at.first, *grad = input<T>(op.grad, op.grad_batch, b) + at.first;
  const Rows rows = rows_of(op, b);
  const int64_t width = op.width, whole = at.count / width, left = at.count - whole * width;
  double* sums = partial_of(op, b, block);
  const Sigmoid<false> sigmoid;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Forward c = rows.forward(i);
    Lanes p = zero_lanes(), q = zero_lanes();
    const auto add = [&](Lanes v, Lanes g) GENENGINE_ALWAYS_INLINE {
      const Lanes dv = grad_v<Silu>(v, g, c, sigmoid);
      p = p + dv;
      q = multiply_add(dv, v - c.mean, q);
    };
    for (int64_t r = 0; r < whole; ++r) add(load(x + r * width + i), load(grad + r * width + i));
    if (i < left) {
      const int64_t some = left - i < kLanes ? left - i : kLanes, first = whole * width + i;
      add(read(x + first, Part{some}), read(grad + first, Part{some}));  // beyond the row's end grad, so dv, is zero
    }
    float p_lanes[kLanes], q_lanes[kLanes];
    store(p_lanes, p);
    store(q_lanes, q);
    for (int k = 0; k < kLanes; ++k) {
      sums[i + k] = p_lanes[k];
      sums[width + i + k] = q_lanes[k];
    }
  }
}

template <class T, bool Silu, bool Residual>
struct BackwardApply {
  const T *x, *grad, *grad_x_in;
  T* dx;
  const Rows rows;
  const Sigmoid<false> sigmoid;

  template <int Count>
  GENENGINE_INLINE void vectors(int64_t i) const {
    const Backward c = rows.backward(i);
#pragma GCC unroll 8
    for (int k = 0; k < Count; ++k) {
      const int64_t at = k * rows.width + i;
      const Lanes own = grad_x<Silu>(load(x + at), load(grad + at), c, sigmoid);
      store(dx + at, Residual ? own + load(grad_x_in + at) : own);
    }
  }
  GENENGINE_INLINE void tail(int64_t i, int64_t count) const {
    const Lanes own = grad_x<Silu>(read(x + i, Part{count}), read(grad + i, Part{count}), rows.backward(i), sigmoid);
    write(dx + i, Residual ? own + read(grad_x_in + i, Part{count}) : own, Part{count});
  }
  GENENGINE_INLINE void advance(int64_t count) {
    x += count * rows.width;
    grad += count * rows.width;
    if (Residual) grad_x_in += count * rows.width;
    dx += count * rows.width;
  }
};

template <class T, bool Silu>
void backward_apply(const GroupNorm& op, int64_t b, int64_t block) {
  const Span at = span_of(op, block);
  const T *x = input<T>(op.x, op.x_batch, b) + at.first, *grad = input<T>(op.grad, op.grad_batch, b) + at.first;
  T* dx = output<T>(op, b) + at.first;
  if (op.grad_x) {
    const T* grad_x_in = input<T>(op.grad_x, op.grad_x_batch, b) + at.first;
    each_vector(at.count, op.width, BackwardApply<T, Silu, true>{x, grad, grad_x_in, dx, rows_of(op, b), {}});
  } else {
    each_vector(at.count, op.width, BackwardApply<T, Silu, false>{x, grad, nullptr, dx, rows_of(op, b), {}});
  }
}

// What dx needs of one group, from `sums`: mean(k dv) rstd and mean(k dv x^) rstd^2.
struct GroupMeans {
  float g, gx;
};
GroupMeans group_means(const GroupNorm& op, int64_t b, int64_t g) {
  const int64_t channels = op.group_channels();
  const double *p = op.sums + b * 2 * op.channels, *q = p + op.channels;
  const double rstd = op.rstd[b * op.groups + g];
  double sum_g = 0, sum_gx = 0;
  for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
    const double k = fold(op, b, c, 1.f, 0.f).gain;
    sum_g += k * p[c];
    sum_gx += k * q[c];
  }
  const double count = static_cast<double>(channels * op.pixels);
  return {static_cast<float>(sum_g / count * rstd), static_cast<float>(sum_gx / count * rstd * rstd)};
}

// ---- C order -------------------------------------------------------------------------------------------------------

// Of a run of sample b that begins at `at`; its residual sum is written first, a block at a time.
template <class T>
void run_moments(const GroupNorm& op, int64_t b, int64_t at, int64_t count, Moments& total) {
  const T* x = input<T>(op.x, op.x_batch, b) + at;
  constexpr int64_t kBlock = kGroupNormRows * kGroupNormColumns;
  double sums[2 * kGroupNormColumns];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t left = count - first < kBlock ? count - first : kBlock;
    const int64_t vectors = left / kLanes * kLanes;  // a short run: fewer columns
    const int64_t width = left >= kGroupNormColumns ? kGroupNormColumns : (vectors > 0 ? vectors : kLanes);
    add_branch<T>(op, b, at + first, left);
    block_moments(x + first, left, width, sums);
    for (int64_t i = 0; i < width; ++i) {
      total.sum += sums[i];
      total.squares += sums[width + i];
    }
  }
}

template <class T, bool Silu, bool Stream>
void apply_channel(const T* x, T* y, int64_t pixels, const Forward& c) {
  constexpr bool kRough = sizeof(T) == 2;
  const Sigmoid<kRough> sigmoid;
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) emit<Stream>(y + i, activate<Silu, kRough>(load(x + i), c, sigmoid), Whole{});
  if (i < pixels) write(y + i, activate<Silu, kRough>(read(x + i, Part{pixels - i}), c, sigmoid), Part{pixels - i});
}

template <class T, bool Silu>
void run(const GroupNorm& op, int64_t b, int64_t g) {
  const int64_t channels = op.group_channels(), count = channels * op.pixels, first = g * count;
  const T* x = input<T>(op.x, op.x_batch, b) + first;
  T* y = output<T>(op, b) + first;
  Moments total;
  run_moments<T>(op, b, first, count, total);
  const Statistics of = statistics(total, static_cast<double>(count), op.eps);
  op.mean[b * op.groups + g] = of.mean;
  op.rstd[b * op.groups + g] = of.rstd;
  const bool streams = op.pixels % kLanes == 0 && streamable(op, y);
  for (int64_t c = 0; c < channels; ++c) {
    const GroupNormFold folded = fold(op, b, g * channels + c, of.rstd, of.beyond);
    const Forward constants{splat(of.mean), splat(folded.gain), splat(folded.offset)};
    if (streams)
      apply_channel<T, Silu, true>(x + c * op.pixels, y + c * op.pixels, op.pixels, constants);
    else
      apply_channel<T, Silu, false>(x + c * op.pixels, y + c * op.pixels, op.pixels, constants);
  }
  if (streams) fence();
}

// sum(dv) and sum(dv (x - mean)) of one channel: in float32 over kGroupNormRows vectors, then in double.
template <class T, bool Silu>
Moments channel_gradients(const T* x, const T* grad, int64_t pixels, const Forward& c) {
  const Sigmoid<false> sigmoid;
  Moments total;
  for (int64_t first = 0; first < pixels; first += kGroupNormRows * kLanes) {
    const int64_t end = pixels - first < kGroupNormRows * kLanes ? pixels : first + kGroupNormRows * kLanes;
    Lanes p = zero_lanes(), q = zero_lanes();
    const auto add = [&](Lanes v, Lanes g) GENENGINE_ALWAYS_INLINE {
      const Lanes dv = grad_v<Silu>(v, g, c, sigmoid);
      p = p + dv;
      q = multiply_add(dv, v - c.mean, q);
    };
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) add(load(x + i), load(grad + i));
    if (i < end) add(read(x + i, Part{end - i}), read(grad + i, Part{end - i}));
    total.sum += sum(p);
    total.squares += sum(q);
  }
  return total;
}

// dx of one channel; grad_x_in: the gradient of the sum itself, or null.
template <bool Silu, bool Residual, class T>
void backward_channel(const T* x, const T* grad, const T* grad_x_in, T* dx, int64_t pixels, const Backward& c) {
  const Sigmoid<false> sigmoid;
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) {
    const Lanes own = grad_x<Silu>(load(x + i), load(grad + i), c, sigmoid);
    store(dx + i, Residual ? own + load(grad_x_in + i) : own);
  }
  if (const int64_t some = pixels - i; some > 0) {
    const Lanes own = grad_x<Silu>(read(x + i, Part{some}), read(grad + i, Part{some}), c, sigmoid);
    write(dx + i, Residual ? own + read(grad_x_in + i, Part{some}) : own, Part{some});
  }
}

template <class T, bool Silu>
void backward_run(const GroupNorm& op, int64_t b, int64_t g) {
  const int64_t channels = op.group_channels(), pixels = op.pixels, begin = g * channels;
  const T *x = input<T>(op.x, op.x_batch, b), *grad = input<T>(op.grad, op.grad_batch, b);
  T* dx = output<T>(op, b);
  const float mean = op.mean[b * op.groups + g], rstd = op.rstd[b * op.groups + g];
  double *p = op.sums + b * 2 * op.channels, *q = p + op.channels;
  for (int64_t c = begin; c < begin + channels; ++c) {
    const GroupNormFold folded = fold(op, b, c, rstd, 0.f);
    const Forward constants{splat(mean), splat(folded.gain), splat(folded.offset)};
    const Moments found = channel_gradients<T, Silu>(x + c * pixels, grad + c * pixels, pixels, constants);
    p[c] = found.sum;
    q[c] = found.squares * rstd;
  }
  const GroupMeans means = group_means(op, b, g);
  for (int64_t c = begin; c < begin + channels; ++c) {
    const GroupNormFold folded = fold(op, b, c, rstd, 0.f);
    const Backward constants{splat(mean), splat(folded.gain), splat(folded.offset), splat(means.g),
                             splat(means.gx)};
    if (op.grad_x) {
      const T* grad_x_in = input<T>(op.grad_x, op.grad_x_batch, b) + c * pixels;
      backward_channel<Silu, true>(x + c * pixels, grad + c * pixels, grad_x_in, dx + c * pixels, pixels, constants);
    } else {
      backward_channel<Silu, false>(x + c * pixels, grad + c * pixels, static_cast<const T*>(nullptr), dx + c * pixels, pixels,
                                    constants);
    }
  }
}

template <class T>
void sums(const GroupNorm& op, int64_t b, int64_t block) {
  const Span at = span_of(op, block);
  add_branch<T>(op, b, at.first, at.count);
  block_moments(input<T>(op.x, op.x_batch, b) + at.first, at.count, op.width, partial_of(op, b, block));
}

}  // namespace

// f is a template over the storage type and whether there is an activation.
#define GENENGINE_STORAGE(f, ...)                                                          \
  switch (op.type) {                                                                       \
    case Type::f32: return op.silu ? f<float, true>(__VA_ARGS__) : f<float, false>(__VA_ARGS__);    \
    case Type::f16: return op.silu ? f<Half, true>(__VA_ARGS__) : f<Half, false>(__VA_ARGS__);      \
    case Type::bf16: return op.silu ? f<BFloat, true>(__VA_ARGS__) : f<BFloat, false>(__VA_ARGS__); \
  }

void group_norm_sums(const GroupNorm& op, int64_t b, int64_t block) {
  switch (op.type) {
    case Type::f32: return sums<float>(op, b, block);
    case Type::f16: return sums<Half>(op, b, block);
    case Type::bf16: return sums<BFloat>(op, b, block);
  }
}

void group_norm_fold(const GroupNorm& op, int64_t b) {
  const double* sums = channel_sums(op, b);
  const Rows rows = rows_of(op, b);
  const int64_t channels = op.group_channels();
  for (int64_t g = 0; g < op.groups; ++g) {
    Moments total;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      total.sum += sums[c];
      total.squares += sums[op.width + c];
    }
    const Statistics of = statistics(total, static_cast<double>(channels * op.pixels), op.eps);
    op.mean[b * op.groups + g] = of.mean;
    op.rstd[b * op.groups + g] = of.rstd;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const GroupNormFold folded = fold(op, b, c, of.rstd, of.beyond);
      rows.row[c] = of.mean;
      rows.row[op.width + c] = folded.gain;
      rows.row[2 * op.width + c] = folded.offset;
    }
  }
  repeat(rows, 3, op.channels);
}

void group_norm_apply(const GroupNorm& op, int64_t b, int64_t block) { GENENGINE_STORAGE(apply, op, b, block) }

void group_norm_backward_prepare(const GroupNorm& op, int64_t b) {
  const Rows rows = rows_of(op, b);
  const int64_t channels = op.group_channels(), width = op.width;
  for (int64_t c = 0; c < op.channels; ++c) {
    const int64_t group = b * op.groups + c / channels;
    const GroupNormFold folded = fold(op, b, c, op.rstd[group], 0.f);
    rows.row[c] = op.mean[group];
    rows.row[width + c] = folded.gain;
    rows.row[2 * width + c] = folded.offset;
  }
  repeat(rows, 3, op.channels);
}

void group_norm_backward_sums(const GroupNorm& op, int64_t b, int64_t block) {
  GENENGINE_STORAGE(backward_sums, op, b, block)
}

void group_norm_backward_fold(const GroupNorm& op, int64_t b) {
  const Rows rows = rows_of(op, b);
  const int64_t channels = op.group_channels(), width = op.width;
  const double* columns = channel_sums(op, b);
  double *p = op.sums + b * 2 * op.channels, *q = p + op.channels;
  for (int64_t c = 0; c < op.channels; ++c) {
    p[c] = columns[c];
    q[c] = columns[width + c] * op.rstd[b * op.groups + c / channels];
  }
  for (int64_t g = 0; g < op.groups; ++g) {
    const GroupMeans means = group_means(op, b, g);
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      rows.row[3 * width + c] = means.g;
      rows.row[4 * width + c] = means.gx;
    }
  }
  repeat({rows.row + 3 * width, width}, 2, op.channels);
}

void group_norm_backward_apply(const GroupNorm& op, int64_t b, int64_t block) {
  GENENGINE_STORAGE(backward_apply, op, b, block)
}

void group_norm_run(const GroupNorm& op, int64_t b, int64_t g) { GENENGINE_STORAGE(run, op, b, g) }

void group_norm_backward_run(const GroupNorm& op, int64_t b, int64_t g) { GENENGINE_STORAGE(backward_run, op, b, g) }

void group_norm_modulation_gradients(const GroupNorm& op, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const double *p = op.sums + b * 2 * op.channels, *q = p + op.channels;
    for (int64_t c = 0; c < op.channels; ++c) {
      const double weight = op.weight ? element(op.parameter_type, op.weight, c) : 1.0;
      const double bias = op.bias ? element(op.parameter_type, op.bias, c) : 0.0;
      const int64_t i = b * op.channels + c;
      set_element(op.modulation_type, op.dscale, i, static_cast<float>(weight * q[c] + bias * p[c]));
      set_element(op.modulation_type, op.dshift, i, static_cast<float>(p[c]));
    }
  }
}

void group_norm_parameter_gradients(const GroupNorm& op, int64_t batch, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double dweight = 0, dbias = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const double scale = op.scale ? element(op.modulation_type, op.scale, b * op.scale_batch + c) : 0.0;
      dbias += op.sums[b * 2 * op.channels + c] * (1 + scale);
      dweight += op.sums[(b * 2 + 1) * op.channels + c] * (1 + scale);
    }
    set_element(op.parameter_type, op.dweight, c, static_cast<float>(dweight));
    set_element(op.parameter_type, op.dbias, c, static_cast<float>(dbias));
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
