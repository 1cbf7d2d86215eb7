// pixelcnn_sample on one thread: a group of images, its products in register tiles, its gates and draws in vectors.
#include "cpu/pixelcnn_sample_loops.h"

#include "cpu/isa/level_draws.h"
#include "cpu/isa/panel_products.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// W: stored weights and activations. X: what products read of the latter.
template <class X, class W>
struct Thread {
  using Weight = W;
  using Input = X;
  static constexpr int kPad = 0, kVector = kLanes;
  const Sigmoid<false> sigmoid;
  double* sums;  // level_draw_sums(kMaxLevels)

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

  static GENENGINE_INLINE Lanes load(const float* from) { return GENENGINE_ISA::load(from); }
  static GENENGINE_INLINE void store(float* to, Lanes value) { GENENGINE_ISA::store(to, value); }
  static GENENGINE_INLINE void keep(W* to, Lanes value) { GENENGINE_ISA::store(to, value); }
  static GENENGINE_INLINE void feed(W* to, Lanes value) { keep(to, value); }
  template <class Wide>  // where products read float, it holds what W can
  static GENENGINE_INLINE void feed(Wide* to, Lanes value) {
    W rounded[kLanes];
    keep(rounded, value);
    GENENGINE_ISA::store(to, GENENGINE_ISA::load(rounded));
  }

  static GENENGINE_INLINE Lanes positive(Lanes a) { return GENENGINE_ISA::at_least(a, 0.f); }  // NaN stays NaN
  // tanh(a) sigmoid(b) = (2 - d) / (d e) with d = 1 + e^-2a, e = 1 + e^-b; at the bounds both factors have reached their
  // limits, to 1e-17.
  GENENGINE_INLINE Lanes gate(Lanes a, Lanes b) const {
    const Lanes d = sigmoid.one_plus_exp_minus(2.f * GENENGINE_ISA::at_least(a, -20.f));
    return (2.f - d) * reciprocal(d * sigmoid.one_plus_exp_minus(GENENGINE_ISA::at_least(b, -40.f)));
  }

  template <class F>
  void each(int rows, int width, F row, int step = 1) const {
    for (int r = 0; r < rows; ++r) {
      const auto element = row(r);
      if (step == 1) {
        _Pragma("GCC ivdep") for (int j = 0; j < width; ++j) element(j);
      } else {
        for (int j = 0; j < width; j += kVector) element(j);
      }
    }
  }
  template <class F>
  void begin(int rows, int width, F row, int step = 1) const {
    each(rows, width, row, step);
  }
  template <class F>
  void each(int outer, int inner, int width, F row, int step = 1) const {
    for (int i = 0; i < outer; ++i) each(inner, width, [=](int k) { return row(i, k); }, step);
  }
  template <class F>
  void begin(int outer, int inner, int width, F row, int step = 1) const {
    each(outer, inner, width, row, step);
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
  template <class P, class F>
  void add_up(int n, P part, F write) const {
    for (int r = 0; r < n; ++r) write(r, part(r, 0, 1));
  }

  template <class U, class F>
  void draw(int n, const float* logits, int stride, int levels, float inverse_temperature, U uniform, F write) const {
    LevelDraws{sums, kMaxLevels, levels, inverse_temperature}.draw(n, logits, stride, uniform, write);
  }
};

template <class X, class W>
void run(const PixelCNNCall& call, int64_t group) {
  double sums[level_draw_sums(kMaxLevels)];
  const Thread<X, W> thread = {{}, sums};
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
