// Elementary functions of sixteen floats at once: genengine/functions.h with AVX-512's own instructions where they are
// shorter (else lane by lane, in a loop that the compiler vectorises), and sigmoids for loops that are bound by them.
// Results may differ in the last places between instruction sets.
#pragma once
#include "genengine/functions.h"

#include "cpu/isa/convert.h"

namespace genengine {
namespace GENENGINE_ISA {

// Less zero: of a sum with zero, which changes -0, g++ keeps the addition.
GENENGINE_INLINE Lanes splat(float value) { return value - zero_lanes(); }

GENENGINE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    a.part[i] = (Native)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]);
#elif defined(__FMA__)
    a.part[i] = (Native)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
    a.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  }
  return a;
}

GENENGINE_INLINE Lanes multiply_add(float a, Lanes b, Lanes c) { return multiply_add(splat(a), b, c); }

// a b - c
GENENGINE_INLINE Lanes multiply_subtract(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return {{(Native)_mm512_fmsub_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])}};
#else
  return multiply_add(a, b, zero_lanes() - c);
#endif
}

GENENGINE_INLINE Lanes at_least(Lanes a, float bound) {
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] < bound ? Native{} + bound : a.part[i];
  return a;
}

GENENGINE_INLINE Lanes zero_below(Lanes value, Lanes a, float bound) {
  for (int i = 0; i < kParts; ++i) value.part[i] = a.part[i] < bound ? Native{} : value.part[i];
  return value;
}

GENENGINE_INLINE Lanes exponential(Lanes x) {
#if defined(__AVX512F__)
  // e^x = 2^n e^r as in functions.h; scalef reaches subnormal and infinite results in one step. min and max keep NaN.
  const auto c = [](float value) { return _mm512_set1_ps(value); };
  const __m512 bounded = _mm512_max_ps(c(-104.f), _mm512_min_ps(c(89.f), (__m512)x.part[0]));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, c(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fmadd_ps(n, c(2.12194440e-4f), _mm512_fmadd_ps(n, c(-0.693359375f), bounded));
  __m512 p = _mm512_fmadd_ps(r, c(1.3941118e-3f), c(8.3631799e-3f));
  p = _mm512_fmadd_ps(r, p, c(4.1666374e-2f));
  p = _mm512_fmadd_ps(r, p, c(1.6666577e-1f));
  p = _mm512_fmadd_ps(r, p, c(0.5f));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), c(1.f));
  return {{(Native)_mm512_scalef_ps(p, n)}};
#else
  float v[kLanes];
  store(v, x);
  for (int i = 0; i < kLanes; ++i) v[i] = genengine::exponential(v[i]);
  return load(v);
#endif
}

// 2^n p for whole n; n is held as the low bits of `shifted` = n + 1.5 2^23.
GENENGINE_INLINE Lanes scale_by_power(Lanes p, [[maybe_unused]] Lanes shifted, [[maybe_unused]] Lanes n) {
#if defined(__AVX512F__)
  p.part[0] = (Native)_mm512_maskz_scalef_ps(0xffff, (__m512)p.part[0], (__m512)n.part[0]);
#else
  for (int i = 0; i < kParts; ++i) p.part[i] = (Native)((NativeBits)p.part[i] + ((NativeBits)shifted.part[i] << 23));
#endif
  return p;
}

// Bounded to +-limit where the instruction set has no scaling that saturates; NaN may become anything.
GENENGINE_INLINE Lanes bounded(Lanes v, [[maybe_unused]] float limit) {
#if !defined(__AVX512F__)
  for (int i = 0; i < kParts; ++i) {
    const Native low = Native{} - limit, high = Native{} + limit;
    const NativeBits above = (NativeBits)(v.part[i] > high), below = (NativeBits)(v.part[i] < low);
    const NativeBits kept = (NativeBits)v.part[i] & ~above & ~below;
    v.part[i] = (Native)(kept | ((NativeBits)high & above) | ((NativeBits)low & below));
  }
#endif
  return v;
}

// a / d for d >= 1. Rough: 14 bits where the instruction set has them, enough for a result that is rounded to 16.
template <bool Rough>
GENENGINE_INLINE Lanes over(Lanes a, Lanes d) {
#if defined(__AVX512F__)
  if (Rough) return a * Lanes{{(Native)_mm512_maskz_rcp14_ps(0xffff, (__m512)d.part[0])}};
#endif
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] / d.part[i];
  return a;
}

// 1 / d for d >= 1 below 2^126: an estimate and a step of Newton's, which is exact to 1.5 units in the last place.
GENENGINE_INLINE Lanes reciprocal(Lanes d) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)d.part[0], r = _mm512_maskz_rcp14_ps(0xffff, x);
  return {{(Native)_mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.f)))}};
#else
  return over<false>(splat(1.f), d);
#endif
}

// A constant that the compiler keeps in a register across a loop, where there are registers enough: left to itself g++
// reads it from memory each time, and a core with one 64-byte load per cycle then waits for its loads.
GENENGINE_INLINE Lanes held(float value) {
  Lanes lanes = splat(value);
#if defined(__AVX512F__)
  asm("" : "+v"(lanes.part[0]));
#endif
  return lanes;
}

// sigmoid(v) and v sigmoid(v) by e^-v = 2^n 2^f, |f| <= 1/2, with a minimax polynomial for 2^f: of degree 6 (relative error
// 2e-9, its rounding, and 1e-8 |v|: in a sum of many terms a bias would add up), Rough of degree 3 (8e-5).
// To be made outside of the loop that uses it.
template <bool Rough>
struct Sigmoid {
  static constexpr int kDegree = Rough ? 3 : 6;
  Lanes magic = held(12582912.f), minus_log2e = held(-1.44269504f), one = held(1.f), polynomial[kDegree + 1];

  GENENGINE_INLINE Sigmoid() {
    constexpr float rough[] = {9.99928057e-1f, 6.93260968e-1f, 2.42611125e-1f, 5.51716685e-2f};
    constexpr float fine[] = {1.f,            6.93147182e-1f, 2.40226462e-1f, 5.55032864e-2f,
                              9.61848907e-3f, 1.33999309e-3f, 1.53458124e-4f};
#pragma GCC unroll 7
    for (int i = 0; i <= kDegree; ++i) polynomial[i] = held(Rough ? rough[i] : fine[i]);
  }

  GENENGINE_INLINE Lanes one_plus_exp_minus(Lanes v) const {
    const Lanes x = bounded(v, 87.f), shifted = multiply_add(x, minus_log2e, magic), n = shifted - magic;
    const Lanes f = multiply_subtract(x, minus_log2e, n);
    Lanes p = polynomial[kDegree];
#pragma GCC unroll 6
    for (int i = kDegree - 1; i >= 0; --i) p = multiply_add(f, p, polynomial[i]);
    return scale_by_power(p, shifted, n) + one;
  }
  GENENGINE_INLINE Lanes silu(Lanes v) const { return over<Rough>(v, one_plus_exp_minus(v)); }
  GENENGINE_INLINE Lanes operator()(Lanes v) const { return over<Rough>(one, one_plus_exp_minus(v)); }
};

}  // namespace GENENGINE_ISA
}  // namespace genengine
