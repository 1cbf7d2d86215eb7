// The loops of transformer_sample. No torch, no STL.
#pragma once
#include "cpu/isa.h"
#include "cpu/level_draws.h"
#include "genengine/transformer_sample.h"
#include "genengine/types.h"

namespace genengine {

constexpr int64_t kMostTogether = 16;  // samples that read a weight together

// A call. matrices and cache: float32 or bfloat16, as `type` says. tokens, known and log_prob are (B, N); the cache is laid
// out sample by sample, then block, head; there keys in panels of sixteen, (N / 16, D / H, 16), then values (N, D / H), whose
// rows are filled to sixteen.
struct TransformerCall {
  TransformerSizes sizes;
  Type type;
  bool pairs;  // bfloat16 by AVX512-BF16's products
  const void* matrices;
  const float* vectors;
  const int64_t *labels, *seed, *ids;  // ids may be null
  const bool* known;                   // may be null
  int64_t seed_stride, first, last;
  float inverse_temperature, scale;
  int64_t* tokens;
  float* log_prob;
  void* cache;
};

// Floats of scratch for a group of `count` samples, from an address that 64 divides.
inline int64_t transformer_scratch(const TransformerSizes& sizes, int64_t count) {
  const int64_t dim = whole_panels(sizes.dim), hidden = whole_panels(sizes.hidden), levels = whole_panels(sizes.levels);
  const int64_t inner = hidden > dim ? hidden : dim, qkv = whole_panels(3 * sizes.dim);
  int64_t widest = inner > levels ? inner : levels;
  widest = widest > qkv ? widest : qkv;
  return count * (dim + inner + widest) + 2 * level_draw_sums(levels) + whole_panels(sizes.length) + 2 * whole_panels(sizes.head());
}

// Draws the tokens [call.first, call.last) of the samples begin .. begin + count, count <= kMostTogether.
GENENGINE_LOOP(void, transformer_sample, (const TransformerCall& call, int64_t begin, int64_t count, float* scratch))

}  // namespace genengine
