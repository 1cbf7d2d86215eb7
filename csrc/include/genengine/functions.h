// Elementary functions of one float for host and device: exp, log, log1p, tanh, erf, and what activations make of them.
// On the host they are branch-free, so that a loop over a tile vectorises; each errs by at most 2.4 units in the last
// place of float32, NaN stays NaN, infinities give their limits. On the device they are CUDA's own.
// Fused multiply-adds are used where the instruction set has them: results may differ in the last place between builds,
// so nothing here may enter the noise (normal.h).
#pragma once
#include "genengine/hd.h"

namespace genengine {

GENENGINE_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

GENENGINE_HD float absolute(float x) { return as_float(as_int(x) & 0x7fffffff); }
GENENGINE_HD float with_sign_of(float magnitude, float x) { return as_float(as_int(magnitude) | (as_int(x) & INT32_MIN)); }

// Of NaN: a or a bound that is NaN changes nothing.
GENENGINE_HD float at_least(float a, float bound) { return a < bound ? bound : a; }
GENENGINE_HD float zero_below(float value, float a, float bound) { return a < bound ? 0.f : value; }

// condition ? a : b, on the host by their bits: of a conditional expression g++ makes a branch around what only one side
// needs, and such a loop does not vectorise.
GENENGINE_HD float select(bool condition, float a, float b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  const int32_t mask = -static_cast<int32_t>(condition);
  return as_float((as_int(a) & mask) | (as_int(b) & ~mask));
#endif
}

// e^x: x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial in r, and 2^n in two factors, for n reaches from -150 to 128.
GENENGINE_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float low = x < -104.f ? -104.f : x, bounded = low > 89.f ? 89.f : low;
  const float shifted = multiply_add(bounded, 1.44269504f, 12582912.f), n = shifted - 12582912.f;
  float r = multiply_add(n, -0.693359375f, bounded);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = multiply_add(r, 1.3941118e-3f, 8.3631799e-3f);
  p = multiply_add(r, p, 4.1666374e-2f);
  p = multiply_add(r, p, 1.6666577e-1f);
  p = multiply_add(r, p, 0.5f);
  p = multiply_add(r * r, p, r) + 1.f;
  const int32_t whole = as_int(shifted) - as_int(12582912.f), half = whole >> 1;
  return p * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
#endif
}

// e^x for |x| <= 87, clamped to e^-87 and e^88 beyond: a third fewer instructions than exponential.
GENENGINE_HD float exponential_within(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x < -87.f ? -87.f : x > 88.f ? 88.f : x);
#else
  const float low = -87.f > x ? -87.f : x, bounded = 88.f < low ? 88.f : low;
  const float shifted = multiply_add(bounded, 1.44269504f, 12582912.f), n = shifted - 12582912.f;
  float r = multiply_add(n, -0.693359375f, bounded);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = multiply_add(r, 1.3941118e-3f, 8.3631799e-3f);
  p = multiply_add(r, p, 4.1666374e-2f);
  p = multiply_add(r, p, 1.6666577e-1f);
  p = multiply_add(r, p, 0.5f);
  p = multiply_add(r * r, p, r) + 1.f;
  const uint32_t exponent = static_cast<uint32_t>(as_int(shifted)) << 23;  // n, the low bits of shifted, in place
  return as_float(static_cast<int32_t>(static_cast<uint32_t>(as_int(p)) + exponent));
#endif
}

// ln x; -infinity at 0, NaN below.
GENENGINE_HD float logarithm(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const bool tiny = x < 0x1p-126f;
  const float scaled = tiny ? x * 0x1p23f : x;
  const int32_t offset = as_int(scaled) - 0x3f3504f3, exponent = (offset >> 23) - (tiny ? 23 : 0);
  const float f = as_float((offset & 0x7fffff) + 0x3f3504f3) - 1.f, z = f * f;  // minimax polynomial of Cephes' logf
  float p = multiply_add(f, 7.0376836292e-2f, -1.1514610310e-1f);
  p = multiply_add(p, f, 1.1676998740e-1f);
  p = multiply_add(p, f, -1.2420140846e-1f);
  p = multiply_add(p, f, 1.4249322787e-1f);
  p = multiply_add(p, f, -1.6668057665e-1f);
  p = multiply_add(p, f, 2.0000714765e-1f);
  p = multiply_add(p, f, -2.4999993993e-1f);
  p = multiply_add(p, f, 3.3333331174e-1f);
  const float n = static_cast<float>(exponent);
  float y = multiply_add(f * z, p, n * -2.12194440e-4f);
  y = multiply_add(-0.5f, z, y);
  y = multiply_add(n, 0.693359375f, y + f);
  y = x == __builtin_inff() ? x : y;
  y = x == 0.f ? -__builtin_inff() : y;
  return x >= 0.f ? y : __builtin_nanf("");
#endif
}

// ln(1 + x) for x > -1, accurate near 0: the rounding of 1 + x is put back.
GENENGINE_HD float logarithm_1p(float x) {
#if defined(__CUDA_ARCH__)
  return log1pf(x);
#else
  const float u = 1.f + x, lost = x - (u - 1.f);
  return u < 0x1p127f ? logarithm(u) + lost / u : logarithm(u);
#endif
}

GENENGINE_HD float hyperbolic_tangent(float x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  const float a = absolute(x), z = x * x;
  float p = multiply_add(z, -6.1131944e-3f, 2.1010085e-2f);
  p = multiply_add(p, z, -5.3854071e-2f);
  p = multiply_add(p, z, 1.3332795e-1f);
  p = multiply_add(p, z, -3.3333328e-1f);
  const float small = multiply_add(p * z, x, x), large = 1.f - 2.f / (exponential_within(2.f * a) + 1.f);
  return select(a < 0.625f, small, with_sign_of(large, x));
#endif
}

// erf x: an odd polynomial up to 1, beyond it 1 - exp(polynomial), the exponent being ln erfc.
GENENGINE_HD float error_function(float x) {
#if defined(__CUDA_ARCH__)
  return erff(x);
#else
  const float a = absolute(x), z = x * x;
  float p = multiply_add(z, 7.8891193e-05f, -0.000802084105f);
  p = multiply_add(p, z, 0.00518953521f);
  p = multiply_add(p, z, -0.0268544443f);
  p = multiply_add(p, z, 0.112836003f);
  p = multiply_add(p, z, -0.37612626f);
  p = multiply_add(p, z, 0.128379167f);  // less 1: its last place is worth eight times as little
  const float b = a > 4.f ? 4.f : a;
  float q = multiply_add(b, 0.0001855749f, -0.00293961563f);
  q = multiply_add(q, b, 0.0218053516f);
  q = multiply_add(q, b, -0.103037432f);
  q = multiply_add(q, b, -0.638225615f);
  q = multiply_add(q, b, -1.12704003f);
  q = multiply_add(q, b, -0.000353708921f);
  const float large = 1.f - exponential(q);
  return a < 1.f ? multiply_add(p, x, x) : with_sign_of(large, x);
#endif
}

// 1 / (1 + e^-x), at least e^-88
GENENGINE_HD float sigmoid(float x) { return 1.f / (1.f + exponential_within(-x)); }

// ln(1 + e^x), without overflow
GENENGINE_HD float softplus(float x) { return (x > 0.f ? x : 0.f) + logarithm_1p(exponential(-absolute(x))); }

}  // namespace genengine
