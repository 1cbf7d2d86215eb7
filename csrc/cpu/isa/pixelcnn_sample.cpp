// pixelcnn_sample on one thread: a group of images, its products in register tiles, its gates and draws in vectors.
#include "cpu/pixelcnn_sample_loops.h"

#include "cpu/isa/panel_products.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// W: stored weights and activations. X: what products read of the latter.
template <class X, class W>
struct Thread {
  using Weight = W;
  using Input = X;
  static constexpr int kPad = 0;
  double* sums;  // of `levels` weights

  static GENENGINE_INLINE W narrow(float value) {
    W to;
    from_float(to, value);
    return to;
  }
  static GENENGINE_INLINE X input(W value) {
    X to;
    from_float(to, to_float(value));
    return to;
  }
  static GENENGINE_INLINE X rounded(float value) { return input(narrow(value)); }

  template <class F>
  void each(int rows, int width, F row) const {
    for (int r = 0; r < rows; ++r) {
      const auto element = row(r);
      _Pragma("GCC ivdep") for (int j = 0; j < width; ++j) element(j);
    }
  }

  template <class F>
  void begin(int rows, int width, F row) const {
    each(rows, width, row);
  }

  void product(const W* w, const PanelMatrix& m, const X* x, int x_stride, int rows, const float* init, int init_stride, float* y,
               int y_stride) const {
    const PanelProduct<X, W> p = {x, w, x_stride, static_cast<int64_t>(m.k) * kPanelColumns, m.k, init, y, init_stride, y_stride};
    panel_product(p, rows, m.n / kPanelColumns);
  }

  template <class F>
  void rows(int n, F f) const {
    for (int r = 0; r < n; ++r) f(r);
  }
  static constexpr bool leader() { return true; }

  // The sums are one chain in the order of the levels: the bits of `inverse_cdf`.
  int choose(const float* logits, int levels, float u, float inverse_temperature, float& log_prob) const {
    float largest = logits[0];
    for (int i = 1; i < levels; ++i) largest = logits[i] > largest ? logits[i] : largest;
    double total = 0;
    int i = 0;
    for (; i < levels; i += kLanes) {
      float weights[kLanes];
      const int count = levels - i < kLanes ? levels - i : kLanes;
      _Pragma("GCC ivdep") for (int j = 0; j < kLanes; ++j)
          weights[j] = exp_ieee((logits[i + j] - largest) * inverse_temperature);  // logits are padded to whole panels
      for (int j = 0; j < count; ++j) sums[i + j] = total += static_cast<double>(weights[j]);
    }
    const double target = static_cast<double>(u) * total;
    int low = 0, high = levels - 1;  // the first of 0 .. levels - 2 whose sum exceeds the target, else the last level
    while (low < high) {
      const int middle = (low + high) / 2;
      if (sums[middle] <= target)
        low = middle + 1;
      else
        high = middle;
    }
    log_prob = (logits[low] - largest) * inverse_temperature - logarithm(static_cast<float>(total));
    return low;
  }
};

template <class X, class W>
void run(const PixelCNNCall& call, int64_t group) {
  double sums[kMaxLevels];
  const Thread<X, W> thread = {sums};
  PixelSampler<Thread<X, W>>(thread, call, group, call.state + group * call.state_stride + call.layout.bytes).run();
}

}  // namespace

void pixelcnn_sample(const PixelCNNCall& call, int64_t group, Type type, [[maybe_unused]] bool pairs) {
  if (type == Type::f32) return run<float, float>(call, group);
#if defined(__AVX512BF16__)
  if (pairs) return run<BFloat, BFloat>(call, group);
#endif
  run<float, BFloat>(call, group);
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
