// Tensor maps: how TMA is told of a tensor (B, N, H, D) of 16-bit elements, whatever its strides.
#pragma once
#include <cuda.h>
#include <dlfcn.h>

#include "torch_api.h"

namespace genengine::hopper {

// The driver's function, found at run time: the extension then loads where there is no driver.
inline auto find_encode_tiled() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : Encode{nullptr};
}

// TMA's conditions: elements of a head side by side, all else at multiples of 16 bytes.
inline bool mappable(const Tensor& x) {
  if (x.stride(3) != 1 || reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0) return false;
  for (int d = 0; d < 3; ++d)
    if (x.size(d) != 1 && (x.stride(d) <= 0 || x.stride(d) % 8 != 0)) return false;
  return true;
}

// Boxes of `columns` features of one head of `rows` tokens, lines swizzled over their whole length (ptx.h).
inline CUtensorMap tensor_map(const char* op, const char* name, const Tensor& x, int columns, int rows) {
  static const auto encode = find_encode_tiled();
  STD_TORCH_CHECK(encode != nullptr, op, ": the CUDA driver knows no tensor maps (cuTensorMapEncodeTiled); update it to 12.0 or ",
                  "newer, or use backend=\"triton\"");
  const auto size = [&](int d) { return static_cast<cuuint64_t>(x.size(d)); };
  const auto stride = [&](int d) { return static_cast<cuuint64_t>(x.size(d) == 1 ? x.size(3) : x.stride(d)) * 2; };
  const cuuint64_t sizes[4] = {size(3), size(2), size(1), size(0)}, strides[3] = {stride(2), stride(1), stride(0)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows), 1}, steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                     : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUtensorMapDataType type =
      x.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult result = encode(&map, type, 4, x.data_ptr(), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": the CUDA driver takes no tensor map of ", name, " (", x.size(0), ", ", x.size(1), ", ",
                  x.size(2), ", ", x.size(3), ") with strides (", x.stride(0), ", ", x.stride(1), ", ", x.stride(2),
                  "), CUresult ", static_cast<int>(result), "; pass .contiguous(), or use backend=\"triton\"");
  return map;
}

}  // namespace genengine::hopper
