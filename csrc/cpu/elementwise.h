// What sampler_step and diffuse share on the torch-facing CPU side: addresses, noise sources, threading.
#pragma once
#include "cpu/elementwise_loops.h"
#include "elementwise_checks.h"

namespace genengine {

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
      require_seed(op, *seed, batch);
      seed_ = seed->const_data_ptr<int64_t>();
      seed_stride_ = seed->numel() > 1 ? seed->stride(0) : 0;
    }
    require_sample_ids(op, ids, batch);
    if (ids) {
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

constexpr int64_t kRange = 16384;
inline int64_t ranges_of(int64_t per) { return (per + kRange - 1) / kRange; }

// body(b, first, count) over ranges of kRange elements of every sample, the last one shorter. The noise blocks of a thread
// are never drawn twice, and results do not depend on the split.
template <class Body>
void for_ranges(int64_t batch, int64_t per, Body body) {
  const int64_t ranges = ranges_of(per);
  const int64_t grain = per < kRange ? (kGrain + per - 1) / per : kGrain / kRange;
  torch::stable::parallel_for(0, batch * ranges, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (i % ranges) * kRange;
      body(i / ranges, first, per - first < kRange ? per - first : kRange);
    }
  });
}

}  // namespace genengine
