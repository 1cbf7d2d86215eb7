// Scalar helpers that host and device code share. No torch and no STL header: the per-ISA loops include this.
#pragma once
#include <stdint.h>
#include <string.h>

// Inlining is forced: what is compiled for AVX-512 must not become a function that the builds for other CPUs may call. The
// sanitizers would take minutes over such bodies; there every unit has functions of its own (static).
#if defined(GENENGINE_SANITIZED)
#define GENENGINE_ALWAYS_INLINE
#else
#define GENENGINE_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define GENENGINE_INLINE inline GENENGINE_ALWAYS_INLINE

// GENENGINE_HD_MEMBER: of a member function, for which static would mean something else.
#if defined(__CUDACC__)
#define GENENGINE_HD_MEMBER __host__ __device__ __forceinline__
#else
#define GENENGINE_HD_MEMBER GENENGINE_INLINE
#endif
#if defined(__CUDACC__)
#define GENENGINE_HD __host__ __device__ __forceinline__
#elif defined(GENENGINE_SANITIZED)
#define GENENGINE_HD static inline
#else
#define GENENGINE_HD GENENGINE_INLINE
#endif

namespace genengine {

GENENGINE_HD float as_float(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

GENENGINE_HD int32_t as_int(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(value);
#else
  int32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
#endif
}

}  // namespace genengine
