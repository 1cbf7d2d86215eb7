// Scalar helpers that host and device code share. No torch and no STL header: the per-ISA loops include this.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define GENENGINE_HD __host__ __device__ __forceinline__
#else
#define GENENGINE_HD inline __attribute__((always_inline))
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
