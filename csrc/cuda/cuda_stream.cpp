// The stream comes from libtorch_cuda.so if the process has loaded it: so the extension links against a CPU wheel, and
// loads in a PyTorch without CUDA.
#include "cuda/cuda_stream.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace genengine {
namespace {

using GetStream = int32_t (*)(int32_t device, void** stream);  // 0: success

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

}  // namespace

cudaStream_t current_stream(int32_t device) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr,
                  "genengine: this PyTorch has no CUDA (libtorch_cuda.so is not loaded); install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device, &stream) == 0, "genengine: PyTorch names no current stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace genengine
