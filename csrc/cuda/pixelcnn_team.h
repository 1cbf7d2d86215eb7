// The Team of pixelcnn_sample that a block of GPU threads is (genengine/pixelcnn_sample.h).
//
// Products of one to thirty-two rows: a warp takes a panel of sixteen columns for all rows, weights come from L2 or L1 in the
// order in which they are stored and are asked for one block of k ahead, rows from shared memory. float32 sums. A sum's order
// depends on k alone, never on the number of rows: an image has the same bits whatever is beside it.
//
//   bfloat16   two tiles of mma.sync.m16n8k16 to a panel. In tile j stands column 2 n + j where the instruction has n, so that
//              a lane's weights are two words in a row of a panel and its sums four columns side by side.
//   float32    eight chains of multiply-adds, k modulo eight, each on the lanes of four columns, then added in pairs.
#pragma once
#include "cuda/warp.h"
#include "genengine/pixelcnn_sample.h"

namespace genengine {

constexpr int kTeamWarps = 8, kTeamThreads = kTeamWarps * kWarpThreads;

// ---- products ------------------------------------------------------------------------------------------------------------

template <class T>
struct TeamProduct {
  const T *x, *w;  // w: of one panel
  int k, x_stride;
  const float* init;  // null: zero
  int init_stride;
  float* y;  // of that panel
  int y_stride;

  // y = init + sum for four columns of a row
  GENENGINE_DEVICE void finish(int row, int column, FourFloats sum) const {
    if (init) {
      const FourFloats start = *reinterpret_cast<const FourFloats*>(init + row * init_stride + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.value[i] = start.value[i] + sum.value[i];
    }
    *reinterpret_cast<FourFloats*>(y + row * y_stride + column) = sum;
  }
};

// Steps of k for which weights are asked for together: fewer where registers are needed for more rows.
template <class T, int Rows>
constexpr int kSteps = sizeof(T) == 2 && Rows == 2 ? 2 : 4;

// A lane's words of some steps: of pair t and t + 4 of each step, for its columns of both tiles.
template <int Steps>
struct TileWords {
  TwoWords low[Steps], high[Steps];

  GENENGINE_DEVICE TileWords(const Bf16* panel, int pairs, int first, int lane) {
    const TwoWords* words = reinterpret_cast<const TwoWords*>(panel) + lane / 4;
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int pair = first + 8 * i + lane % 4;
      low[i] = high[i] = {{0, 0}};
      if (pair < pairs) low[i] = read_only(words + pair * (kPanelColumns / 2));
      if (pair + 4 < pairs) high[i] = read_only(words + (pair + 4) * (kPanelColumns / 2));
    }
  }
};

// Rows first .. first + 16 M - 1 of those there are.
template <int M>
GENENGINE_DEVICE void product_tile(const TeamProduct<Bf16>& p, int first, int rows, int lane) {
  constexpr int kTogether = kSteps<Bf16, M>;
  const int pairs = p.k / 2;
  float sum[M][2][4] = {};
  TileWords<kTogether> now(p.w, pairs, 0, lane);
#pragma unroll 1
  for (int begin = 0; begin < pairs; begin += 8 * kTogether) {
    const TileWords<kTogether> next(p.w, pairs, begin + 8 * kTogether, lane);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int pair = begin + 8 * i + lane % 4;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {  // rows, rows + 8; then of the later pairs
          const int row = first + 16 * m + lane / 4 + (part & 1 ? 8 : 0), at = pair + (part & 2 ? 4 : 0);
          const bool there = row < rows && at < pairs;
          a[part] = there ? reinterpret_cast<const uint32_t*>(p.x + row * p.x_stride)[at] : 0;
        }
        multiply_tiles(sum[m][0], a, now.low[i].word[0], now.high[i].word[0]);
        multiply_tiles(sum[m][1], a, now.low[i].word[1], now.high[i].word[1]);
      }
    }
    now = next;
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + lane / 4 + 8 * half;
      const float(&even)[4] = sum[m][0], (&odd)[4] = sum[m][1];
      if (row < rows) p.finish(row, lane % 4 * 4, {{even[2 * half], odd[2 * half], even[2 * half + 1], odd[2 * half + 1]}});
    }
  }
}

template <int Steps>
struct TileColumns {
  FourFloats w[Steps];

  GENENGINE_DEVICE TileColumns(const float* panel, int k, int first, int lane) {
    const FourFloats* columns = reinterpret_cast<const FourFloats*>(panel) + lane % 4;
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const int at = first + 8 * i + lane / 4;
      w[i] = {{0.f, 0.f, 0.f, 0.f}};
      if (at < k) w[i] = read_only(columns + at * (kPanelColumns / 4));
    }
  }
};

// The sums of the eight lanes whose numbers differ by the bits of Mask, its half and so on down to 4, added in pairs. Rows are
// halved on the way; returns the number of the one that the lane ends with.
template <int Mask, int R>
GENENGINE_DEVICE int add_parts(float (&sum)[R][4], int lane) {
  if constexpr (Mask < 4) {
    return 0;
  } else if constexpr (R == 1) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[0][c] = sum[0][c] + shuffle_xor(sum[0][c], Mask);
    return add_parts<Mask / 2>(sum, lane);
  } else {
    constexpr int kHalf = R / 2;
    const bool upper = lane & Mask;
    float kept[kHalf][4];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float mine = upper ? sum[r + kHalf][c] : sum[r][c], other = upper ? sum[r][c] : sum[r + kHalf][c];
        kept[r][c] = mine + shuffle_xor(other, Mask);
      }
    }
    const int row = (upper ? kHalf : 0) + add_parts<Mask / 2>(kept, lane);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[0][c] = kept[0][c];
    return row;
  }
}

// Rows first .. first + R - 1 of those there are; R: 1, 2, 4 or 8.
template <int R>
GENENGINE_DEVICE void product_tile(const TeamProduct<float>& p, int first, int rows, int lane) {
  float sum[R][4] = {};
  constexpr int kTogether = kSteps<float, R>;
  TileColumns<kTogether> now(p.w, p.k, 0, lane);
#pragma unroll 1
  for (int begin = 0; begin < p.k; begin += 8 * kTogether) {
    const TileColumns<kTogether> next(p.w, p.k, begin + 8 * kTogether, lane);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = begin + 8 * i + lane / 4;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int row = first + r < rows ? first + r : rows - 1;
        const float x = at < p.k ? p.x[row * p.x_stride + at] : 0.f;
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] = multiply_add(x, now.w[i].value[c], sum[r][c]);
      }
    }
    now = next;
  }
  const int row = first + add_parts<16>(sum, lane);
  constexpr int kCopies = 8 / R;  // lanes that hold the same row
  if (row < rows && lane / 4 % kCopies == 0) p.finish(row, lane % 4 * 4, {{sum[0][0], sum[0][1], sum[0][2], sum[0][3]}});
}

// ---- the team ------------------------------------------------------------------------------------------------------------

struct alignas(4) TwoBf16 {
  Bf16 value[2];
};

GENENGINE_DEVICE TwoFloats operator+(TwoFloats a, TwoFloats b) { return {{a.value[0] + b.value[0], a.value[1] + b.value[1]}}; }

// tanh(a) sigmoid(b) = (2 - d) / (d e) with d = 1 + e^-2a, e = 1 + e^-b; at the bounds both factors have reached their limits,
// to 1e-17.
GENENGINE_DEVICE float gate_of(float a, float b) {
  const float d = 1.f + exponential(-2.f * at_least(a, -20.f)), e = 1.f + exponential(-at_least(b, -40.f));
  return quotient(2.f - d, d * e);
}

template <class T>
struct BlockTeam {
  using Weight = T;
  using Input = T;
  static constexpr bool kPairs = sizeof(T) == 2;
  static constexpr int kPad = kPairs ? 8 : 0;  // the rows of a tile then lie in different banks
  static constexpr int kVector = 2;

  GENENGINE_DEVICE static T narrow(float value) {
    if constexpr (kPairs) {
      return to_bf16(value);
    } else {
      return value;
    }
  }
  GENENGINE_DEVICE static T input(T value) { return value; }

  GENENGINE_DEVICE static TwoFloats load(const float* from) { return *reinterpret_cast<const TwoFloats*>(from); }
  GENENGINE_DEVICE static void store(float* to, TwoFloats vector) { *reinterpret_cast<TwoFloats*>(to) = vector; }
  GENENGINE_DEVICE static void keep(T* to, TwoFloats vector) {
    if constexpr (kPairs) {
      *reinterpret_cast<TwoBf16*>(to) = {{to_bf16(vector.value[0]), to_bf16(vector.value[1])}};
    } else {
      store(to, vector);
    }
  }
  GENENGINE_DEVICE static void feed(T* to, TwoFloats vector) { keep(to, vector); }
  GENENGINE_DEVICE static TwoFloats positive(TwoFloats a) { return {{at_least(a.value[0], 0.f), at_least(a.value[1], 0.f)}}; }
  GENENGINE_DEVICE static TwoFloats gate(TwoFloats a, TwoFloats b) {
    return {{gate_of(a.value[0], b.value[0]), gate_of(a.value[1], b.value[1])}};
  }

  // A warp takes whole rows, or where these are few, `across` warps share each: what is computed for a row counts.
  template <class F>
  GENENGINE_DEVICE void begin(int rows, int width, F row, int step = 1) const {
    const int pass = kWarpThreads * step;
    int shift = 0;
    while ((rows << shift) < kTeamWarps && (pass << shift) < width && (1 << shift) < kTeamWarps) ++shift;
#pragma unroll 1
    for (int r = warp() >> shift; r < rows; r += kTeamWarps >> shift) {
      const auto element = row(r);
      const int part = warp() & ((1 << shift) - 1);
#pragma unroll 1
      for (int j = part * pass + lane() * step; j < width; j += pass << shift) element(j);
    }
  }
  template <class F>
  GENENGINE_DEVICE void each(int rows, int width, F row, int step = 1) const {
    begin(rows, width, row, step);
    block_barrier();
  }

  GENENGINE_DEVICE void product(const T* w, const PanelMatrix& m, const T* x, int x_stride, int rows, const float* init,
                                int init_stride, float* y, int y_stride) const {
    constexpr int kMost = kPairs ? 32 : 8;
    const int panels = m.n / kPanelColumns;
#pragma unroll 1
    for (int panel = warp(); panel < panels; panel += kTeamWarps) {
      const int column = panel * kPanelColumns;
      const TeamProduct<T> p = {x, w + static_cast<int64_t>(column) * m.k, m.k, x_stride, init ? init + column : nullptr,
                                init_stride, y + column, y_stride};
#pragma unroll 1
      for (int first = 0; first < rows; first += kMost) tile(p, first, rows);
    }
    block_barrier();
  }

  template <class F>
  GENENGINE_DEVICE void begin(int outer, int inner, int width, F row, int step = 1) const {
    begin(outer * inner, width, [=](int r) {
      const int i = inner == 1 ? r : r / inner;
      return row(i, r - i * inner);
    }, step);
  }
  template <class F>
  GENENGINE_DEVICE void each(int outer, int inner, int width, F row, int step = 1) const {
    begin(outer, inner, width, row, step);
    block_barrier();
  }

  // Each by one thread, in different warps as long as there are more of those.
  template <class F>
  GENENGINE_DEVICE void rows(int n, F f) const {
    for (int r = warp() + lane() * kTeamWarps; r < n; r += kTeamThreads) f(r);
    block_barrier();
  }

  // A warp to each, a part to a lane.
  template <class P, class F>
  GENENGINE_DEVICE void add_up(int n, P part, F write) const {
#pragma unroll 1
    for (int r = warp(); r < n; r += kTeamWarps) {
      MixtureSums sums = part(r, lane(), kWarpThreads);
#pragma unroll
      for (int mask = kWarpThreads / 2; mask; mask /= 2) {
        MixtureSums other;
        other.joint_largest = shuffle_xor(sums.joint_largest, mask);
        other.joint = shuffle_xor(sums.joint, mask);
        other.logit_largest = shuffle_xor(sums.logit_largest, mask);
        other.logit = shuffle_xor(sums.logit, mask);
        sums.add(other);
      }
      if (lane() == 0) write(r, sums);
    }
    block_barrier();
  }

  template <class U, class F>
  GENENGINE_DEVICE void draw(int n, const float* logits, int stride, int levels, float inverse_temperature, U uniform,
                             F write) const {
#pragma unroll 1
    for (int r = warp(); r < n; r += kTeamWarps) {
      const float u = uniform(r);
      float log_p;
      if (u <= 0.f) continue;
      const int level = choose(logits + r * stride, levels, u, inverse_temperature, log_p);
      if (lane() == 0) write(r, level, log_p);
    }
    block_barrier();
  }

 private:
  GENENGINE_DEVICE static int lane() { return thread_index() % kWarpThreads; }
  GENENGINE_DEVICE static int warp() { return thread_index() / kWarpThreads; }

  GENENGINE_DEVICE static void tile(const TeamProduct<T>& p, int first, int rows) {
    const int left = rows - first;
    if constexpr (kPairs)
      left > 16 ? product_tile<2>(p, first, rows, lane()) : product_tile<1>(p, first, rows, lane());
    else
      left > 4 ? product_tile<8>(p, first, rows, lane())
               : left > 1 ? product_tile<4>(p, first, rows, lane()) : product_tile<1>(p, first, rows, lane());
  }

  // A warp's draw, the level of `inverse_cdf` but for the order of the sums: each lane adds the weights of neighbouring levels,
  // then the lanes' sums are added up. Levels agree but where a uniform lies within the rounding of float64 of the edge of two.
  GENENGINE_DEVICE static int choose(const float* logits, int levels, float u, float inverse_temperature, float& log_prob) {
    const float largest = largest_of(logits, levels);
    const auto weight = [=](int i) { return static_cast<double>(exp_ieee((logits[i] - largest) * inverse_temperature)); };
    const int each = (levels + kWarpThreads - 1) / kWarpThreads, first = lane() * each;
    const int end = first + each < levels ? first + each : levels;
    double own = 0;
#pragma unroll 1
    for (int i = first; i < end; ++i) own += weight(i);
    double upto = own;
#pragma unroll
    for (int by = 1; by < kWarpThreads; by *= 2) {
      const double below = shuffle_up(upto, by);
      if (lane() >= by) upto = below + upto;
    }
    const double total = shuffle_from(upto, kWarpThreads - 1), target = static_cast<double>(u) * total;
    double sum = shuffle_up(upto, 1);
    if (lane() == 0) sum = 0;
    int level = 0;
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      sum += weight(i);
      level += sum <= target && i + 1 < levels ? 1 : 0;
    }
#pragma unroll
    for (int mask = kWarpThreads / 2; mask; mask /= 2) level += shuffle_xor(level, mask);
    log_prob = (logits[level] - largest) * inverse_temperature - logarithm(static_cast<float>(total));
    return level;
  }
  GENENGINE_DEVICE static float largest_of(const float* logits, int levels) {
    float largest = logits[0];
#pragma unroll 1
    for (int i = lane(); i < levels; i += kWarpThreads) largest = logits[i] > largest ? logits[i] : largest;
#pragma unroll
    for (int mask = kWarpThreads / 2; mask; mask /= 2) {
      const float other = shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    return largest;
  }
};

}  // namespace genengine
