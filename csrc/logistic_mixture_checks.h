// What the CPU and CUDA sides of logistic_mixture check alike, and the sizes they take from it.
#pragma once
#include <cmath>
#include <vector>

#include "elementwise_checks.h"
#include "genengine/logistic_mixture.h"

namespace genengine {

struct MixtureSizes {
  Layout layout;  // of params
  Type type;
  int64_t batch, params, components, image;
  int channels;
  Bins bins;
};

inline MixtureSizes check_mixture(const char* op, const Tensor& params, int64_t channels, int64_t bins) {
  STD_TORCH_CHECK(params.dim() >= 2, op, ": params must be (B, P, ...)");
  STD_TORCH_CHECK(channels >= 1 && channels <= kMaxChannels, op, ": C must be 1 to ", kMaxChannels, ", got ", channels);
  STD_TORCH_CHECK(bins >= 2 && bins <= 65536, op, ": bins must be 2 to 65536, got ", bins);
  MixtureSizes sizes{params.numel() ? common_layout(op, params) : Layout{}, type_of(op, "params", params), params.size(0), params.size(1), 0, 1,
                     static_cast<int>(channels), {}};
  const int64_t per = params_per_component(sizes.channels);
  STD_TORCH_CHECK(sizes.params > 0 && sizes.params % per == 0, op, ": P must be a multiple of ", per, ", got ", sizes.params);
  sizes.components = sizes.params / per;
  for (int64_t d = 2; d < params.dim(); ++d) sizes.image *= params.size(d);
  const double last = static_cast<double>(bins - 1);
  sizes.bins = {static_cast<float>(last), static_cast<float>(1 / last), static_cast<float>(std::log(2 / last))};
  return sizes;
}

inline MixtureSizes check_mixture(const char* op, const Tensor& x, const Tensor& params, int64_t bins) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.dim() == params.dim() && x.scalar_type() == ScalarType::Float && x.is_contiguous(), op,
                  ": x must be contiguous float32 (B, C, ...)");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(d == 1 || x.size(d) == params.size(d), op, ": x must have the batch and the pixels of params");
  return check_mixture(op, params, x.size(1), bins);
}

inline void require_mixture_grad(const char* op, const Tensor& grad, const MixtureSizes& sizes) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.is_contiguous() && grad.numel() == sizes.batch * sizes.image, op,
                  ": grad must be contiguous float32 (B, ...)");
}

// (batch, parameter, pixel) strides of tensors laid out as params.
struct MixtureStrides {
  int64_t batch, param, pixel;
  MixtureStrides(const Tensor& x, const MixtureSizes& sizes)
      : batch(batch_stride(x)), param(sizes.layout.channels > 1 ? 1 : sizes.image), pixel(sizes.layout.channels > 1 ? sizes.params : 1) {
    if (sizes.image == 1) param = 1, pixel = sizes.params;
  }
};

// The sizes of (B, C, ...) for params (B, P, ...), in `room`.
inline torch::headeronly::IntHeaderOnlyArrayRef mixture_shape(const Tensor& params, int64_t channels, std::vector<int64_t>& room) {
  for (int64_t d = 0; d < params.dim(); ++d)
    if (d != 1 || channels > 0) room.push_back(d == 1 ? channels : params.size(d));
  return {room.data(), room.size()};
}

}  // namespace genengine
