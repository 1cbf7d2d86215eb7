// transformer_sample for a group of samples: one position after another, all samples of the group through each product.
//
// W: what matrices, keys and values are stored as. X: what enters the products; float rounded to bfloat16 where W is bfloat16
// and the instruction set does not multiply such pairs.
#include "cpu/transformer_sample_loops.h"

#include "cpu/isa/level_draws.h"
#include "cpu/isa/panel_products.h"
#include "cpu/isa/row.h"
#include "genengine/activations.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// The pointers into the packed form of one block.
template <class W>
struct BlockWeights {
  const W *qkv, *proj, *fc1, *fc2;
  const float *qkv_bias, *proj_bias, *fc1_bias, *fc2_bias;
};

// One group of samples, and its rows: x the residual stream, inner what enters a product, wide what leaves it.
template <class X, class W>
struct Group {
  const TransformerCall& call;
  const TransformerSizes& sizes;
  int64_t begin, count, dim, inner_stride, wide_stride;
  double* sums;  // of LevelDraws
  float *x, *wide, *scores, *mixed;
  X *inner, *query;

  Group(const TransformerCall& call, int64_t begin, int64_t count, float* scratch)
      : call(call), sizes(call.sizes), begin(begin), count(count), dim(whole_panels(sizes.dim)) {
    const int64_t hidden = whole_panels(sizes.hidden), levels = whole_panels(sizes.levels), qkv = whole_panels(3 * sizes.dim);
    inner_stride = hidden > dim ? hidden : dim;
    wide_stride = inner_stride > levels ? inner_stride : levels;
    wide_stride = wide_stride > qkv ? wide_stride : qkv;
    sums = reinterpret_cast<double*>(scratch);
    x = scratch + 2 * level_draw_sums(levels);
    wide = x + count * dim;
    scores = wide + count * wide_stride;
    mixed = scores + whole_panels(sizes.length);
    query = reinterpret_cast<X*>(mixed + whole_panels(sizes.head()));
    inner = reinterpret_cast<X*>(mixed + 2 * whole_panels(sizes.head()));
  }

  BlockWeights<W> block(int64_t l) const {
    const W* matrix = static_cast<const W*>(call.matrices) + l * sizes.block_matrices();
    const float* bias = call.vectors + biases() + l * sizes.block_biases();
    BlockWeights<W> w;
    w.qkv = matrix;
    w.proj = w.qkv + packed_numel(sizes.dim, 3 * sizes.dim);
    w.fc1 = w.proj + packed_numel(sizes.dim, sizes.dim);
    w.fc2 = w.fc1 + packed_numel(sizes.dim, sizes.hidden);
    w.qkv_bias = bias;
    w.proj_bias = w.qkv_bias + whole_panels(3 * sizes.dim);
    w.fc1_bias = w.proj_bias + dim;
    w.fc2_bias = w.fc1_bias + whole_panels(sizes.hidden);
    return w;
  }
  const W* out_matrix() const { return static_cast<const W*>(call.matrices) + sizes.depth * sizes.block_matrices(); }
  int64_t biases() const { return (sizes.levels + sizes.length) * sizes.dim; }
  const float* out_bias() const { return call.vectors + biases() + sizes.depth * sizes.block_biases(); }
};

// ---- rows ---------------------------------------------------------------------------------------------------------------

// A row as it enters a product: in bfloat16, or rounded to it, if that is what the weights are.
template <class X, class W>
GENENGINE_INLINE void enter(X* to, Lanes lanes) {
  store(to, kIsBFloat<W> && !kIsBFloat<X> ? rounded<W>(lanes) : lanes);
}

template <class X, class W>
GENENGINE_INLINE void enter_one(X& to, float value) {
  W stored;
  from_float(stored, value);
  from_float(to, to_float(stored));
}

// y = init + x W for every row of the group.
template <class X, class W>
GENENGINE_INLINE void product(const Group<X, W>& g, const W* w, int64_t k, int64_t columns, const float* init,
                              int64_t init_stride, float* y, int64_t y_stride) {
  const int64_t pairs = whole_pairs(k);
  const PanelProduct<X, W> p{g.inner, w, g.inner_stride, pairs * kLanes, static_cast<int>(pairs), init, y, init_stride, y_stride};
  panel_product(p, g.count, static_cast<int>(whole_panels(columns) / kPanel));
}

// inner = (x - mean) / sqrt(variance + eps), and then x += bias: that of the product which adds to x.
template <class X, class W>
GENENGINE_INLINE void norm(const Group<X, W>& g, const float* bias) {
  const int64_t dim = g.sizes.dim;
  for (int64_t r = 0; r < g.count; ++r) {
    float* __restrict x = g.x + r * g.dim;
    X* __restrict to = g.inner + r * g.inner_stride;
    Sum total, squares;
    each(dim, GENENGINE_BODY { total.add(k, clip(load(x + i), span)); });
    const float mean = total.total() / static_cast<float>(dim);
    each(dim, GENENGINE_BODY {
      const Lanes centred = clip(load(x + i) - mean, span);
      squares.add(k, centred * centred);
    });
    const float scale = 1.f / sqrt_rn(squares.total() / static_cast<float>(dim) + kTransformerEps);
    each(dim, GENENGINE_BODY {
      const Lanes value = load(x + i);
      enter<X, W>(to + i, clip((value - mean) * scale, span));
      if (bias) store(x + i, value + load(bias + i));
    });
  }
}

template <class X, class W>
void activate(const Group<X, W>& g) {
  const int64_t hidden = whole_panels(g.sizes.hidden);
  for (int64_t r = 0; r < g.count; ++r) {
    float* __restrict row = g.wide + r * g.wide_stride;
    _Pragma("GCC ivdep") for (int64_t i = 0; i < hidden; ++i) row[i] = gelu_tanh(row[i]);
    for (int64_t i = 0; i < hidden; i += kLanes) enter<X, W>(g.inner + r * g.inner_stride + i, load(row + i));
  }
}

// x of position i: the token before it, or the start of the label, at its place.
template <class X, class W>
void embed(const Group<X, W>& g, int64_t position) {
  const TransformerCall& call = g.call;
  const int64_t dim = g.sizes.dim;
  const float* place = call.vectors + (g.sizes.levels + position) * dim;
  for (int64_t r = 0; r < g.count; ++r) {
    const int64_t b = g.begin + r;
    const float* from = position ? call.vectors + call.tokens[b * g.sizes.length + position - 1] * dim
                                 : call.vectors + g.sizes.vectors_without_start() + call.labels[b] * dim;
    float* __restrict x = g.x + r * g.dim;
    _Pragma("GCC ivdep") for (int64_t i = 0; i < dim; ++i) x[i] = from[i] + place[i];
    for (int64_t i = dim; i < g.dim; ++i) x[i] = 0.f;
  }
}

// ---- attention ----------------------------------------------------------------------------------------------------------

// The cache of one head of one sample: keys in panels, as a matrix (D / H, N); values in rows.
template <class W>
struct HeadCache {
  W *keys, *values;
  int64_t row, pairs;  // elements from value to value, of a key

  template <class X>
  HeadCache(const Group<X, W>& g, int64_t b, int64_t l, int64_t h) {
    const int64_t head = g.sizes.head();
    row = whole_panels(head);
    pairs = whole_pairs(head);
    keys = static_cast<W*>(g.call.cache) + b * g.sizes.sample_cache() + (l * g.sizes.heads + h) * g.sizes.head_cache();
    values = keys + whole_panels(g.sizes.length) * row;
  }

  // Where value d of the key at `position` stands; bfloat16 in pairs.
  GENENGINE_INLINE W& key(int64_t position, int64_t d) const {
    W* panel = keys + position / kPanel * pairs * kPanel;
    const int64_t lane = position % kPanel;
    return kIsBFloat<W> ? panel[(d / 2 * kPanel + lane) * 2 + d % 2] : panel[d * kPanel + lane];
  }

  void append(int64_t position, const float* k, const float* v, int64_t head) const {
    for (int64_t d = 0; d < head; ++d) from_float(key(position, d), k[d]);
    if (pairs > head) from_float(key(position, head), 0.f);
    store_row(values + position * row, v, head);
    for (int64_t d = head; d < row; ++d) from_float(values[position * row + d], 0.f);
  }
};

// Scores become e^(scale (score - the largest)), zero beyond n; returns their sum.
GENENGINE_INLINE float softmax(float* __restrict scores, int64_t n, float scale) {
  const int64_t whole = whole_panels(n);
  const float largest = largest_of(scores, n);
  Lanes total = zero_lanes();
  for (int64_t i = 0; i < whole; i += kLanes) {
    Lanes weight = exponential((load(scores + i) - largest) * scale);
    if (i + kLanes > n) weight = clip(weight, Part{n - i});
    store(scores + i, weight);
    total = total + weight;
  }
  return sum(total);
}

// to = sum_j weights[j] values[j], of Panels vectors, in two sums of alternate j.
template <int Panels, class W>
GENENGINE_INLINE void mix(float* to, const float* weights, const W* values, int64_t row, int64_t n, float inverse) {
  Lanes sums[2][Panels];
#pragma GCC unroll 4
  for (int c = 0; c < Panels; ++c) sums[0][c] = sums[1][c] = zero_lanes();
  int64_t j = 0;
  for (; j + 1 < n; j += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 4
      for (int c = 0; c < Panels; ++c)
        sums[odd][c] = multiply_add(weights[j + odd], load(values + (j + odd) * row + c * kLanes), sums[odd][c]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Panels; ++c) {
    if (j < n) sums[0][c] = multiply_add(weights[j], load(values + j * row + c * kLanes), sums[0][c]);
    store(to + c * kLanes, (sums[0][c] + sums[1][c]) * inverse);
  }
}

// inner = attention of the query in wide over the keys up to its own.
template <class X, class W>
void attend(const Group<X, W>& g, int64_t l, int64_t position) {
  const int64_t head = g.sizes.head(), n = position + 1, row = whole_panels(head);
  for (int64_t r = 0; r < g.count; ++r) {
    const float* qkv = g.wide + r * g.wide_stride;
    X* o = g.inner + r * g.inner_stride;
    for (int64_t h = 0; h < g.sizes.heads; ++h) {
      const HeadCache<W> cache(g, g.begin + r, l, h);
      const float* q = qkv + h * head;
      cache.append(position, q + g.sizes.dim, q + 2 * g.sizes.dim, head);
      for (int64_t d = 0; d < row; d += kLanes)
        enter<X, W>(g.query + d, d + kLanes <= head ? load(q + d) : read(q + d, Part{head - d}));
      const PanelProduct<X, W> p{g.query, cache.keys, 0, cache.pairs * kLanes, static_cast<int>(cache.pairs), nullptr, g.scores, 0, 0};
      panel_product(p, 1, static_cast<int>(whole_panels(n) / kPanel));
      const float inverse = 1.f / softmax(g.scores, n, g.call.scale);
      int64_t d = 0;
      for (; d + 4 * kLanes <= row; d += 4 * kLanes) mix<4>(g.mixed + d, g.scores, cache.values + d, row, n, inverse);
      for (; d < row; d += kLanes) mix<1>(g.mixed + d, g.scores, cache.values + d, row, n, inverse);
      for (d = 0; d + kLanes <= head; d += kLanes) enter<X, W>(o + h * head + d, load(g.mixed + d));
      for (; d < head; ++d) enter_one<X, W>(o[h * head + d], g.mixed[d]);
    }
  }
}

// ---- the draw -----------------------------------------------------------------------------------------------------------

// The tokens at `position`; nothing is computed for those that are known all together.
template <class X, class W>
void draw_all(const Group<X, W>& g, int64_t position) {
  const TransformerCall& call = g.call;
  const auto known = [&](int64_t r) { return call.known && call.known[(g.begin + r) * g.sizes.length + position]; };
  int64_t drawn = 0;
  for (int64_t r = 0; r < g.count; ++r) drawn += !known(r);
  if (drawn) {
    norm(g, nullptr);
    product(g, g.out_matrix(), g.sizes.dim, g.sizes.levels, g.out_bias(), 0, g.wide, g.wide_stride);
  }
  const auto uniform = [&](int64_t r) {
    const int64_t b = g.begin + r;
    const uint32_t sample = static_cast<uint32_t>(call.ids ? call.ids[b] : b);
    return known(r) ? 0.f : token_uniform(position, sample, static_cast<uint64_t>(call.seed[b * call.seed_stride]));
  };
  const auto write = [&](int64_t r, int64_t token, float log_prob) {
    const int64_t at = (g.begin + r) * g.sizes.length + position;
    call.tokens[at] = token;
    call.log_prob[at] = log_prob;
  };
  for (int64_t r = 0; r < g.count; ++r)
    if (known(r)) call.log_prob[(g.begin + r) * g.sizes.length + position] = 0.f;
  LevelDraws{g.sums, whole_panels(g.sizes.levels), g.sizes.levels, call.inverse_temperature}.draw(g.count, g.wide, g.wide_stride,
                                                                                                  uniform, write);
}

template <class X, class W>
void run(const TransformerCall& call, int64_t begin, int64_t count, float* scratch) {
  const Group<X, W> g(call, begin, count, scratch);
  const TransformerSizes& sizes = call.sizes;
  for (int64_t position = call.first; position < call.last; ++position) {
    embed(g, position);
    for (int64_t l = 0; l < sizes.depth; ++l) {
      const BlockWeights<W> w = g.block(l);
      norm(g, w.proj_bias);
      product(g, w.qkv, sizes.dim, 3 * sizes.dim, w.qkv_bias, 0, g.wide, g.wide_stride);
      attend(g, l, position);
      product(g, w.proj, sizes.dim, sizes.dim, g.x, g.dim, g.x, g.dim);
      norm(g, w.fc2_bias);
      product(g, w.fc1, sizes.dim, sizes.hidden, w.fc1_bias, 0, g.wide, g.wide_stride);
      activate(g);
      product(g, w.fc2, sizes.hidden, sizes.dim, g.x, g.dim, g.x, g.dim);
    }
    draw_all(g, position);
  }
}

}  // namespace

void transformer_sample(const TransformerCall& call, int64_t begin, int64_t count, float* scratch) {
#if defined(__AVX512BF16__)
  if (call.type == Type::bf16 && call.pairs) return run<BFloat, BFloat>(call, begin, count, scratch);
#endif
  if (call.type == Type::bf16) return run<float, BFloat>(call, begin, count, scratch);
  run<float, float>(call, begin, count, scratch);
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
