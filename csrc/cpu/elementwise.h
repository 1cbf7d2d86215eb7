// What sampler_step and diffuse share on the torch-facing side: layouts, typed addresses, noise sources, threading.
#pragma once
#include "cpu/elementwise_loops.h"
#include "cpu/torch_api.h"

namespace genengine {

// Samples dense in C order (channels == 1), or dense channels_last.
struct Layout {
  int64_t channels = 1, pixels = 0;
};

inline bool channels_last_samples(const Tensor& x, int64_t first_dim) {
  if (x.dim() != first_dim + 3) return false;
  const int64_t channels = x.size(first_dim), height = x.size(first_dim + 1), width = x.size(first_dim + 2);
  const auto fits = [&](int64_t d, int64_t stride) { return x.size(d) == 1 || x.stride(d) == stride; };
  return fits(first_dim, 1) && fits(first_dim + 1, width * channels) && fits(first_dim + 2, channels) && height * width > 0;
}

inline bool dense_from(const Tensor& x, int64_t first_dim) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= first_dim; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Layout common_layout(const char* op, const Tensor& out) {
  if (dense_from(out, 1)) return {};
  STD_TORCH_CHECK(channels_last_samples(out, 1), op, ": samples of out must be dense, in C order or channels_last");
  return {out.size(1), out.size(2) * out.size(3)};
}

inline void require_samples(const char* op, const char* name, const Tensor& x, const Tensor& out, const Layout& layout) {
  bool same = x.dim() == out.dim();
  for (int64_t d = 1; same && d < x.dim(); ++d) same = x.size(d) == out.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have samples shaped like x's");
  STD_TORCH_CHECK(layout.channels == 1 ? dense_from(x, 1) : channels_last_samples(x, 1), op, ": ", name,
                  " must be laid out like out");
}

inline void require_layout(const char* op, const char* name, const Tensor& x, const Tensor& out, const Layout& layout) {
  STD_TORCH_CHECK(x.dim() == out.dim() && x.size(0) == out.size(0), op, ": ", name, " must have the shape of x");
  require_samples(op, name, x, out, layout);
}

inline void require_register_layout(const char* op, const Tensor& history, const Tensor& out, const Layout& layout) {
  bool same = history.dim() == out.dim() + 1;
  for (int64_t d = 0; same && d < out.dim(); ++d) same = history.size(d + 1) == out.size(d);
  STD_TORCH_CHECK(same && (layout.channels == 1 ? dense_from(history, 2) : channels_last_samples(history, 2)), op,
                  ": history must be (K, ...) of out's shape and layout");
}

inline Type type_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16");
  return Type::f32;
}

// The samples of a tensor as addresses.
struct Bytes {
  char* base = nullptr;
  int64_t stride = 0, element = 0;
  Bytes() = default;
  explicit Bytes(const Tensor& x)
      : base(static_cast<char*>(x.data_ptr())), element(x.element_size()) {
    stride = batch_stride(x) * element;
  }
  char* sample(int64_t b) const { return base + b * stride; }
  Bytes from_sample(int64_t b) const {
    Bytes later = *this;
    later.base += b * stride;
    return later;
  }
};

// Outputs that cannot stay in the caches gain 30-40 % from non-temporal stores; smaller ones lose by them.
inline bool should_stream(const Bytes& tensor, int64_t elements, int64_t copies) {
  return tensor.element * elements * copies > (int64_t{24} << 20);
}

// The noise of each sample: given, drawn, or none.
class Draws {
 public:
  Draws(const char* op, const OptionalTensor& seed, const OptionalTensor& ids, const OptionalTensor& given, int64_t batch,
        const Layout& layout)
      : layout_(layout) {
    if (given) {
      given_ = given->const_data_ptr<float>();
      given_stride_ = batch_stride(*given);
    }
    if (seed) {
      STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && (seed->numel() == 1 || seed->numel() == batch), op,
                      ": seed must be int64, () or (B,)");
      seed_ = seed->const_data_ptr<int64_t>();
      seed_stride_ = seed->numel() > 1 ? seed->stride(0) : 0;
    }
    if (ids) {
      STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->dim() == 1 && ids->size(0) == batch, op,
                      ": sample_ids must be int64 (B,)");
      ids_ = ids->const_data_ptr<int64_t>();
      ids_stride_ = batch > 1 ? ids->stride(0) : 1;
    }
  }

  NoiseSource source(int64_t b, uint32_t step, uint32_t stream) const {
    NoiseSource source;
    if (given_) source.given = given_ + b * given_stride_;
    source.draw = !given_ && seed_;
    if (source.draw)
      source.key = {static_cast<uint64_t>(seed_[b * seed_stride_]), static_cast<uint32_t>(ids_ ? ids_[b * ids_stride_] : b), step,
                    stream};
    source.channels = layout_.channels;
    source.pixels = layout_.pixels;
    return source;
  }

 private:
  Layout layout_;
  const float* given_ = nullptr;
  const int64_t *seed_ = nullptr, *ids_ = nullptr;
  int64_t given_stride_ = 0, seed_stride_ = 0, ids_stride_ = 0;
};

// body(b, first, count) over ranges of whole tiles of every sample. Ranges start at multiples of 4096 elements, so that
// the noise blocks of a thread are never drawn twice; results do not depend on the split.
template <class Body>
void for_ranges(int64_t batch, int64_t per, Body body) {
  constexpr int64_t kRange = 16384;
  const int64_t ranges = (per + kRange - 1) / kRange;
  const int64_t grain = per < kRange ? (kGrain + per - 1) / per : kGrain / kRange;
  torch::stable::parallel_for(0, batch * ranges, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (i % ranges) * kRange;
      body(i / ranges, first, per - first < kRange ? per - first : kRange);
    }
  });
}

}  // namespace genengine
