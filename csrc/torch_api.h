// What the torch-facing CPU and CUDA files need of the LibTorch stable ABI, and the checks they share.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace genengine {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = torch::headeronly::HeaderOnlyArrayRef<Tensor>;

// Elements that one task of parallel_for takes at least: smaller work stays on the calling thread.
constexpr int64_t kGrain = 32768;

inline uint64_t seed_at(const int64_t* seed, int64_t batch, int64_t b) { return static_cast<uint64_t>(seed[batch > 1 ? b : 0]); }

inline int64_t per_sample(const Tensor& x) {
  int64_t n = 1;
  for (int64_t d = 1; d < x.dim(); ++d) n *= x.size(d);
  return n;
}

inline int64_t batch_stride(const Tensor& x) { return x.size(0) > 1 ? x.stride(0) : per_sample(x); }

}  // namespace genengine
