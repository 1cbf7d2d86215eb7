// sampler_step_out and advance on the CPU: layout checks, then samples and ranges of elements over threads.
#include "genengine/sampler_step.h"

#include "cpu/elementwise.h"

namespace genengine {
namespace {

struct Operands {
  Layout layout;
  Type state, model;
  int branches, registers, copies;
};

Operands check(const Tensor& x, TensorList outputs, const Tensor& table, const Tensor& step, const OptionalTensor& history,
               const OptionalTensor& noise, const Tensor& out, const OptionalTensor& x_in) {
  const char* op = "sampler_step";
  const int64_t batch = x.size(0);
  STD_TORCH_CHECK(outputs.size() >= 1, op, ": 1 to 3 outputs expected, got none");
  // one tensor may stack the branches along the batch
  const int64_t stacked = outputs.size() == 1 ? outputs[0].size(0) / batch : 1;
  Operands o{common_layout(op, out), type_of(op, "x", x), Type::f32, static_cast<int>(outputs.size() * stacked), 0, 0};
  STD_TORCH_CHECK(o.branches >= 1 && o.branches <= kMaxBranches, op, ": 1 to 3 outputs expected, got ", o.branches);
  require_layout(op, "x", x, out, o.layout);
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), op, ": out must have x's dtype");
  o.model = type_of(op, "outputs", outputs[0]);
  for (size_t k = 0; k < outputs.size(); ++k) {
    STD_TORCH_CHECK(outputs[k].size(0) == stacked * batch, op, ": outputs must have the batch of x");
    require_samples(op, "outputs", outputs[k], out, o.layout);
    STD_TORCH_CHECK(outputs[k].scalar_type() == outputs[0].scalar_type(), op, ": outputs must share one dtype");
  }
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 3 && table.size(0) >= 1 && table.is_contiguous() &&
                      table.size(2) == kColumns && (table.size(1) == 1 || table.size(1) == batch),
                  op, ": table must be contiguous float32 (R, B or 1, 16)");
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Int && step.dim() == 1 && step.size(0) == batch && step.is_contiguous(), op,
                  ": step must be contiguous int32 (B,)");
  if (noise) {
    require_layout(op, "noise", *noise, out, o.layout);
    STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, op, ": noise must be float32");
  }
  if (history) {
    o.registers = static_cast<int>(history->size(0));
    STD_TORCH_CHECK(history->scalar_type() == ScalarType::Float && o.registers <= kMaxHistory, op,
                    ": history must be float32 (K, B, ...) with K <= 3");
    require_register_layout(op, *history, out, o.layout);
  }
  if (x_in) {
    STD_TORCH_CHECK(x_in->scalar_type() == outputs[0].scalar_type() && batch > 0 && x_in->size(0) % batch == 0, op,
                    ": x_in must be (k B, ...) in the outputs' dtype");
    o.copies = static_cast<int>(x_in->size(0) / batch);
    STD_TORCH_CHECK(o.copies <= kMaxBranches, op, ": x_in holds at most 3 copies");
    require_samples(op, "x_in", *x_in, out, o.layout);
  }
  return o;
}

void sampler_step_out(const Tensor& x, TensorList outputs, const Tensor& table, const Tensor& step, const OptionalTensor& history,
                      const OptionalTensor& seed, const OptionalTensor& sample_ids, const OptionalTensor& noise,
                      const Tensor& out, const OptionalTensor& x_in) {
  const int64_t batch = x.size(0), per = per_sample(x);
  if (batch == 0 || per == 0) return;
  const Operands o = check(x, outputs, table, step, history, noise, out, x_in);
  const Draws draws("sampler_step", seed, sample_ids, noise, batch, o.layout);
  const auto run = GENENGINE_PICK(step_range);
  const auto copy = GENENGINE_PICK(copy_range);
  const Bytes xs(x), outs(out);
  Bytes branch[kMaxBranches], xin;
  for (int k = 0; k < o.branches; ++k)
    branch[k] = outputs.size() == 1 ? Bytes(outputs[0]).from_sample(k * batch) : Bytes(outputs[k]);
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
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Int && step.is_contiguous(), "advance: step must be contiguous int32");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 3 && table.is_contiguous(),
                  "advance: table must be contiguous float32 (R, B or 1, 16)");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "advance: t must be contiguous float32");
  const int64_t batch = step.numel(), rows = table.size(0), columns_batch = table.size(1);
  if (batch == 0) return;
  STD_TORCH_CHECK(t.numel() % batch == 0, "advance: t must be (k B,)");
  int32_t* steps = step.mutable_data_ptr<int32_t>();
  const float* source = table.const_data_ptr<float>();
  float* times = t.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    if (steps[b] >= rows || ++steps[b] >= rows) continue;
    const float time = source[(steps[b] * columns_batch + b % columns_batch) * kColumns + kTModel];
    for (int64_t i = b; i < t.numel(); i += batch) times[i] = time;
  }
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("sampler_step_out", TORCH_BOX(&genengine::sampler_step_out));
  m.impl("advance", TORCH_BOX(&genengine::advance));
}
