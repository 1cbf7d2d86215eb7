// Sixteen elements of a row, or the last few of it. Included only by csrc/cpu/isa/*.cpp.
#pragma once
#include "cpu/isa/convert.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

#define GENENGINE_RARE __attribute__((noinline, unused))  // the ends of rows: small code rather than fast
struct Whole {};  // sixteen elements
struct Part {     // the last few of a row
  int64_t count;
};

template <class T>
GENENGINE_INLINE Lanes read(const T* from, Whole) {
  return load(from);
}
template <class T>
GENENGINE_RARE Lanes read(const T* from, Part part) {
  T padded[kLanes] = {};
  memcpy(padded, from, sizeof(T) * static_cast<size_t>(part.count));
  return load(padded);
}
template <class T>
GENENGINE_INLINE void write(T* to, Lanes lanes, Whole) {
  store(to, lanes);
}
template <class T>
GENENGINE_RARE void write(T* to, Lanes lanes, Part part) {
  T padded[kLanes];
  store(padded, lanes);
  memcpy(to, padded, sizeof(T) * static_cast<size_t>(part.count));
}
template <bool Stream, class T>
GENENGINE_INLINE void emit(T* to, Lanes lanes, Whole) {
  if (Stream)
    stream(to, lanes);
  else
    store(to, lanes);
}
template <bool Stream, class T>
GENENGINE_INLINE void emit(T* to, Lanes lanes, Part part) {
  write(to, lanes, part);
}

// emit, chosen at run time.
template <class T, class Span>
GENENGINE_INLINE void put(bool past_caches, T* to, Lanes lanes, Span span) {
  past_caches ? emit<true>(to, lanes, span) : emit<false>(to, lanes, span);
}

template <class T>
constexpr bool kIsBFloat = false;
template <>
constexpr bool kIsBFloat<BFloat> = true;

// f(i) for sixteen i: the compiler makes vector instructions of the loop, and keeps the lanes in registers; but not of a
// loop that it has unrolled before.
template <class F>
GENENGINE_INLINE Lanes lanewise(F f) {
  float v[kLanes];
#pragma GCC unroll 1
  for (int i = 0; i < kLanes; ++i) v[i] = f(i);
  return load(v);
}

// Elements of Lanes by index, for lanewise.
struct Elements {
  float v[kLanes];
  GENENGINE_INLINE explicit Elements(Lanes lanes) { store(v, lanes); }
  GENENGINE_INLINE float operator[](int i) const { return v[i]; }
};

// body(i, span) for the elements i.. of a row of `count`.
template <class Body>
GENENGINE_INLINE void each_span(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, Whole{});
  if (i < count) body(i, Part{tail(count)});
}

}  // namespace
}  // namespace GENENGINE_ISA
}  // namespace genengine
