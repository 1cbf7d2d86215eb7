// sampler_step_out and advance on CUDA. One thread takes four or eight elements (one or two quads of noise) of samples
// dense in C order; channels_last, odd and unaligned samples go by scattered quads.
//
// Bytes and FLOPs: genengine/sampler_step.h. The row is read on the device, by every thread from the L1 cache: no host
// sync, one captured launch serves every step, and each sample may stand at a row of its own. Every load is issued before
// the first store, so that `out` may be x, and x_in an output. Accumulates in float32, left to right.
#include "cuda/launch.h"

namespace genengine {

constexpr uint32_t kStepStream = 1;

struct StepArguments {
  Samples x, outputs[kMaxBranches], variance, out, x_in;
  const float* table;
  const int32_t* step;
  float* history;
  int64_t register_stride, history_stride;
  Noise noise;
  Layout layout;
  int64_t batch, per, rows, columns_batch;
  int branches, registers, copies;
};

// The coefficients of one sample's row, and what they make unnecessary.
template <int Registers>
struct Row {
  float g1, g2, p, q, r, a, b, c, s, l, c_in, h[Registers + 1];
  int flags, registers;
  bool need_x, need_m, need_y;

  __device__ __forceinline__ Row(const StepArguments& step, int32_t index, int64_t sample) : registers(step.registers) {
    const float* row = step.table + (index * step.columns_batch + (step.columns_batch == 1 ? 0 : sample)) * kColumns;
    g1 = step.branches > 1 ? row[kG1] : 0.f;
    g2 = step.branches > 2 ? row[kG2] : 0.f;
    p = row[kP], q = row[kQ], r = row[kR];
    a = row[kA], b = row[kB], c = row[kC], s = row[kS], l = row[kL], c_in = row[kCIn];
    flags = static_cast<int>(row[kFlags]);
    bool writes_x = false;
    need_y = c != 0.f;
#pragma unroll
    for (int j = 0; j < Registers; ++j) {
      h[j] = j < registers ? row[kH1 + j] : 0.f;
      need_y |= write(j) == Write::y;
      writes_x |= write(j) == Write::x;
    }
    need_x = a != 0.f || writes_x || (need_y && p != 0.f);
    need_m = b != 0.f || (need_y && q != 0.f);
  }
  __device__ __forceinline__ Write write(int j) const { return j < registers ? write_of(flags, j) : Write::keep; }
};

// m + g (o_k - o_k-1)
template <class Access, class Raw, int N>
__device__ __forceinline__ void add_difference(float g, const Raw& output, const Raw& previous, float (&m)[N]) {
  float next[N], last[N];
  Access::convert(output, next);
  Access::convert(previous, last);
#pragma unroll
  for (int i = 0; i < N; ++i) m[i] = m[i] + term(g, next[i] - last[i]);
}

// y = phi(p x + q m); identity is a clamp to infinity.
template <int Registers, int N>
__device__ __forceinline__ void predict(const Row<Registers>& row, const float (&x)[N], const float (&m)[N], float (&y)[N]) {
  const Phi phi = phi_of(row.flags);
  const float r = phi == Phi::identity ? as_float(0x7f800000) : row.r;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = apply_phi(term(row.p, x[i]) + term(row.q, m[i]), Phi::clamp, r);
  if (phi != Phi::threshold) return;
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = y[i] / r;
}

// z <- exp(l v) z, where the row has l.
template <class Model, class Access, int N>
__device__ __forceinline__ void spread_noise(const Samples& variance, float l, int64_t b, const Access& at, float (&z)[N]) {
  if (l == 0.f) return;
  float v[N];
  load(at, variance.at<const Model>(b), v);
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] = spread(l, v[i], z[i]);
}

// Registers: how many may exist; s.registers of them do. Learned: with v, whose kernels are their own because it costs
// registers.
template <class State, class Model, bool Drawn, bool Learned, int Registers, class Access>
__device__ __forceinline__ void step_elements(const StepArguments& s, int64_t b, const Access& at) {
  constexpr int N = Access::kElements;
  float x[N], m[N], y[N] = {}, z[N] = {}, value[N];
  const int32_t index = s.step[b];
  if (index < 0 || index >= s.rows) {  // finished
    load(at, s.x.at<const State>(b), x);
    at.store(s.out.at<State>(b), x);
    return;
  }
  const Row<Registers> row(s, index, b);
  float* registers = s.history + b * s.history_stride;

  const auto raw_x = at.fetch(s.x.at<const State>(b), row.need_x);
  const auto raw_0 = at.fetch(s.outputs[0].at<const Model>(b), row.need_m);
  const auto raw_1 = at.fetch(s.outputs[1].at<const Model>(b), row.need_m && (row.g1 != 0.f || row.g2 != 0.f));
  const auto raw_2 = at.fetch(s.outputs[2].at<const Model>(b), row.need_m && row.g2 != 0.f);
  float h[Registers + 1][N];
#pragma unroll
  for (int j = 0; j < Registers; ++j)
    Access::convert(at.fetch(registers + j * s.register_stride, row.h[j] != 0.f), h[j]);
  const bool noisy = Drawn || s.noise.given.base != nullptr;
  if (noisy && row.s != 0.f) {
    load_noise<Drawn>(s.noise, b, static_cast<uint32_t>(index), kStepStream, at, z);
    if constexpr (Learned) spread_noise<Model>(s.variance, row.l, b, at, z);
  }

  Access::convert(raw_x, x);
  Access::convert(raw_0, m);
  if (s.branches > 1) add_difference<Access>(row.g1, raw_1, raw_0, m);
  if (s.branches > 2) add_difference<Access>(row.g2, raw_2, raw_1, m);
  if (row.need_y) predict(row, x, m, y);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    value[i] = (term(row.a, x[i]) + term(row.b, m[i])) + term(row.c, y[i]);
#pragma unroll
    for (int j = 0; j < Registers; ++j)
      if (j < s.registers) value[i] = value[i] + term(row.h[j], h[j][i]);
    if (noisy) value[i] = value[i] + term(row.s, z[i]);
  }

#pragma unroll
  for (int j = 0; j < Registers; ++j) {
    const Write write = row.write(j);
    if (write != Write::y && write != Write::x) continue;
    float kept[N];
#pragma unroll
    for (int i = 0; i < N; ++i) kept[i] = write == Write::y ? y[i] : x[i];
    at.store(registers + j * s.register_stride, kept);
  }
  at.store(s.out.at<State>(b), value);
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = row.c_in * value[i];
#pragma unroll 1
  for (int k = 0; k < s.copies; ++k) at.store(s.x_in.at<Model>(k * s.batch + b), value);
}

// Elements per thread: 16 bytes of the outputs, than which the state is never narrower; with registers, which are float32
// and many, one quad.
template <class Model, int Registers>
constexpr int kWidth = Registers == 0 ? 16 / sizeof(Model) : 4;

template <class State, class Model, bool Drawn, bool Learned, int Registers>
__global__ void GENENGINE_BOUNDS sampler_step_vectorised(const __grid_constant__ StepArguments s) {
  const Wide<kWidth<Model, Registers>> at(item_index());
  if (at.first >= s.per) return;
  for (int64_t b = first_sample(); b < s.batch; b += sample_stride())
    step_elements<State, Model, Drawn, Learned, Registers>(s, b, at);
}

template <class State, class Model, bool Drawn, bool Learned>
__global__ void GENENGINE_BOUNDS sampler_step_scattered(const __grid_constant__ StepArguments s) {
  if (4 * item_index() >= s.per) return;
  const Scattered at(item_index(), s.per, s.layout);
  for (int64_t b = first_sample(); b < s.batch; b += sample_stride())
    step_elements<State, Model, Drawn, Learned, kMaxHistory>(s, b, at);
}

__global__ void advance_steps(int32_t* step, const float* table, float* t, AdvanceOperands o) {
  const int64_t b = item_index();
  if (b >= o.batch) return;
  const int32_t old = step[b];
  if (old < 0 || old >= o.rows) return;
  step[b] = old + 1;
  if (old + 1 >= o.rows) return;
  const float time = table[((old + 1) * o.columns_batch + b % o.columns_batch) * kColumns + kTModel];
  for (int64_t k = 0; k < o.copies; ++k) t[k * o.batch + b] = time;
}

namespace {

template <class State, class Model, bool Drawn, bool Learned, int Registers>
void launch(const Launcher& launcher, const StepArguments& s, bool wide) {
  constexpr int64_t kElements = kWidth<Model, Registers>;
  if (wide && s.per % kElements == 0)
    return launcher.run<sampler_step_vectorised<State, Model, Drawn, Learned, Registers>>(
        grid_over(s.per / kElements, s.batch), s);
  require_countable("sampler_step", s.per);
  launcher.run<sampler_step_scattered<State, Model, Drawn, Learned>>(grid_over((s.per + 3) / 4, s.batch), s);
}

template <class State, class Model, bool Drawn, bool Learned>
void launch(const Launcher& launcher, const StepArguments& s, bool wide) {
  if (s.registers == 0) return launch<State, Model, Drawn, Learned, 0>(launcher, s, wide);
  if constexpr (!Learned)
    if (s.registers == 1) return launch<State, Model, Drawn, Learned, 1>(launcher, s, wide);
  launch<State, Model, Drawn, Learned, kMaxHistory>(launcher, s, wide);
}

template <class State, class Model>
void launch(const Launcher& launcher, const StepArguments& s, bool wide) {
  const bool drawn = s.noise.drawn();
  if (s.variance.base)
    drawn ? launch<State, Model, true, true>(launcher, s, wide) : launch<State, Model, false, true>(launcher, s, wide);
  else
    drawn ? launch<State, Model, true, false>(launcher, s, wide) : launch<State, Model, false, false>(launcher, s, wide);
}

void launch(const Launcher& launcher, const StepArguments& s, const StepOperands& o, bool wide) {
  with_type(o.model, [&](auto tag) {
    using Model = typename decltype(tag)::type;
    o.state == o.model ? launch<Model, Model>(launcher, s, wide) : launch<float, Model>(launcher, s, wide);
  });
}

// Registers start on 16-byte boundaries, like the samples of the other operands.
bool aligned_registers(const OptionalTensor& history) {
  if (!history) return true;
  return reinterpret_cast<uintptr_t>(history->data_ptr()) % 16 == 0 && (history->size(0) < 2 || history->stride(0) % 4 == 0) &&
         (history->size(1) < 2 || history->stride(1) % 4 == 0);
}

void sampler_step_out(const Tensor& x, TensorList outputs, const Tensor& table, const Tensor& step,
                      const OptionalTensor& history, const OptionalTensor& seed, const OptionalTensor& sample_ids,
                      const OptionalTensor& noise, const OptionalTensor& variance, const Tensor& out,
                      const OptionalTensor& x_in) {
  StepArguments s{};
  s.batch = x.size(0);
  s.per = per_sample(x);
  if (s.batch == 0 || s.per == 0) return;
  const StepOperands o = check_sampler_step(x, outputs, table, step, history, noise, variance, out, x_in);
  const Launcher launcher("sampler_step", out);
  launcher.require_here("x", x);
  launcher.require_here("table", table);
  launcher.require_here("step", step);
  launcher.require_here("history", history);
  launcher.require_here("variance", variance);
  launcher.require_here("x_in", x_in);
  bool wide = o.layout.channels == 1 && aligned_samples(x) && aligned_samples(out) && aligned_samples(x_in) &&
              aligned_samples(noise) && aligned_samples(variance) && aligned_registers(history);
  s.layout = o.layout;
  s.branches = o.branches, s.registers = o.registers, s.copies = o.copies;
  for (int k = 0; k < o.branches; ++k) {
    const bool stacked = outputs.size() == 1;
    const Tensor& output = outputs[stacked ? 0 : k];
    launcher.require_here("outputs", output);
    s.outputs[k] = Samples(output, stacked ? k * s.batch : 0);
    wide = wide && aligned_samples(output);
  }
  s.x = Samples(x);
  s.out = Samples(out);
  if (variance) s.variance = Samples(*variance);
  if (x_in) s.x_in = Samples(*x_in);
  s.table = table.const_data_ptr<float>();
  s.rows = table.size(0);
  s.columns_batch = table.size(1);
  s.step = step.const_data_ptr<int32_t>();
  if (history) {
    s.history = history->mutable_data_ptr<float>();
    s.register_stride = history->stride(0);
    s.history_stride = s.batch > 1 ? history->stride(1) : 0;
  }
  s.noise = Noise(launcher, "sampler_step", seed, sample_ids, noise, s.batch);
  launch(launcher, s, o, wide);
}

void advance(const Tensor& step, const Tensor& table, const Tensor& t) {
  const AdvanceOperands o = check_advance(step, table, t);
  if (o.batch == 0) return;
  const Launcher launcher("advance", step);
  launcher.require_here("table", table);
  launcher.require_here("t", t);
  launcher.run<advance_steps>(grid_over(o.batch), step.mutable_data_ptr<int32_t>(), table.const_data_ptr<float>(),
                              t.mutable_data_ptr<float>(), o);
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("sampler_step_out", TORCH_BOX(&genengine::sampler_step_out));
  m.impl("advance", TORCH_BOX(&genengine::advance));
}
