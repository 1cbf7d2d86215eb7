// guidance_moments on the CPU: ranges of every sample over threads, their sums added in order.
#include "cpu/guidance_moments_loops.h"

#include <vector>

#include "cpu/elementwise.h"
#include "genengine/guidance_moments.h"

namespace genengine {
namespace {

Tensor guidance_moments(const Tensor& u, const Tensor& c) {
  const char* op = "guidance_moments";
  const int64_t batch = u.size(0), per = per_sample(u), ranges = ranges_of(per);
  Tensor out = torch::stable::new_zeros(u, {batch, kMoments}, ScalarType::Float);
  if (batch == 0 || per == 0) return out;
  require_layout(op, "c", c, u, common_layout(op, u));
  STD_TORCH_CHECK(c.scalar_type() == u.scalar_type(), op, ": c must have u's dtype");
  const Type type = type_of(op, "u", u);
  const Bytes us(u), cs(c);
  const auto run = GENENGINE_PICK(guidance_moments_range);
  std::vector<double> partial(static_cast<size_t>(batch * ranges * kMoments));
  for_ranges(batch, per, [&](int64_t b, int64_t first, int64_t n) {
    run(us.sample(b), cs.sample(b), type, first, n, &partial[static_cast<size_t>((b * ranges + first / kRange) * kMoments)]);
  });
  float* sums = out.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0; j < kMoments; ++j) {
      double total = 0.0;
      for (int64_t k = 0; k < ranges; ++k) total += partial[static_cast<size_t>((b * ranges + k) * kMoments + j)];
      sums[b * kMoments + j] = static_cast<float>(total);
    }
  return out;
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) { m.impl("guidance_moments", TORCH_BOX(&genengine::guidance_moments)); }
