// bias_act and its backwards, a tile at a time: elements enter L1 as float32, meet their tile of biases, and leave.
#include "cpu/bias_act_loops.h"

#include "cpu/isa/span.h"
#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// Streaming stores need every group of sixteen elements aligned to itself.
template <class T>
GENENGINE_INLINE bool aligned(const T* to) {
  return reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(T)) == 0;
}

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

// Scaled: gain or clamp do something. Stream: y is aligned for it.
template <Activation A, bool Scaled, bool Stream, class T>
void value_tile(T* y, const T* x, const float* bias, int64_t count, BiasActOptions o) {
  constexpr bool kRounded = kIsBFloat<T>;
  each_span(count, [&](int64_t i, auto span) GENENGINE_ALWAYS_INLINE {
    const Elements u(read(x + i, span) + read(bias + i, span));
    emit<Stream>(y + i, lanewise([&](int k) GENENGINE_ALWAYS_INLINE {
      return Scaled ? bias_act_value<A, kRounded>(u[k], o) : activate<A, kRounded>(u[k], o.alpha);
    }), span);
  });
}

template <Activation A, bool Scaled, class T>
void forward(const BiasActForward& op, int64_t begin, int64_t end) {
  T* y = static_cast<T*>(op.y);
  for (int64_t task = begin; task < end; ++task) {
    const Along bias(op.rows, op.rows.bias, task);
    each_tile(op.rows, task, [&](int64_t first, int64_t count, int64_t column) GENENGINE_ALWAYS_INLINE {
      const T* x = static_cast<const T*>(op.x) + first;
      if (op.stream && aligned(y + first))
        value_tile<A, Scaled, true>(y + first, x, bias.at(column), count, op.options);
      else
        value_tile<A, Scaled, false>(y + first, x, bias.at(column), count, op.options);
    });
  }
  if (op.stream) fence();
}

// ---- backward ------------------------------------------------------------------------------------------------------

// One tile's addresses; sums: of the row's columns, or null.
template <class T>
struct GradTile {
  const T *grad, *x, *grad_dx;
  const float *bias, *grad_dbias;
  T *dx, *d_grad;
  float* sums;
};

// The sum of dx.
template <Activation A, bool Clamped, bool Second, class T>
float grad_tile(const GradTile<T>& at, int64_t count, BiasActOptions o, bool past_caches) {
  Lanes total = zero_lanes();
  each_span(count, [&](int64_t i, auto span) GENENGINE_ALWAYS_INLINE {
    const Elements u(read(at.x + i, span) + read(at.bias + i, span));
    const auto slope = [&](int k) GENENGINE_ALWAYS_INLINE { return bias_act_slope<A, Clamped>(u[k], o); };
    Lanes dx;
    if constexpr (Second) {
      const Lanes v = read(at.grad_dx + i, span) + read(at.grad_dbias + i, span);
      put(past_caches, at.d_grad + i, v * lanewise(slope), span);
      if constexpr (!is_curved(A)) return;
      dx = v * read(at.grad + i, span) *
           lanewise([&](int k) GENENGINE_ALWAYS_INLINE { return bias_act_curvature<A, Clamped>(u[k], o); });
    } else {
      dx = read(at.grad + i, span) * lanewise(slope);
    }
    put(past_caches, at.dx + i, dx, span);
    if (at.sums)
      write(at.sums + i, read(at.sums + i, span) + dx, span);
    else
      total = total + dx;  // zeros beyond the end, where grad is read as zeros
  });
  return sum(total);
}

template <Activation A, bool Clamped, bool Second, class T>
void backward(const BiasActBackward& op, int64_t begin, int64_t end) {
  const bool by_row = op.rows.channels > 0, summed = op.partial != nullptr;
  const auto in = [](const void* base, int64_t first) { return static_cast<const T*>(base) + first; };
  const auto out = [](void* base, int64_t first) { return static_cast<T*>(base) + first; };
  for (int64_t task = begin; task < end; ++task) {
    const Along bias(op.rows, op.rows.bias, task), grad_dbias(op.rows, Second ? op.grad_dbias : op.rows.bias, task);
    float* sums = summed && !by_row ? op.partial + task * op.rows.length : nullptr;
    if (sums) memset(sums, 0, sizeof(float) * static_cast<size_t>(op.rows.length));
    float total = 0.f;
    each_tile(op.rows, task, [&](int64_t first, int64_t count, int64_t column) GENENGINE_ALWAYS_INLINE {
      const GradTile<T> at{in(op.grad, first), in(op.x, first), in(op.grad_dx, first), bias.at(column), grad_dbias.at(column),
                           out(op.dx, first), out(op.d_grad, first), sums ? sums + column : nullptr};
      const bool past_caches = op.stream && aligned(at.dx) && aligned(at.d_grad);
      total += grad_tile<A, Clamped, Second>(at, count, op.options, past_caches);
    });
    if (summed && by_row) op.partial[task] = total;
  }
  if (op.stream) fence();
}

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
    const bool clamped = op.options.clamp == op.options.clamp, second = op.grad_dx != nullptr;
    const auto run = [&]<class T>(T) {
      if (second) return backward<A, true, true, T>(op, begin, end);  // rarer: one build, that also serves without a clamp
      clamped ? backward<A, true, false, T>(op, begin, end) : backward<A, false, false, T>(op, begin, end);
    };
    switch (op.type) {
      case Type::f32: return run(float{});
      case Type::f16: return run(Half{});
      case Type::bf16: return run(BFloat{});
    }
  });
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
