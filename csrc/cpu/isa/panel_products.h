// Products of few rows with weights in panels of sixteen columns (genengine/ops/_panels.py): y = init + x W, float32 sums.
// Included only by csrc/cpu/isa/*.cpp: compiled once per instruction set. No torch, no STL.
//
// A tile of rows and panels stays in registers while k runs; every value of a row and of a panel is read once per tile.
// Each y is one chain of multiply-adds in the order of k, whatever the tile it falls in: a row's result does not depend on
// the rows beside it.
#pragma once
#include "cpu/isa/lanes_math.h"

namespace genengine {
namespace GENENGINE_ISA {

// ---- one step of k: a value or a pair of a row (X), times one vector of a panel (W) --------------------------------------

template <class X, class W>
struct PanelStep;

template <>
struct PanelStep<float, float> {
  static constexpr int kDepth = 1;  // values of k
  using Column = Lanes;
  static GENENGINE_INLINE Column column(const float* panel) { return load(panel); }
  static GENENGINE_INLINE Lanes accumulate(const float* x, Column w, Lanes sum) { return multiply_add(*x, w, sum); }
};

// bfloat16 weights become float32 on the way into the registers: exact products, half the bytes.
template <>
struct PanelStep<float, BFloat> {
  static constexpr int kDepth = 2;
  struct Column {
    Lanes low, high;
  };
  static GENENGINE_INLINE Column column(const BFloat* panel) {
    Column w;
    for (int i = 0; i < kParts; ++i) {
      const NativeBits bits = load_vector<NativeBits>(panel + 2 * i * kNative);
      w.low.part[i] = (Native)(bits << 16);
      w.high.part[i] = (Native)(bits & 0xffff0000u);
    }
    return w;
  }
  static GENENGINE_INLINE Lanes accumulate(const float* x, Column w, Lanes sum) {
    return multiply_add(x[1], w.high, multiply_add(x[0], w.low, sum));
  }
};

// AVX512-BF16 multiplies pairs. It adds a pair in its own way: the last places differ from those of the others.
#if defined(__AVX512BF16__)
template <>
struct PanelStep<BFloat, BFloat> {
  static constexpr int kDepth = 2;
  using Column = __m512i;
  static GENENGINE_INLINE Column column(const BFloat* panel) { return _mm512_loadu_si512(panel); }
  static GENENGINE_INLINE Lanes accumulate(const BFloat* x, Column w, Lanes sum) {
    int pair;
    memcpy(&pair, x, 4);
    return {{(Native)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w)}};
  }
};
#endif

// ---- a tile -------------------------------------------------------------------------------------------------------------

// What fills the registers: rows times panels of accumulators, a vector of each panel and one broadcast.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTilePanels = 2, kThinPanels = 4, kThinnestPanels = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePanels = 1, kThinPanels = 2, kThinnestPanels = 4;
#else
constexpr int kTileRows = 2, kTilePanels = 1, kThinPanels = 1, kThinnestPanels = 2;
#endif

template <class X, class W>
struct PanelProduct {
  const X* x;
  const W* w;
  int64_t x_stride, panel_size;  // elements from row to row, and from panel to panel
  int k;                         // even
  const float* init;             // null: zero
  float* y;
  int64_t init_stride, y_stride;
};

template <int Rows, int Panels, class X, class W>
GENENGINE_INLINE void product_tile(const PanelProduct<X, W>& p, int64_t row, int panel) {
  using Step = PanelStep<X, W>;
  const X* __restrict x = p.x + row * p.x_stride;
  const W* __restrict w = p.w + panel * p.panel_size;
  Lanes sum[Rows][Panels];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Panels; ++c) sum[r][c] = zero_lanes();
  }
#pragma GCC unroll 1
  for (int i = 0; i < p.k; i += Step::kDepth) {
    typename Step::Column column[Panels];
#pragma GCC unroll 8
    for (int c = 0; c < Panels; ++c) column[c] = Step::column(w + c * p.panel_size + static_cast<int64_t>(i) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < Panels; ++c) sum[r][c] = Step::accumulate(x + r * p.x_stride + i, column[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < Panels; ++c) {
      const int64_t column = static_cast<int64_t>(panel + c) * kLanes;
      const Lanes init = p.init ? load(p.init + (row + r) * p.init_stride + column) : zero_lanes();
      store(p.y + (row + r) * p.y_stride + column, init + sum[r][c]);
    }
  }
}

// The rows that are left after whole tiles: their number becomes a constant.
template <int Rows, int Panels, class X, class W>
GENENGINE_INLINE void product_rest(const PanelProduct<X, W>& p, int64_t row, int64_t rows, int panel) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return product_tile<Rows, Panels>(p, row, panel);
    product_rest<Rows - 1, Panels>(p, row, rows, panel);
  }
}

template <int Panels, class X, class W>
inline void product_columns(const PanelProduct<X, W>& p, int64_t rows, int panel) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) product_tile<kTileRows, Panels>(p, row, panel);
  product_rest<kTileRows - 1, Panels>(p, row, rows - row, panel);
}

// y (rows, 16 panels) = init + x W. init_stride 0: one bias for all rows. y may be init, but not x.
// A tile of few rows has few sums, and each waits for its last addition: it takes more panels.
template <class X, class W>
inline void panel_product(const PanelProduct<X, W>& p, int64_t rows, int panels) {
  int panel = 0;
  if (rows <= kTileRows / 4)
    for (; panel + kThinnestPanels <= panels; panel += kThinnestPanels)
      product_rest<kTileRows / 4, kThinnestPanels>(p, 0, rows, panel);
  if (rows <= kTileRows / 2)
    for (; panel + kThinPanels <= panels; panel += kThinPanels) product_rest<kTileRows / 2, kThinPanels>(p, 0, rows, panel);
  for (; panel + kTilePanels <= panels; panel += kTilePanels) product_columns<kTilePanels>(p, rows, panel);
  for (; panel < panels; ++panel) product_columns<1>(p, rows, panel);
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
