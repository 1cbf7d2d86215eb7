// What the CPU and CUDA sides of pixelcnn_sample check alike, and the call they make of it.
#pragma once
#include <cstddef>

#include "elementwise_checks.h"
#include "genengine/pixelcnn_sample.h"

namespace genengine {

using IntList = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

inline PixelCNNShape pixelcnn_shape(const char* op, const IntList& fields) {
  constexpr size_t kFields = PixelCNNShape::kFields;
  STD_TORCH_CHECK(fields.size() == kFields, op, ": fields must be ", kFields, " numbers, got ", fields.size());
  PixelCNNShape shape;
  int* to = &shape.size;
  for (size_t i = 0; i < kFields; ++i) to[i] = static_cast<int>(fields[i]);
  shape.prepare();
  return shape;
}

inline Type pixelcnn_type(const char* op, const Tensor& matrices) {
  const Type type = type_of(op, "weights", matrices);
  STD_TORCH_CHECK(type != Type::f16, op, ": weights must be float32 or bfloat16");
  return type;
}

inline PixelCNNCall pixelcnn_call(const char* op, const Tensor& x, const Tensor& log_prob, const Tensor& state,
                                  const Tensor& matrices, const Tensor& vectors, const IntList& fields, const OptionalTensor& labels,
                                  const OptionalTensor& known, const Tensor& seed, const Tensor& sample_ids, double temperature,
                                  bool wavefront, int64_t images, int64_t first_row, int64_t last_row) {
  PixelCNNCall call{};
  call.shape = pixelcnn_shape(op, fields);
  const PixelCNNShape& s = call.shape;
  call.batch = x.size(0);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == s.channels && x.size(2) == s.size && x.size(3) == s.size && x.is_contiguous() &&
                      x.scalar_type() == ScalarType::Float,
                  op, ": x must be contiguous float32 (B, C, H, W)");
  STD_TORCH_CHECK(log_prob.numel() == call.batch * s.size * s.size && log_prob.is_contiguous(), op, ": log_prob must be (B, H, W)");
  STD_TORCH_CHECK(matrices.numel() == s.matrix_elements() && vectors.numel() == s.vector_elements(), op, ": weights must hold ",
                  s.matrix_elements(), " and ", s.vector_elements(), " numbers, got ", matrices.numel(), " and ", vectors.numel());
  STD_TORCH_CHECK(s.levels <= kMaxLevels, op, ": at most ", kMaxLevels, " levels, got ", s.levels);
  STD_TORCH_CHECK(images >= 1 && images <= kMaxImages, op, ": groups must be of 1 to ", kMaxImages, " images, got ", images);
  STD_TORCH_CHECK(0 <= first_row && first_row <= last_row && last_row <= s.size, op, ": rows must be within the image");
  STD_TORCH_CHECK(!known || (known->numel() == x.numel() && known->is_contiguous()), op, ": known must be contiguous (B, C, H, W)");
  STD_TORCH_CHECK(!labels || (labels->numel() == call.batch && labels->is_contiguous()), op, ": labels must be contiguous (B,)");
  require_seed(op, seed, call.batch);
  require_sample_ids(op, sample_ids, call.batch);
  call.matrices = matrices.data_ptr();
  call.vectors = vectors.const_data_ptr<float>();
  call.x = x.mutable_data_ptr<float>();
  call.log_prob = log_prob.mutable_data_ptr<float>();
  call.known = known ? known->const_data_ptr<bool>() : nullptr;
  call.labels = labels ? labels->const_data_ptr<int64_t>() : nullptr;
  call.seed = seed.const_data_ptr<int64_t>();
  call.seed_stride = seed.numel() > 1 ? 1 : 0;
  call.ids = sample_ids.const_data_ptr<int64_t>();
  call.state = static_cast<char*>(state.data_ptr());
  call.images = static_cast<int>(images);
  call.temperature = static_cast<float>(temperature);
  call.inverse_temperature = static_cast<float>(1 / temperature);
  call.wavefront = wavefront;
  call.first_row = static_cast<int>(first_row);
  call.last_row = static_cast<int>(last_row);
  return call;
}

}  // namespace genengine
