// transformer_sample on the CPU: every thread draws whole sequences of its own, in groups that share the weights they read.
// No sample depends on the split.
#include "cpu/transformer_sample_loops.h"

#include <cmath>
#include <vector>

#include "cpu/isa.h"
#include "elementwise_checks.h"

namespace genengine {
namespace {

void require_flat(const char* name, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && x.scalar_type() == type,
                  "transformer_sample: ", name, " must be flat, and of the dtype of a packed transformer");
}

void require_table(const char* name, const Tensor& x, const Tensor& tokens, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == type && x.size(0) == tokens.size(0) &&
                      x.size(1) == tokens.size(1),
                  "transformer_sample: ", name, " must be contiguous (B, N)");
}

// Every index that the loops follow.
void require_within(const char* name, const int64_t* values, const bool* used, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK((used && !used[i]) || (values[i] >= 0 && values[i] < end), "transformer_sample: ", name,
                    " must be in 0 .. ", end - 1, ", got ", values[i]);
}

TransformerSizes check_weights(const Tensor& matrices, const Tensor& vectors, TransformerSizes sizes, Type type) {
  const bool positive = sizes.dim > 0 && sizes.heads > 0 && sizes.depth > 0 && sizes.hidden > 0 && sizes.levels > 0;
  STD_TORCH_CHECK(positive && sizes.length > 0 && sizes.dim % sizes.heads == 0, "transformer_sample: sizes must be positive");
  require_flat("matrices", matrices, type == Type::f32 ? ScalarType::Float : ScalarType::BFloat16);
  require_flat("vectors", vectors, ScalarType::Float);
  const int64_t start = vectors.numel() - sizes.vectors_without_start();
  STD_TORCH_CHECK(matrices.numel() == sizes.matrices() && start > 0 && start % sizes.dim == 0,
                  "transformer_sample: matrices and vectors must hold a packed transformer of these sizes");
  return sizes;
}

void sample(const Tensor& matrices, const Tensor& vectors, int64_t dim, int64_t num_heads, int64_t depth, int64_t hidden,
            int64_t num_levels, const Tensor& labels, double temperature, const Tensor& seed, const OptionalTensor& sample_ids,
            const OptionalTensor& known, int64_t first, int64_t last, bool cached, const Tensor& tokens,
            const Tensor& log_prob, const Tensor& cache) {
  const char* op = "transformer_sample";
  STD_TORCH_CHECK(cached, op, ": without a cache only the reference runs");
  require_table("tokens", tokens, tokens, ScalarType::Long);
  require_table("log_prob", log_prob, tokens, ScalarType::Float);
  if (known) require_table("known", *known, tokens, ScalarType::Bool);
  if (tokens.numel() == 0) return;
  TransformerCall call{};
  call.type = type_of(op, "matrices", matrices);
  call.sizes = check_weights(matrices, vectors, {dim, num_heads, depth, hidden, num_levels, tokens.size(1)}, call.type);
  call.pairs = pairs_are_fast();
  const int64_t batch = tokens.size(0);
  STD_TORCH_CHECK(0 <= first && first <= last && last <= call.sizes.length, op, ": first .. last must lie within the tokens");
  STD_TORCH_CHECK(cache.scalar_type() == matrices.scalar_type() && cache.is_contiguous() &&
                      cache.numel() >= batch * call.sizes.sample_cache(), op, ": cache is too small");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_contiguous() && labels.numel() == batch, op,
                  ": labels must be int64 (B,)");
  require_seed(op, seed, batch);
  require_sample_ids(op, sample_ids, batch);
  call.known = known ? known->const_data_ptr<bool>() : nullptr;
  call.labels = labels.const_data_ptr<int64_t>();
  call.tokens = tokens.mutable_data_ptr<int64_t>();
  const int64_t classes = (vectors.numel() - call.sizes.vectors_without_start()) / dim;
  require_within("labels", call.labels, nullptr, batch, classes);
  if (call.known) require_within("known tokens", call.tokens, call.known, tokens.numel(), num_levels);
  for (int64_t b = 0; first > 0 && b < batch; ++b)
    require_within("tokens", call.tokens + b * call.sizes.length + first - 1, nullptr, 1, num_levels);
  call.matrices = matrices.data_ptr();
  call.vectors = vectors.const_data_ptr<float>();
  call.seed = seed.const_data_ptr<int64_t>();
  call.seed_stride = seed.numel() > 1 ? 1 : 0;
  call.ids = sample_ids ? sample_ids->const_data_ptr<int64_t>() : nullptr;
  call.first = first;
  call.last = last;
  call.inverse_temperature = static_cast<float>(1 / temperature);
  call.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(call.sizes.head())));
  call.log_prob = log_prob.mutable_data_ptr<float>();
  call.cache = cache.data_ptr();
  const auto run = GENENGINE_PICK(transformer_sample);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t groups = (end - begin + kMostTogether - 1) / kMostTogether, most = (end - begin + groups - 1) / groups;
    std::vector<float> room(static_cast<size_t>(transformer_scratch(call.sizes, most) + 16));
    const uintptr_t misaligned = reinterpret_cast<uintptr_t>(room.data()) % 64;
    float* scratch = room.data() + (misaligned ? (64 - misaligned) / sizeof(float) : 0);
    for (int64_t b = begin; b < end; b += most) run(call, b, end - b < most ? end - b : most, scratch);
  });
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) { m.impl("transformer_sample_out", TORCH_BOX(&genengine::sample)); }
