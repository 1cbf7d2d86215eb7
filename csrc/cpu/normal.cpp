// normal_out, uniform_out on the CPU: samples and blocks of elements over threads. The bits do not depend on the split.
#include "cpu/normal_loops.h"
#include "torch_api.h"

namespace genengine {
namespace {

constexpr int64_t kBlock = 4096;  // elements per loop call; a multiple of 4, so that no quad is drawn twice

template <class Fill>
void draw(const char* op, Fill fill, const Tensor& out, const Tensor& seed, const OptionalTensor& sample_ids, int64_t step,
          int64_t stream) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous(), op, ": out must be contiguous float32");
  const int64_t batch = out.size(0), per = per_sample(out);
  if (batch == 0 || per == 0) return;
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && (seed.numel() == 1 || seed.numel() == batch), op,
                  ": seed must be int64, () or (B,)");
  const int64_t* ids = sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr;
  STD_TORCH_CHECK(!sample_ids || sample_ids->numel() == batch, op, ": sample_ids must be (B,)");
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const int64_t seed_count = seed.numel();
  float* z = out.mutable_data_ptr<float>();
  const int64_t blocks = (per + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, batch * blocks, kGrain / kBlock, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, first = (i % blocks) * kBlock;
      const int64_t count = per - first < kBlock ? per - first : kBlock;
      const NoiseKey key{seed_at(seeds, seed_count, b), static_cast<uint32_t>(ids ? ids[b] : b),
                         static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
      fill(z + b * per + first, first, count, key);
    }
  });
}

void normal_out(const Tensor& out, const Tensor& seed, const OptionalTensor& sample_ids, int64_t step, int64_t stream) {
  draw("normal", GENENGINE_PICK(fill_normal), out, seed, sample_ids, step, stream);
}

void uniform_out(const Tensor& out, const Tensor& seed, const OptionalTensor& sample_ids, int64_t step, int64_t stream) {
  draw("uniform", GENENGINE_PICK(fill_uniform), out, seed, sample_ids, step, stream);
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("normal_out", TORCH_BOX(&genengine::normal_out));
  m.impl("uniform_out", TORCH_BOX(&genengine::uniform_out));
}
