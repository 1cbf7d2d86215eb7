// The CUDA stream that PyTorch currently uses. The stable ABI has no header for it that a CPU wheel could link against.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace genengine {

cudaStream_t current_stream(int32_t device);

}  // namespace genengine
