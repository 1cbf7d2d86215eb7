// bias_act and its backwards, a tile at a time: elements enter L1 as float32, meet their tile of biases, and leave.
#include "cpu/bias_act_loops.h"

#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

template <class T>
constexpr bool kIsBFloat = false;
template <>
constexpr bool kIsBFloat<BFloat> = true;

// body(first, count, column) for the tiles of a task, column being the first element's in its row. Tiles of a row
// are of one size but for the last.
template <class Body>
GENENGINE_INLINE void each_tile(const BiasedRows& rows, int64_t task, Body body) {
  const int64_t parts = (rows.length + kTile - 1) / kTile;
  const int64_t tile = ((rows.length + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
  const auto span = [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t left = rows.elements - row * rows.length;
    if (end > left) end = left;
    for (int64_t column = begin; column < end; column += tile)
      body(row * rows.length + column, end - column < tile ? end - column : tile, column);
  };
  if (rows.channels > 0) {
    const int64_t begin = task % rows.segments * kBiasSegment, end = begin + kBiasSegment;
    span(task / rows.segments, begin, end < rows.length ? end : rows.length);
  } else {
    const int64_t first = task * rows.rows_per_task;
    for (int64_t row = first; row < first + rows.rows_per_task && row * rows.length < rows.elements; ++row)
      span(row, 0, rows.length);
  }
}

// A task's values along the channels: a tile of one value repeated, or the row's own.
struct Along {
  alignas(64) float repeated[kTile];
  const float* row;
  Along(const BiasedRows& rows, const float* values, int64_t task) : row(values) {
    if (rows.channels == 0) return;
    const float value = values[task / rows.segments % rows.channels];
    for (int64_t i = 0; i < kTile; ++i) repeated[i] = value;
    row = nullptr;
  }
  GENENGINE_INLINE const float* at(int64_t column) const { return row ? row + column : repeated; }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// f of sixteen elements in registers: the compiler turns the loop into vector instructions, and v into none.
template <class F>
GENENGINE_INLINE Lanes lanewise(Lanes x, const float* bias, F f) {
  float v[kLanes];
  store(v, x);
  for (int i = 0; i < kLanes; ++i) v[i] = f(v[i] + bias[i]);
  return load(v);
}

// Scaled: gain or clamp do something. Stream: y is aligned for it.
template <Activation A, bool Scaled, bool Stream, class T>
void value_tile(T* y, const T* x, const float* bias, int64_t count, BiasActOptions o) {
  constexpr bool kRounded = kIsBFloat<T>;
  const auto f = [o](float u) __attribute__((always_inline)) {
    return Scaled ? bias_act_value<A, kRounded>(u, o) : activate<A, kRounded>(u, o.alpha);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes v = lanewise(load(x + i), bias + i, f);
    if constexpr (Stream)
      stream(y + i, v);
    else
      store(y + i, v);
  }
  for (int64_t end = i + tail(count); i < end; ++i) from_float(y[i], f(to_float(x[i]) + bias[i]));
}

template <Activation A, bool Scaled, class T>
void forward(const BiasActForward& op, int64_t begin, int64_t end) {
  T* y = static_cast<T*>(op.y);
  for (int64_t task = begin; task < end; ++task) {
    const Along bias(op.rows, op.rows.bias, task);
    each_tile(op.rows, task, [&](int64_t first, int64_t count, int64_t column) __attribute__((always_inline)) {
      const T* x = static_cast<const T*>(op.x) + first;
      const bool aligned = reinterpret_cast<uintptr_t>(y + first) % (kLanes * sizeof(T)) == 0;
      if (op.stream && aligned)
        value_tile<A, Scaled, true>(y + first, x, bias.at(column), count, op.options);
      else
        value_tile<A, Scaled, false>(y + first, x, bias.at(column), count, op.options);
    });
  }
  if (op.stream) fence();
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <Activation A, bool Clamped>
void slope_tile(float* dx, const float* grad, const float* x, const float* bias, int64_t count, BiasActOptions o) {
  for (int64_t i = 0; i < count; ++i) dx[i] = grad[i] * bias_act_slope<A, Clamped>(x[i] + bias[i], o);
}

template <Activation A, bool Clamped>
void curvature_tile(float* dx, const float* v, const float* grad, const float* x, const float* bias, int64_t count,
                    BiasActOptions o) {
  for (int64_t i = 0; i < count; ++i) dx[i] = v[i] * grad[i] * bias_act_curvature<A, Clamped>(x[i] + bias[i], o);
}

void add_tile(float* to, const float* from, const float* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] + other[i];
}

float tile_sum(const float* values, int64_t count) {
  Lanes sums[4] = {zero_lanes(), zero_lanes(), zero_lanes(), zero_lanes()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] = sums[k] + load(values + i + k * kLanes);
  float rest = 0.f;
  for (; i < count; ++i) rest += values[i];
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <Activation A, bool Clamped>
void backward(const BiasActBackward& op, int64_t begin, int64_t end) {
  alignas(64) float x[kTile], grad[kTile], v[kTile], out[kTile];
  const bool second = op.grad_dx != nullptr, by_row = op.rows.channels > 0;
  for (int64_t task = begin; task < end; ++task) {
    const Along bias(op.rows, op.rows.bias, task), grad_dbias(op.rows, second ? op.grad_dbias : op.rows.bias, task);
    float* sums = op.partial == nullptr ? nullptr : by_row ? op.partial + task : op.partial + task * op.rows.length;
    if (sums) memset(sums, 0, sizeof(float) * static_cast<size_t>(by_row ? 1 : op.rows.length));
    each_tile(op.rows, task, [&](int64_t first, int64_t count, int64_t column) __attribute__((always_inline)) {
      const float* at_x = load_tile(op.x, op.type, first, count, x);
      const float* at_bias = bias.at(column);
      if (second) {
        add_tile(v, load_tile(op.grad_dx, op.type, first, count, v), grad_dbias.at(column), count);
        slope_tile<A, Clamped>(out, v, at_x, at_bias, count, op.options);
        store_tile(op.d_grad, op.type, first, count, out, op.stream);
        if (op.dx == nullptr) return;
      }
      const float* at_grad = load_tile(op.grad, op.type, first, count, grad);
      if (second)
        curvature_tile<A, Clamped>(out, v, at_grad, at_x, at_bias, count, op.options);
      else
        slope_tile<A, Clamped>(out, at_grad, at_x, at_bias, count, op.options);
      store_tile(op.dx, op.type, first, count, out, op.stream);
      if (sums && by_row) *sums += tile_sum(out, count);
      if (sums && !by_row) add_tile(sums + column, sums + column, out, count);
    });
  }
  if (op.stream) fence();
}

template <Activation A>
struct Tag {
  static constexpr Activation kActivation = A;
};

template <class Body>
GENENGINE_INLINE void with_activation(Activation activation, Body body) {
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

}  // namespace

void bias_act_forward(const BiasActForward& op, int64_t begin, int64_t end) {
  with_activation(op.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::kActivation;
    const bool scaled = op.options.gain != 1.f || op.options.clamp == op.options.clamp;
    switch (op.type) {
      case Type::f32: return scaled ? forward<A, true, float>(op, begin, end) : forward<A, false, float>(op, begin, end);
      case Type::f16: return scaled ? forward<A, true, Half>(op, begin, end) : forward<A, false, Half>(op, begin, end);
      case Type::bf16: return scaled ? forward<A, true, BFloat>(op, begin, end) : forward<A, false, BFloat>(op, begin, end);
    }
  });
}

void bias_act_backward(const BiasActBackward& op, int64_t begin, int64_t end) {
  with_activation(op.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::kActivation;
    op.options.clamp == op.options.clamp ? backward<A, true>(op, begin, end) : backward<A, false>(op, begin, end);
  });
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
