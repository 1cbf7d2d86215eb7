// reparameterize on the CPU: z and the KL of every sample in one pass, eps drawn or given; the backward draws it again.
#include "cpu/reparameterize_loops.h"

#include <vector>

#include "cpu/elementwise.h"

namespace genengine {
namespace {

constexpr const char* kOp = "reparameterize";

struct Inputs {
  Layout layout;
  ReparameterizeSample common{};
  Draws draws;
  Bytes mean, logvar;
  int64_t batch, per;
  uint32_t step;

  Inputs(const Tensor& mean_in, const Tensor& logvar_in, const OptionalTensor& seed, const OptionalTensor& sample_ids, int64_t row,
         const OptionalTensor& noise, double free_bits, bool monte_carlo)
      : layout(common_layout(kOp, mean_in)),
        draws(kOp, seed, sample_ids, noise, mean_in.size(0), layout),
        mean(mean_in),
        logvar(logvar_in),
        batch(mean_in.size(0)),
        per(per_sample(mean_in)),
        step(static_cast<uint32_t>(row)) {
    require_same("logvar", logvar_in, mean_in);
    if (noise) {
      require_layout(kOp, "noise", *noise, mean_in, layout);
      STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, kOp, ": noise must be float32");
    }
    STD_TORCH_CHECK(seed || noise, kOp, ": seed or noise must be given");
    common.type = type_of(kOp, "mean", mean_in);
    common.kl = kl_of(monte_carlo, free_bits);
    common.free_bits = static_cast<float>(free_bits);
  }

  void require_same(const char* name, const Tensor& x, const Tensor& mean_in) const {
    require_layout(kOp, name, x, mean_in, layout);
    STD_TORCH_CHECK(x.scalar_type() == mean_in.scalar_type(), kOp, ": ", name, " must have mean's dtype");
  }

  ReparameterizeSample sample(int64_t b) const {
    ReparameterizeSample s = common;
    s.mean = mean.sample(b);
    s.logvar = logvar.sample(b);
    s.noise = draws.source(b, step, kReparameterizeStream);
    return s;
  }
};

std::tuple<Tensor, Tensor> reparameterize(const Tensor& mean, const Tensor& logvar, const OptionalTensor& seed,
                                          const OptionalTensor& sample_ids, int64_t step, const OptionalTensor& noise,
                                          double free_bits, bool monte_carlo) {
  Tensor z = torch::stable::empty_like(mean), kl = torch::stable::new_zeros(mean, {mean.size(0)}, ScalarType::Float);
  if (z.numel() == 0) return {z, kl};
  const Inputs in(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo);
  const Bytes out(z);
  const bool stream = should_stream(out, z.numel(), 1);
  const auto run = GENENGINE_PICK(reparameterize_range);
  const int64_t ranges = ranges_of(in.per);
  std::vector<float> partial(static_cast<size_t>(in.batch * ranges));  // summed in order: any split gives the same bits
  for_ranges(in.batch, in.per, [&](int64_t b, int64_t first, int64_t n) {
    ReparameterizeSample s = in.sample(b);
    s.z = out.sample(b);
    s.stream = stream;
    partial[static_cast<size_t>(b * ranges + first / kRange)] = run(s, first, n);
  });
  float* total = kl.mutable_data_ptr<float>();
  for (size_t i = 0; i < partial.size(); ++i) total[i / static_cast<size_t>(ranges)] += partial[i];
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparameterize_backward(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mean,
                                                   const Tensor& logvar, const OptionalTensor& seed,
                                                   const OptionalTensor& sample_ids, int64_t step, const OptionalTensor& noise,
                                                   double free_bits, bool monte_carlo) {
  Tensor dmean = torch::stable::empty_like(mean), dlogvar = torch::stable::empty_like(logvar);
  if (dmean.numel() == 0) return {dmean, dlogvar};
  const Inputs in(mean, logvar, seed, sample_ids, step, noise, free_bits, monte_carlo);
  in.require_same("grad_z", grad_z, mean);
  STD_TORCH_CHECK(grad_kl.scalar_type() == ScalarType::Float && grad_kl.dim() == 1 && grad_kl.size(0) == in.batch, kOp,
                  ": grad_kl must be float32 (B,)");
  const float* k = grad_kl.const_data_ptr<float>();
  const int64_t k_stride = grad_kl.stride(0);
  const Bytes g(grad_z), for_mean(dmean), for_logvar(dlogvar);
  const bool stream = should_stream(for_mean, dmean.numel(), 2);
  const auto run = GENENGINE_PICK(reparameterize_backward_range);
  for_ranges(in.batch, in.per, [&](int64_t b, int64_t first, int64_t n) {
    ReparameterizeSample s = in.sample(b);
    s.grad_z = g.sample(b);
    s.grad_kl = k[b * k_stride];
    s.dmean = for_mean.sample(b);
    s.dlogvar = for_logvar.sample(b);
    s.stream = stream;
    run(s, first, n);
  });
  return {dmean, dlogvar};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("reparameterize", TORCH_BOX(&genengine::reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&genengine::reparameterize_backward));
}
