// What the packed form of transformer_sample (genengine/ops/_transformer.py) holds and where, and the draw of a token.
//
// Per token of a sample, with P weights in matrices of which e bytes each: 2 P + 4 D L (i + 1) FLOPs at position i, L blocks;
// P e bytes are read once for a group of samples, 2 D L (i + 1) e bytes of keys and values for each. Sums are float32, in the
// order of k (panel_products.h) and of the keys; those of the inverse CDF float64, in the order of the levels.
#pragma once
#include "genengine/functions.h"
#include "genengine/normal.h"

namespace genengine {

constexpr uint32_t kTokenStream = 7;
constexpr float kTransformerEps = 1e-6f;
constexpr int64_t kPanel = 16;

GENENGINE_HD int64_t whole_panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
GENENGINE_HD int64_t whole_pairs(int64_t n) { return n + n % 2; }
GENENGINE_HD int64_t packed_numel(int64_t rows, int64_t columns) { return whole_pairs(rows) * whole_panels(columns); }

struct TransformerSizes {
  int64_t dim, heads, depth, hidden, levels, length;

  GENENGINE_HD_MEMBER int64_t head() const { return dim / heads; }
  // Elements of a block's matrices and of its biases, and of everything but the start tokens of the classes.
  GENENGINE_HD_MEMBER int64_t block_matrices() const {
    return packed_numel(dim, 3 * dim) + packed_numel(dim, dim) + packed_numel(dim, hidden) + packed_numel(hidden, dim);
  }
  GENENGINE_HD_MEMBER int64_t block_biases() const {
    return whole_panels(3 * dim) + 2 * whole_panels(dim) + whole_panels(hidden);
  }
  GENENGINE_HD_MEMBER int64_t matrices() const { return depth * block_matrices() + packed_numel(dim, levels); }
  GENENGINE_HD_MEMBER int64_t vectors_without_start() const {
    return (levels + length) * dim + depth * block_biases() + whole_panels(levels);
  }
  // Keys, then values, of one head of one block of one sample; and of a sample.
  GENENGINE_HD_MEMBER int64_t head_cache() const { return 2 * whole_panels(length) * whole_panels(head()); }
  GENENGINE_HD_MEMBER int64_t sample_cache() const { return depth * heads * head_cache(); }
};

// The uniform of position i of a sample.
GENENGINE_HD float token_uniform(int64_t i, uint32_t sample, uint64_t seed) {
  const Words words = philox(static_cast<uint32_t>(i / 4), sample, 0, kTokenStream, seed);
  return unit(words.w[i % 4]);
}

}  // namespace genengine
