// What the launches of attention's forward and backward on Hopper share: checks, operands that TMA can read, dispatch.
#pragma once
#include <type_traits>

#include "cuda/hopper/ptx.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/launch.h"

namespace genengine::hopper {

inline int multiprocessors(const char* op, int32_t device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA device ", device, " does not answer: ", cudaGetErrorString(error));
  return count;
}

// body(Dim as a constant) for the head dims that there are kernels for.
template <class Body>
void with_dim(const char* op, int64_t dim, Body body) {
  const auto take = [&](auto constant) { return dim == constant() && (body(constant), true); };
  const bool taken = take(std::integral_constant<int, 64>{}) || take(std::integral_constant<int, 72>{}) ||
                     take(std::integral_constant<int, 80>{}) || take(std::integral_constant<int, 96>{}) ||
                     take(std::integral_constant<int, 128>{});
  STD_TORCH_CHECK(taken, op, ": the CUDA kernel takes a head dim D of 64, 72, 80, 96 or 128, got ", dim, "; use backend=\"triton\"");
}

// body(T) for the dtypes that wgmma multiplies.
template <class Body>
void with_half(const char* op, const Tensor& q, Body body) {
  if (q.scalar_type() == ScalarType::Half) return body(std::type_identity<Half>{});
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16, op,
                  ": the CUDA kernel takes float16 or bfloat16; convert with .to(torch.bfloat16), or use backend=\"triton\"");
  body(std::type_identity<Bf16>{});
}

// x, or a copy that TMA can read.
inline Tensor mapped(const Tensor& x) {
  if (mappable(x)) return x;
  const Tensor dense = torch::stable::contiguous(x);
  return mappable(dense) ? dense : torch::stable::clone(dense);
}

// x is (B, tokens, H, D) with q's dtype, B, H and D.
inline void require_like(const char* op, const Launcher& launcher, const char* name, const Tensor& x, const Tensor& q, int64_t tokens) {
  launcher.require_here(name, x);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == tokens && x.size(2) == q.size(2) && x.size(3) == q.size(3),
                  op, ": ", name, " must be (", q.size(0), ", ", tokens, ", ", q.size(2), ", ", q.size(3), ")");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), op, ": ", name, " must have q's dtype");
}

inline void require_inputs(const char* op, const Launcher& launcher, const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, op, ": q must be (B, N, H, D), k (B, M, H, D)");
  require_like(op, launcher, "k", k, q, k.size(1));
  require_like(op, launcher, "v", v, q, k.size(1));
  STD_TORCH_CHECK(!causal || k.size(1) == q.size(1), op, ": causal needs as many keys as queries");
  STD_TORCH_CHECK(k.size(1) > 0 || q.numel() == 0, op, ": k must hold at least one key");
}

// Numbers that index arithmetic has 32 bits for: a tile's and, as a loop over tiles ends, the number of blocks added to it.
inline void require_countable_tiles(const char* op, int64_t tiles, int64_t queries, int64_t keys) {
  constexpr int64_t kMost = 1 << 30;
  STD_TORCH_CHECK(tiles < kMost && queries < kMost && keys < kMost, op, ": ", tiles, " tiles of ", queries, " queries and ", keys,
                  " keys are too many for one launch; split the batch");
}

constexpr double kLog2E = 1.4426950408889634;

}  // namespace genengine::hopper
