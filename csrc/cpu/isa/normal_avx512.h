// Sixteen quads per vector, four vectors interleaved to fill the pipelines. Every line mirrors one of genengine/normal.h.
#pragma once
#include <immintrin.h>

namespace genengine {
namespace GENENGINE_ISA {
namespace {

using Int = __m512i;
using Float = __m512;

inline Float constant(float value) { return _mm512_set1_ps(value); }
inline Int constant(uint32_t value) { return _mm512_set1_epi32(static_cast<int32_t>(value)); }
inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }

// High and low halves of the 32 x 32 -> 64 bit products: even lanes, odd lanes, then blended by shuffles.
GENENGINE_INLINE void multiply(Int a, Int m, Int& high, Int& low) {
  const Int even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_shuffle_epi32(a, (_MM_PERM_ENUM)0xF5), m);
  low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0);
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xF5);
}

inline Float unit_v(Int w) {
  return add(mul(_mm512_cvtepi32_ps(_mm512_srli_epi32(w, 9)), constant(0x1p-23f)), constant(0x1p-24f));
}

GENENGINE_INLINE Float log_unit_v(Float x) {
  const Int root = constant(0x3f3504f3u);
  const Int offset = _mm512_sub_epi32(_mm512_castps_si512(x), root), exponent = _mm512_srai_epi32(offset, 23);
  const Int mantissa = _mm512_add_epi32(_mm512_and_si512(offset, constant(0x7fffffu)), root);
  const Float f = _mm512_sub_ps(_mm512_castsi512_ps(mantissa), constant(1.f));
  const float tail[] = {1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                        2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  Float p = add(mul(f, constant(7.0376836292e-2f)), constant(-1.1514610310e-1f));
  for (float coefficient : tail) p = add(mul(p, f), constant(coefficient));
  const Float z = mul(f, f);
  Float y = mul(mul(f, z), p);
  y = add(y, mul(constant(-0.5f), z));
  y = add(y, f);
  return add(mul(_mm512_cvtepi32_ps(exponent), constant(0.69314718f)), y);
}

GENENGINE_INLINE void sincos_turn_v(Float u, Float& s, Float& c) {
  const Float quarter = _mm512_sub_ps(add(mul(u, constant(4.f)), constant(12582912.f)), constant(12582912.f));
  const Int k = _mm512_cvttps_epi32(quarter), two = constant(2u), one = constant(1u);
  const Float x = mul(_mm512_sub_ps(u, mul(quarter, constant(0.25f))), constant(6.283185307f)), z = mul(x, x);
  Float sp = add(mul(z, constant(-1.9515295891e-4f)), constant(8.3321608736e-3f));
  sp = add(mul(sp, z), constant(-1.6666654611e-1f));
  sp = add(mul(mul(sp, z), x), x);
  Float cp = add(mul(z, constant(2.443315711809948e-5f)), constant(-1.388731625493765e-3f));
  cp = add(mul(cp, z), constant(4.166664568298827e-2f));
  cp = add(mul(mul(cp, z), z), add(mul(constant(-0.5f), z), constant(1.f)));
  const __mmask16 odd = _mm512_test_epi32_mask(k, one);
  const Int sine = _mm512_castps_si512(_mm512_mask_blend_ps(odd, sp, cp));
  const Int cosine = _mm512_castps_si512(_mm512_mask_blend_ps(odd, cp, sp));
  s = _mm512_castsi512_ps(_mm512_xor_si512(sine, _mm512_slli_epi32(_mm512_and_si512(k, two), 30)));
  c = _mm512_castsi512_ps(_mm512_xor_si512(cosine, _mm512_slli_epi32(_mm512_and_si512(_mm512_add_epi32(k, one), two), 30)));
}

// The key words of all rounds in memory: the xor then broadcasts its operand as it loads it, at no cost.
struct RoundKeys {
  uint32_t word[10][2];
  explicit RoundKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      word[round][0] = k0;
      word[round][1] = k1;
    }
    __asm__("" : "+m"(word));  // keep them there: broadcasts from general registers are slow
  }
};

template <int N>
GENENGINE_INLINE void philox_v(uint32_t quad, const NoiseKey& key, const RoundKeys& keys, Int (&c)[4][N]) {
  const Int lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int n = 0; n < N; ++n) {
    c[0][n] = _mm512_add_epi32(constant(quad + 16u * n), lane);
    c[1][n] = constant(key.sample);
    c[2][n] = constant(key.step);
    c[3][n] = constant(key.stream);
  }
  const Int m0 = constant(0xD2511F53u), m1 = constant(0xCD9E8D57u);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < N; ++n) {
      Int high0, low0, high1, low1;
      multiply(c[0][n], m0, high0, low0);
      multiply(c[2][n], m1, high1, low1);
      const Int n0 = _mm512_ternarylogic_epi32(high1, c[1][n], constant(keys.word[round][0]), 0x96);  // 0x96: three-way xor
      const Int n2 = _mm512_ternarylogic_epi32(high0, c[3][n], constant(keys.word[round][1]), 0x96);
      c[0][n] = n0;
      c[1][n] = low1;
      c[2][n] = n2;
      c[3][n] = low0;
    }
  }
}

// Four vectors, one per position in the quad, to 64 floats in element order.
GENENGINE_INLINE void store_interleaved(float* z, Float a, Float b, Float d, Float e) {
  const __m512d t0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), t1 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d t2 = _mm512_castps_pd(_mm512_unpacklo_ps(d, e)), t3 = _mm512_castps_pd(_mm512_unpackhi_ps(d, e));
  const Float q0 = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t2)), q1 = _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t2));
  const Float q2 = _mm512_castpd_ps(_mm512_unpacklo_pd(t1, t3)), q3 = _mm512_castpd_ps(_mm512_unpackhi_pd(t1, t3));
  // 128-bit lane L of q_j now holds quad 4 L + j
  const Float a0 = _mm512_shuffle_f32x4(q0, q1, 0x44), a1 = _mm512_shuffle_f32x4(q2, q3, 0x44);
  const Float b0 = _mm512_shuffle_f32x4(q0, q1, 0xEE), b1 = _mm512_shuffle_f32x4(q2, q3, 0xEE);
  _mm512_storeu_ps(z, _mm512_shuffle_f32x4(a0, a1, 0x88));
  _mm512_storeu_ps(z + 16, _mm512_shuffle_f32x4(a0, a1, 0xDD));
  _mm512_storeu_ps(z + 32, _mm512_shuffle_f32x4(b0, b1, 0x88));
  _mm512_storeu_ps(z + 48, _mm512_shuffle_f32x4(b0, b1, 0xDD));
}

template <int N, bool Normal>
GENENGINE_INLINE void block_group(float* z, uint32_t quad, const NoiseKey& key, const RoundKeys& keys) {
  Int c[4][N];
  philox_v<N>(quad, key, keys, c);
  for (int n = 0; n < N; ++n) {
    if (!Normal) {
      store_interleaved(z + 64 * n, unit_v(c[0][n]), unit_v(c[1][n]), unit_v(c[2][n]), unit_v(c[3][n]));
      continue;
    }
    const Float r0 = _mm512_sqrt_ps(mul(constant(-2.f), log_unit_v(unit_v(c[0][n]))));
    const Float r1 = _mm512_sqrt_ps(mul(constant(-2.f), log_unit_v(unit_v(c[2][n]))));
    Float s0, c0, s1, c1;
    sincos_turn_v(unit_v(c[1][n]), s0, c0);
    sincos_turn_v(unit_v(c[3][n]), s1, c1);
    store_interleaved(z + 64 * n, mul(r0, c0), mul(r0, s0), mul(r1, c1), mul(r1, s1));
  }
}

template <bool Normal>
inline void blocks_v(float* z, uint32_t quad, int64_t blocks, const NoiseKey& key) {
  const RoundKeys keys(key.seed);
  int64_t block = 0;
  const auto draw = [&]<int N>() GENENGINE_ALWAYS_INLINE {
    block_group<N, Normal>(z + 64 * block, quad + static_cast<uint32_t>(16 * block), key, keys);
    block += N;
  };
  while (block + 4 <= blocks) draw.template operator()<4>();
  if (block + 2 <= blocks) draw.template operator()<2>();
  if (block < blocks) draw.template operator()<1>();
}

void normal_blocks(float* z, uint32_t quad, int64_t blocks, const NoiseKey& key) { blocks_v<true>(z, quad, blocks, key); }
void uniform_blocks(float* z, uint32_t quad, int64_t blocks, const NoiseKey& key) { blocks_v<false>(z, quad, blocks, key); }

}  // namespace
}  // namespace GENENGINE_ISA
}  // namespace genengine
