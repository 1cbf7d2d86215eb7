// Elementary functions of sixteen floats at once, written for the units of a CPU that multiply-adds keep busy.
// Results may differ in the last places between instruction sets.
#pragma once
#include "cpu/isa/convert.h"

namespace genengine {
namespace GENENGINE_ISA {

GENENGINE_INLINE Lanes all_lanes(float value) { return zero_lanes() + value; }

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

// a / d for d >= 1. Rough: 14 bits, enough where the result is rounded to 16.
template <bool Rough>
GENENGINE_INLINE Lanes over(Lanes a, Lanes d) {
#if defined(__AVX512F__)
  // beyond 1e37 the Newton step would multiply 0 and infinity; min returns its second operand for NaN
  const __m512 divisor = Rough ? (__m512)d.part[0] : _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(1e37f), (__m512)d.part[0]);
  const __m512 r = _mm512_maskz_rcp14_ps(0xffff, divisor);
  if (Rough) return a * Lanes{{(Native)r}};
  const __m512 error = _mm512_fnmadd_ps(divisor, r, _mm512_set1_ps(1.f));
  const __m512 refined = _mm512_fmadd_ps(r, error, r);
  return a * Lanes{{(Native)refined}};
#else
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] / d.part[i];
  return a;
#endif
}

// 1 + e^-v. e^-v = 2^n 2^f with |f| <= 1/2 and a minimax polynomial in f: of degree 5 (relative error 1e-7, and
// 2e-8 |v|), Rough of degree 3 (8e-5).
template <bool Rough>
GENENGINE_INLINE Lanes one_plus_exp_minus(Lanes v) {
  const Lanes magic = all_lanes(12582912.f), x = bounded(v, 87.f), minus_log2e = all_lanes(-1.44269504f);
  const Lanes shifted = multiply_add(x, minus_log2e, magic), n = shifted - magic;
  const Lanes f = multiply_add(x, minus_log2e, zero_lanes() - n);
  Lanes p;
  if (Rough) {
    p = multiply_add(f, all_lanes(5.51716685e-2f), all_lanes(2.42611125e-1f));
    p = multiply_add(f, p, all_lanes(6.93260968e-1f));
    p = multiply_add(f, p, all_lanes(9.99928057e-1f));
  } else {
    p = multiply_add(f, all_lanes(1.32764725e-3f), all_lanes(9.67554189e-3f));
    p = multiply_add(f, p, all_lanes(5.55071309e-2f));
    p = multiply_add(f, p, all_lanes(2.40221202e-1f));
    p = multiply_add(f, p, all_lanes(6.93146944e-1f));
    p = multiply_add(f, p, all_lanes(1.00000012f));
  }
  return scale_by_power(p, shifted, n) + 1.f;
}

template <bool Rough>
GENENGINE_INLINE Lanes silu(Lanes v) {
  return over<Rough>(v, one_plus_exp_minus<Rough>(v));
}

GENENGINE_INLINE Lanes sigmoid(Lanes v) { return over<false>(all_lanes(1.f), one_plus_exp_minus<false>(v)); }

}  // namespace GENENGINE_ISA
}  // namespace genengine
