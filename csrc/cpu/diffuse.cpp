// diffuse on the CPU: x_t and the regression target in one pass, eps drawn or given.
#include "cpu/elementwise.h"

namespace genengine {
namespace {

constexpr uint32_t kDiffuseStream = 3;

std::tuple<Tensor, Tensor> diffuse(const Tensor& x0, const Tensor& alpha, const Tensor& sigma, const Tensor& c_x0,
                                   const Tensor& c_eps, const OptionalTensor& seed, const OptionalTensor& sample_ids,
                                   int64_t step, const OptionalTensor& noise) {
  Tensor x_t = torch::stable::empty_like(x0), target = torch::stable::empty_like(x0);
  const int64_t batch = x0.size(0), per = per_sample(x0);
  if (batch == 0 || per == 0) return {x_t, target};
  const Layout layout = common_layout("diffuse", x0);
  const Type type = type_of("diffuse", "x0", x0);
  if (noise) {
    require_layout("diffuse", "noise", *noise, x0, layout);
    STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, "diffuse: noise must be float32");
  }
  STD_TORCH_CHECK(seed || noise, "diffuse: seed or noise must be given");
  const float *a = diffuse_coefficient("alpha", alpha, batch), *s = diffuse_coefficient("sigma", sigma, batch);
  const float *cx = diffuse_coefficient("c_x0", c_x0, batch), *ce = diffuse_coefficient("c_eps", c_eps, batch);
  const Draws draws("diffuse", seed, sample_ids, noise, batch, layout);
  const Bytes in(x0), noisy(x_t), wanted(target);
  const bool stream = should_stream(noisy, batch * per, 2);
  const auto run = GENENGINE_PICK(diffuse_range);
  for_ranges(batch, per, [=](int64_t b, int64_t first, int64_t n) {
    run({in.sample(b), noisy.sample(b), wanted.sample(b), a[b], s[b], cx[b], ce[b],
         draws.source(b, static_cast<uint32_t>(step), kDiffuseStream), type, stream},
        first, n);
  });
  return {x_t, target};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) { m.impl("diffuse", TORCH_BOX(&genengine::diffuse)); }
