// genengine/functions.h on sixteen elements: with AVX-512's own instructions where they are shorter, else lane by lane in a
// loop that the compiler vectorises.
#pragma once
#include "genengine/functions.h"

#include "cpu/isa/convert.h"

namespace genengine {
namespace GENENGINE_ISA {

GENENGINE_INLINE Lanes splat(float value) { return zero_lanes() + value; }

GENENGINE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return {{(Native)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0])}};
#else
  for (int i = 0; i < kParts; ++i)
    for (int j = 0; j < kNative; ++j) a.part[i][j] = genengine::multiply_add(a.part[i][j], b.part[i][j], c.part[i][j]);
  return a;
#endif
}
GENENGINE_INLINE Lanes multiply_add(float a, Lanes b, Lanes c) { return multiply_add(splat(a), b, c); }

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

}  // namespace GENENGINE_ISA
}  // namespace genengine
