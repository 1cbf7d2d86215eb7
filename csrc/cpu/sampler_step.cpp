// sampler_step_out and advance on the CPU: layout checks, then samples and ranges of elements over threads.
#include "cpu/elementwise.h"

namespace genengine {
namespace {

void sampler_step_out(const Tensor& x, TensorList outputs, const Tensor& table, const Tensor& step, const OptionalTensor& history,
                      const OptionalTensor& seed, const OptionalTensor& sample_ids, const OptionalTensor& noise,
                      const OptionalTensor& variance, const Tensor& out, const OptionalTensor& x_in) {
  const int64_t batch = x.size(0), per = per_sample(x);
  if (batch == 0 || per == 0) return;
  const StepOperands o = check_sampler_step(x, outputs, table, step, history, noise, variance, out, x_in);
  const Draws draws("sampler_step", seed, sample_ids, noise, batch, o.layout);
  const auto run = GENENGINE_PICK(step_range);
  const auto copy = GENENGINE_PICK(copy_range);
  const Bytes xs(x), outs(out);
  Bytes branch[kMaxBranches], v, xin;
  for (int k = 0; k < o.branches; ++k)
    branch[k] = outputs.size() == 1 ? Bytes(outputs[0]).from_sample(k * batch) : Bytes(outputs[k]);
  if (variance) v = Bytes(*variance);
  if (x_in) xin = Bytes(*x_in);
  float* registers = history ? history->mutable_data_ptr<float>() : nullptr;
  const int64_t register_stride = history ? history->stride(0) : 0;
  const int64_t sample_stride = history && batch > 1 ? history->stride(1) : 0;
  const float* rows = table.const_data_ptr<float>();
  const int32_t* steps = step.const_data_ptr<int32_t>();
  const int64_t count = table.size(0), columns_batch = table.size(1);
  const bool stream = should_stream(outs, batch * per, 1) || should_stream(xin, batch * per, o.copies);
  for_ranges(batch, per, [=](int64_t b, int64_t first, int64_t n) {
    if (steps[b] < 0 || steps[b] >= count) return copy(xs.sample(b), outs.sample(b), o.state, first, n);
    StepSample s{};
    s.row = rows + (steps[b] * columns_batch + (columns_batch == 1 ? 0 : b)) * kColumns;
    s.x = xs.sample(b);
    for (int k = 0; k < o.branches; ++k) s.outputs[k] = branch[k].sample(b);
    s.branches = o.branches;
    for (int k = 0; k < o.registers; ++k) s.history[k] = registers + k * register_stride + b * sample_stride;
    s.registers = o.registers;
    s.noise = draws.source(b, static_cast<uint32_t>(steps[b]), 1);
    s.variance = v.base ? v.sample(b) : nullptr;
    s.out = outs.sample(b);
    for (int k = 0; k < o.copies; ++k) s.x_in[k] = xin.sample(k * batch + b);
    s.copies = o.copies;
    s.state = o.state;
    s.model = o.model;
    s.stream = stream;
    run(s, first, n);
  });
}

void advance(const Tensor& step, const Tensor& table, const Tensor& t) {
  const auto [batch, rows, columns_batch, copies] = check_advance(step, table, t);
  int32_t* steps = step.mutable_data_ptr<int32_t>();
  const float* source = table.const_data_ptr<float>();
  float* times = t.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    if (steps[b] < 0 || steps[b] >= rows || ++steps[b] >= rows) continue;
    const float time = source[(steps[b] * columns_batch + b % columns_batch) * kColumns + kTModel];
    for (int64_t k = 0; k < copies; ++k) times[k * batch + b] = time;
  }
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("sampler_step_out", TORCH_BOX(&genengine::sampler_step_out));
  m.impl("advance", TORCH_BOX(&genengine::advance));
}
