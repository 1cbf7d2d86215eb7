// The noise specification (genengine/random.py) in scalar C++ for host and device: Philox-4x32-10, then Box-Muller from
// IEEE multiply, add and square root alone, in one written order. Units that include this are compiled without fused
// multiply-add (-ffp-contract=off, --fmad=false): then every backend has the same bits.
#pragma once
#include "genengine/hd.h"

namespace genengine {

struct Words {
  uint32_t w[4];
};

GENENGINE_HD Words philox(uint32_t quad, uint32_t sample, uint32_t step, uint32_t stream, uint64_t seed) {
  uint32_t c0 = quad, c1 = sample, c2 = step, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = static_cast<uint32_t>(p1);
    c2 = n2;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 23 random bits: exact in float32 and strictly inside (0, 1).
GENENGINE_HD float unit(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word >> 9)) * 0x1p-23f + 0x1p-24f; }

GENENGINE_HD float log_unit(float x) {
  const int32_t offset = as_int(x) - 0x3f3504f3, exponent = offset >> 23;  // x = 2^exponent m, m in [sqrt(1/2), sqrt(2))
  const float f = as_float((offset & 0x7fffff) + 0x3f3504f3) - 1.f;
  float p = f * 7.0376836292e-2f + -1.1514610310e-1f;  // minimax polynomial of Cephes' logf
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float z = f * f;
  float y = (f * z) * p;
  y = y + (-0.5f) * z;
  y = y + f;
  return static_cast<float>(exponent) * 0.69314718f + y;
}

// e^x, x bounded to [-87, 88], so that no result is subnormal: functions.h's without fused multiply-adds. Part of the set
// whose bits all backends share, as is the tanh made of it and an IEEE division.
GENENGINE_HD float exp_ieee(float x) {
  const float low = x < -87.f ? -87.f : x, bounded = low > 88.f ? 88.f : low;
  const float shifted = bounded * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = r * 1.3941118e-3f + 8.3631799e-3f;
  p = p * r + 4.1666374e-2f;
  p = p * r + 1.6666577e-1f;
  p = p * r + 0.5f;
  p = ((r * r) * p + r) + 1.f;
  return p * as_float((as_int(shifted) - (0x4b400000 - 127)) << 23);
}

GENENGINE_HD float tanh_ieee(float x) { return 1.f - 2.f / (exp_ieee(2.f * x) + 1.f); }

// sin and cos of 2 pi u, by the nearest quarter turn and two polynomials.
GENENGINE_HD void sincos_turn(float u, float& s, float& c) {
  const float quarter = (u * 4.f + 12582912.f) - 12582912.f;
  const int32_t k = static_cast<int32_t>(quarter);
  const float x = (u - quarter * 0.25f) * 6.283185307f, z = x * x;
  float sp = z * -1.9515295891e-4f + 8.3321608736e-3f;
  sp = sp * z + -1.6666654611e-1f;
  sp = (sp * z) * x + x;
  float cp = z * 2.443315711809948e-5f + -1.388731625493765e-3f;
  cp = cp * z + 4.166664568298827e-2f;
  cp = (cp * z) * z + ((-0.5f) * z + 1.f);
  const int32_t odd = -(k & 1);
  s = as_float(((as_int(cp) & odd) | (as_int(sp) & ~odd)) ^ ((k & 2) << 30));
  c = as_float(((as_int(sp) & odd) | (as_int(cp) & ~odd)) ^ (((k + 1) & 2) << 30));
}

GENENGINE_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// The four normals of one quad.
GENENGINE_HD void box_muller(const Words& words, float z[4]) {
  const float r0 = sqrt_rn(-2.f * log_unit(unit(words.w[0]))), r1 = sqrt_rn(-2.f * log_unit(unit(words.w[2])));
  float s, c;
  sincos_turn(unit(words.w[1]), s, c);
  z[0] = r0 * c;
  z[1] = r0 * s;
  sincos_turn(unit(words.w[3]), s, c);
  z[2] = r1 * c;
  z[3] = r1 * s;
}

}  // namespace genengine
