// glu and its backward, a row at a time, sixteen elements in registers.
#include "cpu/glu_loops.h"

#include "cpu/isa/span.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

template <class T>
GENENGINE_INLINE const T* row_of(const GluView& view, int64_t tokens, int64_t row) {
  const int64_t b = row / tokens;
  return static_cast<const T*>(view.data) + b * view.batch + (row - b * tokens) * view.token;
}

// Streaming stores need every group of sixteen elements aligned to itself.
template <class T>
bool streams(const Glu& op) {
  return op.stream && op.dim % kLanes == 0 && reinterpret_cast<uintptr_t>(op.out) % (kLanes * sizeof(T)) == 0;
}

template <Activation A, class T>
void forward(const Glu& op, int64_t begin, int64_t end) {
  constexpr bool kRounded = kIsBFloat<T>;
  const bool past_caches = streams<T>(op);
  const float *gate_bias = op.bias + op.gate, *value_bias = op.bias + op.value;
  for (int64_t row = begin; row < end; ++row) {
    const T *x = row_of<T>(op.x, op.tokens, row), *gates = x + op.gate, *values = x + op.value;
    T* y = static_cast<T*>(op.out) + row * op.dim;
    each_span(op.dim, [&](int64_t i, auto span) GENENGINE_ALWAYS_INLINE {
      const Elements gate(read(gates + i, span) + read(gate_bias + i, span));
      const Elements value(read(values + i, span) + read(value_bias + i, span));
      put(past_caches, y + i, lanewise([&](int k) GENENGINE_ALWAYS_INLINE {
        return glu_value<A, kRounded>(gate[k], value[k]);
      }), span);
    });
  }
  if (past_caches) fence();
}

GENENGINE_INLINE void add(float* sums, Lanes lanes, auto span) { write(sums, read(sums, span) + lanes, span); }

template <Activation A, class T>
void backward(const Glu& op, int64_t begin, int64_t end) {
  const bool past_caches = streams<T>(op);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kGluChunk, last = first + kGluChunk < op.rows ? first + kGluChunk : op.rows;
    float* sums = op.partial ? op.partial + chunk * 2 * op.dim : nullptr;
    if (sums) memset(sums, 0, sizeof(float) * 2 * static_cast<size_t>(op.dim));
    for (int64_t row = first; row < last; ++row) {
      const T *x = row_of<T>(op.x, op.tokens, row), *grads = row_of<T>(op.grad, op.tokens, row);
      T* dx = static_cast<T*>(op.out) + row * 2 * op.dim;
      each_span(op.dim, [&](int64_t i, auto span) GENENGINE_ALWAYS_INLINE {
        const int64_t g = op.gate + i, v = op.value + i;
        const Lanes grad = read(grads + i, span);
        const Elements gate(read(x + g, span) + read(op.bias + g, span)), value(read(x + v, span) + read(op.bias + v, span));
        const Lanes d_gate = grad * lanewise([&](int k) GENENGINE_ALWAYS_INLINE {
          return glu_gate_slope<A>(gate[k], value[k]);
        });
        const Lanes d_value = grad * lanewise([&](int k) GENENGINE_ALWAYS_INLINE {
          return activate<A>(gate[k], 0.f);  // in full: sums of it are not rounded
        });
        put(past_caches, dx + g, d_gate, span);
        put(past_caches, dx + v, d_value, span);
        if (sums) {
          add(sums + g, d_gate, span);
          add(sums + v, d_value, span);
        }
      });
    }
  }
  if (past_caches) fence();
}

template <class Body>
GENENGINE_INLINE void with_gate(Activation activation, Body body) {
  if (activation == Activation::gelu) return body(Tag<Activation::gelu>{});
  if (activation == Activation::gelu_tanh) return body(Tag<Activation::gelu_tanh>{});
  body(Tag<Activation::silu>{});
}

}  // namespace

#define GENENGINE_GLU(f)                                                  \
  with_gate(op.activation, [&](auto tag) {                                \
    constexpr Activation A = decltype(tag)::kActivation;                  \
    switch (op.type) {                                                    \
      case Type::f32: return f<A, float>(op, begin, end);                 \
      case Type::f16: return f<A, Half>(op, begin, end);                  \
      case Type::bf16: return f<A, BFloat>(op, begin, end);               \
    }                                                                     \
  })

void glu_forward(const Glu& op, int64_t begin, int64_t end) { GENENGINE_GLU(forward); }

void glu_backward(const Glu& op, int64_t begin, int64_t end) { GENENGINE_GLU(backward); }

}  // namespace GENENGINE_ISA
}  // namespace genengine
