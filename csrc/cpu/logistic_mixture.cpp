// logistic_mixture on the CPU: tiles of sixteen pixels over threads. No pixel depends on the split.
#include "cpu/logistic_mixture_loops.h"

#include <vector>

#include "cpu/isa.h"
#include "logistic_mixture_checks.h"

namespace genengine {
namespace {

constexpr int64_t kTiles = 8;  // that a thread takes at least: a tile is some microseconds of work

// Batches and their tiles, whose samples go in one row where all tensors allow it.
struct Work {
  MixtureCall call{};
  int64_t batch, rows;  // rows of scratch

  Work(const Tensor& params, const MixtureSizes& sizes)
      : batch(sizes.batch), rows(sizes.params + sizes.components) {
    call.params = planes(params, sizes);
    call.type = sizes.type;
    call.components = sizes.components;
    call.pixels = call.image = sizes.image;
    call.channels = sizes.channels;
    call.bins = sizes.bins;
  }

  static ParamPlanes planes(const Tensor& x, const MixtureSizes& sizes) {
    const MixtureStrides strides(x, sizes);
    return {x.data_ptr(), strides.batch, strides.param, strides.pixel};
  }

  // run(call, batch, first, count, scratch) for every tile
  template <class Run>
  void each_tile(Run run) {
    const auto in_a_row = [&](const ParamPlanes& p) { return !p.base || p.batch_stride == call.pixels * p.pixel_stride; };
    if (call.params.param_stride == 1 && in_a_row(call.params) && in_a_row(call.dparams)) {
      call.pixels *= batch;
      batch = 1;
    }
    const int64_t tiles = (call.pixels + kMixtureTile - 1) / kMixtureTile;
    torch::stable::parallel_for(0, batch * tiles, kTiles, [&](int64_t begin, int64_t end) {
      std::vector<float> room(static_cast<size_t>(rows * kMixtureTile + 16));
      const uintptr_t misaligned = reinterpret_cast<uintptr_t>(room.data()) % 64;
      float* scratch = room.data() + (misaligned ? (64 - misaligned) / sizeof(float) : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = (i % tiles) * kMixtureTile, left = call.pixels - first;
        run(call, i / tiles, first, left < kMixtureTile ? left : kMixtureTile, scratch);
      }
    });
  }
};

Tensor logistic_mixture_log_prob(const Tensor& x, const Tensor& params, int64_t bins) {
  const MixtureSizes sizes = check_mixture("logistic_mixture_log_prob", x, params, bins);
  std::vector<int64_t> shape;
  Tensor log_prob = torch::stable::new_empty(params, mixture_shape(params, 0, shape), ScalarType::Float);
  if (log_prob.numel() == 0) return log_prob;
  Work work(params, sizes);
  work.call.x = static_cast<float*>(x.data_ptr());
  work.call.log_prob = log_prob.mutable_data_ptr<float>();
  work.each_tile(GENENGINE_PICK(mixture_log_prob));
  return log_prob;
}

Tensor logistic_mixture_log_prob_backward(const Tensor& grad, const Tensor& x, const Tensor& params, int64_t bins) {
  const char* op = "logistic_mixture_log_prob_backward";
  const MixtureSizes sizes = check_mixture(op, x, params, bins);
  require_mixture_grad(op, grad, sizes);
  Tensor dparams = torch::stable::empty_like(params);
  if (dparams.numel() == 0) return dparams;
  Work work(params, sizes);
  work.call.dparams = Work::planes(dparams, sizes);
  work.call.x = static_cast<float*>(x.data_ptr());
  work.call.grad = grad.const_data_ptr<float>();
  work.each_tile(GENENGINE_PICK(mixture_log_prob_backward));
  return dparams;
}

Tensor logistic_mixture_sample(const Tensor& params, int64_t channels, int64_t bins, double temperature, const Tensor& seed,
                               const OptionalTensor& sample_ids, int64_t step) {
  const char* op = "logistic_mixture_sample";
  const MixtureSizes sizes = check_mixture(op, params, channels, bins);
  std::vector<int64_t> shape;
  Tensor x = torch::stable::new_empty(params, mixture_shape(params, channels, shape), ScalarType::Float);
  if (x.numel() == 0) return x;
  require_seed(op, seed, sizes.batch);
  require_sample_ids(op, sample_ids, sizes.batch);
  Work work(params, sizes);
  MixtureCall& call = work.call;
  call.x = x.mutable_data_ptr<float>();
  call.seed = seed.const_data_ptr<int64_t>();
  call.seed_stride = seed.numel() > 1 ? 1 : 0;
  call.ids = sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr;
  call.step = static_cast<uint32_t>(step);
  call.temperature = static_cast<float>(temperature);
  call.inverse_temperature = static_cast<float>(1 / temperature);
  work.each_tile(GENENGINE_PICK(mixture_sample));
  return x;
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("logistic_mixture_log_prob", TORCH_BOX(&genengine::logistic_mixture_log_prob));
  m.impl("logistic_mixture_log_prob_backward", TORCH_BOX(&genengine::logistic_mixture_log_prob_backward));
  m.impl("logistic_mixture_sample", TORCH_BOX(&genengine::logistic_mixture_sample));
}
