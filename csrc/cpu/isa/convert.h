// 16-bit storage, float32 arithmetic: rows of float, fp16 or bf16 to and from float, and sixteen floats as one value.
// Included only by csrc/cpu/isa/*.cpp: compiled once per instruction set. No torch, no STL.
//
//   load_row(float* to, const T* from, n), store_row(T* to, const float* from, n)     any n, any alignment
//   load(const T*) -> Lanes, store(T*, Lanes), stream(T*, Lanes)                      sixteen elements
//
// Every instruction set gives the same bits, NaN payloads apart (and AVX512-BF16's conversion takes subnormal floats,
// below 1.2e-38, to zero): conversions round to nearest, ties to even, and a
// Lanes operation is sixteen IEEE operations.
#pragma once
#include <stdint.h>
#include <string.h>

#include "genengine/hd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace genengine {
namespace GENENGINE_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// ---- one element ---------------------------------------------------------------------------------------------------

GENENGINE_INLINE float to_float(float x) { return x; }

GENENGINE_INLINE float to_float(BFloat x) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }

GENENGINE_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t normal = rest + (112u << 23);  // the exponent's bias, 15, becomes 127
  const uint32_t special = rest + (224u << 23);  // 31 becomes 255: infinity or NaN
  const float below = as_float(static_cast<int32_t>(rest + (113u << 23))) - as_float(113 << 23);  // subnormal, exact
  uint32_t bits = rest >= (31u << 23) ? special : normal;
  bits = rest < (1u << 23) ? static_cast<uint32_t>(as_int(below)) : bits;
  return as_float(static_cast<int32_t>(bits | sign));
}

GENENGINE_INLINE void from_float(float& to, float x) { to = x; }

GENENGINE_INLINE void from_float(BFloat& to, float x) {
  const uint32_t bits = static_cast<uint32_t>(as_int(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

GENENGINE_INLINE void from_float(Half& to, float x) {
  const uint32_t bits = static_cast<uint32_t>(as_int(x)), sign = (bits >> 16) & 0x8000u, f = bits & 0x7fffffffu;
  const uint32_t normal = (f - (112u << 23) + 0xfffu + ((f >> 13) & 1u)) >> 13;  // carries to infinity from 65520 on
  const uint32_t below = static_cast<uint32_t>(as_int(as_float(static_cast<int32_t>(f)) + 0.5f) - as_int(0.5f));
  const uint32_t above = f > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = f < (113u << 23) ? below : normal;  // below 2^-14 the addition to 1/2 rounds to a multiple of 2^-24
  half = f >= (143u << 23) ? above : half;
  to.bits = static_cast<uint16_t>(half | sign);
}

// ---- sixteen elements ----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kLanes = 16, kParts = kLanes / kNative;
// From here on the maskz forms of some intrinsics: the plain ones make g++ 12 warn inside its own headers.
typedef float Native __attribute__((vector_size(4 * kNative)));
typedef uint32_t NativeBits __attribute__((vector_size(4 * kNative)));
typedef uint16_t NativeShort __attribute__((vector_size(2 * kNative)));

struct Lanes {
  Native part[kParts];
};

// A vector at any address. Not memcpy: g++ moves its bytes by sixteen, and a load of 32 that were just stored so waits for
// them to reach the cache.
template <class V>
struct Unaligned {
  typedef V Type __attribute__((aligned(1), may_alias));
};
template <class V>
GENENGINE_INLINE V load_vector(const void* from) {
  return *static_cast<const typename Unaligned<V>::Type*>(from);
}
template <class V>
GENENGINE_INLINE void store_vector(void* to, V value) {
  *static_cast<typename Unaligned<V>::Type*>(to) = value;
}

#define GENENGINE_LANES_OPERATOR(op)                                      \
  GENENGINE_INLINE Lanes operator op(Lanes a, Lanes b) {                  \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b.part[i];  \
    return a;                                                             \
  }                                                                       \
  GENENGINE_INLINE Lanes operator op(Lanes a, float b) {                  \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b;          \
    return a;                                                             \
  }                                                                       \
  GENENGINE_INLINE Lanes operator op(float a, Lanes b) {                  \
    for (int i = 0; i < kParts; ++i) b.part[i] = a op b.part[i];          \
    return b;                                                             \
  }
GENENGINE_LANES_OPERATOR(+)
GENENGINE_LANES_OPERATOR(-)
GENENGINE_LANES_OPERATOR(*)
#undef GENENGINE_LANES_OPERATOR

GENENGINE_INLINE Lanes zero_lanes() {
  Lanes lanes;
  for (int i = 0; i < kParts; ++i) lanes.part[i] = Native{};
  return lanes;
}

// The sixteen lanes added in one fixed order: halves, quarters, eighths, sixteenths.
GENENGINE_INLINE float sum(Lanes lanes) {
  typedef float Four __attribute__((vector_size(16)));
  Four quarter[4];
  memcpy(quarter, &lanes, sizeof quarter);
  const Four four = (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

GENENGINE_INLINE Lanes load(const float* from) {
  Lanes lanes;
  for (int i = 0; i < kParts; ++i) lanes.part[i] = load_vector<Native>(from + i * kNative);
  return lanes;
}

GENENGINE_INLINE Lanes load(const BFloat* from) {
  Lanes lanes;
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  lanes.part[0] = (Native)((NativeBits)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
#else
  for (int i = 0; i < kParts; ++i) {
    const NativeShort bits = load_vector<NativeShort>(from + i * kNative);
    lanes.part[i] = (Native)(__builtin_convertvector(bits, NativeBits) << 16);
  }
#endif
  return lanes;
}

#if defined(__AVX512F__)
GENENGINE_INLINE Lanes load(const Half* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {{(Native)_mm512_maskz_cvtph_ps(0xffff, bits)}};
}
#elif defined(__AVX2__) && defined(__F16C__)
GENENGINE_INLINE Lanes load(const Half* from) {
  Lanes lanes;
  for (int i = 0; i < kParts; ++i)
    lanes.part[i] = (Native)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kNative)));
  return lanes;
}
#else
__attribute__((noinline)) inline Lanes load(const Half* from) {
  float v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  Lanes lanes;
  memcpy(&lanes, v, sizeof lanes);
  return lanes;
}
#endif

GENENGINE_INLINE void store(float* to, Lanes lanes) {
  for (int i = 0; i < kParts; ++i) store_vector(to + i * kNative, lanes.part[i]);
}

#if defined(__AVX512BF16__)
GENENGINE_INLINE NativeShort round_part(BFloat*, Native part) { return (NativeShort)_mm512_cvtneps_pbh((__m512)part); }
#elif defined(__AVX512BW__)
GENENGINE_INLINE NativeShort round_part(BFloat*, Native part) {
  const NativeBits bits = (NativeBits)part;
  const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)part, (__m512)part, _CMP_ORD_Q);
  const __m512i half = (__m512i)(0x7fffu + ((bits >> 16) & 1u)), quiet = (__m512i)(bits | 0x400000u);
  const __m512i rounded = _mm512_mask_add_epi32(quiet, ordered, (__m512i)bits, half);
  const __m512i odd = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15,
                                       13, 11, 9, 7, 5, 3, 1);  // the high halves
  const __m512i packed = _mm512_maskz_permutexvar_epi16(0xffff, odd, rounded);
  NativeShort low;
  memcpy(&low, &packed, sizeof low);
  return low;
}
#else
GENENGINE_INLINE NativeShort round_part(BFloat*, Native part) {
  const NativeBits bits = (NativeBits)part, nan = (NativeBits)(part != part);
  const NativeBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((rounded & ~nan) | (quiet & nan), NativeShort);
}
#endif

#if defined(__AVX512F__)
GENENGINE_INLINE NativeShort round_part(Half*, Native part) {
  return (NativeShort)_mm512_maskz_cvtps_ph(0xffff, (__m512)part, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__) && defined(__F16C__)
GENENGINE_INLINE NativeShort round_part(Half*, Native part) {
  return (NativeShort)_mm256_cvtps_ph((__m256)part, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
__attribute__((noinline)) inline NativeShort round_part(Half*, Native part) {
  float v[kNative];
  memcpy(v, &part, sizeof v);
  Half half[kNative];
  for (int i = 0; i < kNative; ++i) from_float(half[i], v[i]);
  NativeShort bits;
  memcpy(&bits, half, sizeof bits);
  return bits;
}
#endif

template <class T>
GENENGINE_INLINE void store(T* to, Lanes lanes) {
  for (int i = 0; i < kParts; ++i) store_vector(to + i * kNative, round_part(to, lanes.part[i]));
}

// store past the caches; `to` must be aligned to the sixteen elements it receives. fence() before another thread reads.
GENENGINE_INLINE void stream(float* to, Lanes lanes) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)lanes.part[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) _mm256_stream_ps(to + i * kNative, (__m256)lanes.part[i]);
#elif defined(__SSE2__)
  for (int i = 0; i < kParts; ++i) _mm_stream_ps(to + i * kNative, (__m128)lanes.part[i]);
#else
  store(to, lanes);
#endif
}

template <class T>
GENENGINE_INLINE void stream(T* to, Lanes lanes) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)round_part(to, lanes.part[0]));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i * kNative), (__m128i)round_part(to, lanes.part[i]));
#else
  store(to, lanes);
#endif
}

GENENGINE_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- a row ---------------------------------------------------------------------------------------------------------

// Elements after the last whole Lanes; the mask tells the compiler that they are few.
GENENGINE_INLINE int64_t tail(int64_t n) { return n & (kLanes - 1); }

template <class T>
GENENGINE_INLINE void load_row(float* __restrict to, const T* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (int64_t end = i + tail(n); i < end; ++i) to[i] = to_float(from[i]);
}

template <class T>
GENENGINE_INLINE void store_row(T* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (int64_t end = i + tail(n); i < end; ++i) from_float(to[i], from[i]);
}

GENENGINE_INLINE void load_row(float* __restrict to, const float* __restrict from, int64_t n) {
  memcpy(to, from, static_cast<size_t>(n) * 4);
}
GENENGINE_INLINE void store_row(float* __restrict to, const float* __restrict from, int64_t n) {
  memcpy(to, from, static_cast<size_t>(n) * 4);
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
