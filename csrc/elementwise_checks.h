// What the CPU and CUDA sides of sampler_step and diffuse check alike: sample layouts, dtypes, shapes; and the same words.
#pragma once
#include "torch_api.h"
#include "genengine/sampler_step.h"
#include "genengine/types.h"

namespace genengine {

// Samples dense in C order (channels == 1), or dense channels_last.
struct Layout {
  int64_t channels = 1, pixels = 0;
};

inline bool channels_last_samples(const Tensor& x, int64_t first_dim) {
  if (x.dim() != first_dim + 3) return false;
  const int64_t channels = x.size(first_dim), height = x.size(first_dim + 1), width = x.size(first_dim + 2);
  const auto fits = [&](int64_t d, int64_t stride) { return x.size(d) == 1 || x.stride(d) == stride; };
  return fits(first_dim, 1) && fits(first_dim + 1, width * channels) && fits(first_dim + 2, channels) && height * width > 0;
}

inline bool dense_from(const Tensor& x, int64_t first_dim) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= first_dim; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Layout common_layout(const char* op, const Tensor& out) {
  if (dense_from(out, 1)) return {};
  STD_TORCH_CHECK(channels_last_samples(out, 1), op, ": samples of out must be dense, in C order or channels_last");
  return {out.size(1), out.size(2) * out.size(3)};
}

inline void require_samples(const char* op, const char* name, const Tensor& x, const Tensor& out, const Layout& layout) {
  bool same = x.dim() == out.dim();
  for (int64_t d = 1; same && d < x.dim(); ++d) same = x.size(d) == out.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have samples shaped like x's");
  STD_TORCH_CHECK(layout.channels == 1 ? dense_from(x, 1) : channels_last_samples(x, 1), op, ": ", name,
                  " must be laid out like out");
}

inline void require_layout(const char* op, const char* name, const Tensor& x, const Tensor& out, const Layout& layout) {
  STD_TORCH_CHECK(x.dim() == out.dim() && x.size(0) == out.size(0), op, ": ", name, " must have the shape of x");
  require_samples(op, name, x, out, layout);
}

inline void require_register_layout(const char* op, const Tensor& history, const Tensor& out, const Layout& layout) {
  bool same = history.dim() == out.dim() + 1;
  for (int64_t d = 0; same && d < out.dim(); ++d) same = history.size(d + 1) == out.size(d);
  STD_TORCH_CHECK(same && (layout.channels == 1 ? dense_from(history, 2) : channels_last_samples(history, 2)), op,
                  ": history must be (K, ...) of out's shape and layout");
}

inline Type type_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16");
  return Type::f32;
}

inline void require_seed(const char* op, const Tensor& seed, int64_t batch) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && (seed.numel() == 1 || seed.numel() == batch), op,
                  ": seed must be int64, () or (B,)");
}

inline void require_sample_ids(const char* op, const OptionalTensor& ids, int64_t batch) {
  STD_TORCH_CHECK(!ids || (ids->scalar_type() == ScalarType::Long && ids->dim() == 1 && ids->size(0) == batch), op,
                  ": sample_ids must be int64 (B,)");
}

struct StepOperands {
  Layout layout;
  Type state, model;
  int branches, registers, copies;
};

// For batch > 0.
inline StepOperands check_sampler_step(const Tensor& x, TensorList outputs, const Tensor& table, const Tensor& step,
                                       const OptionalTensor& history, const OptionalTensor& noise,
                                       const OptionalTensor& variance, const Tensor& out, const OptionalTensor& x_in) {
  const char* op = "sampler_step";
  const int64_t batch = x.size(0);
  STD_TORCH_CHECK(outputs.size() >= 1, op, ": 1 to 3 outputs expected, got none");
  // one tensor may stack the branches along the batch
  const int64_t stacked = outputs.size() == 1 ? outputs[0].size(0) / batch : 1;
  StepOperands o{common_layout(op, out), type_of(op, "x", x), Type::f32, static_cast<int>(outputs.size() * stacked), 0, 0};
  STD_TORCH_CHECK(o.branches >= 1 && o.branches <= kMaxBranches, op, ": 1 to 3 outputs expected, got ", o.branches);
  require_layout(op, "x", x, out, o.layout);
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), op, ": out must have x's dtype");
  o.model = type_of(op, "outputs", outputs[0]);
  for (size_t k = 0; k < outputs.size(); ++k) {
    STD_TORCH_CHECK(outputs[k].size(0) == stacked * batch, op, ": outputs must have the batch of x");
    require_samples(op, "outputs", outputs[k], out, o.layout);
    STD_TORCH_CHECK(outputs[k].scalar_type() == outputs[0].scalar_type(), op, ": outputs must share one dtype");
  }
  STD_TORCH_CHECK(o.model == o.state || o.state == Type::f32, op,
                  ": outputs must have x's dtype, or be 16-bit beside a float32 x");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 3 && table.size(0) >= 1 && table.is_contiguous() &&
                      table.size(2) == kColumns && (table.size(1) == 1 || table.size(1) == batch),
                  op, ": table must be contiguous float32 (R, B or 1, 16)");
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Int && step.dim() == 1 && step.size(0) == batch && step.is_contiguous(), op,
                  ": step must be contiguous int32 (B,)");
  if (noise) {
    require_layout(op, "noise", *noise, out, o.layout);
    STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, op, ": noise must be float32");
  }
  if (variance) {
    require_layout(op, "variance", *variance, out, o.layout);
    STD_TORCH_CHECK(variance->scalar_type() == outputs[0].scalar_type(), op, ": variance must have the outputs' dtype");
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

struct AdvanceOperands {
  int64_t batch, rows, columns_batch, copies;
};

inline AdvanceOperands check_advance(const Tensor& step, const Tensor& table, const Tensor& t) {
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Int && step.is_contiguous(), "advance: step must be contiguous int32");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 3 && table.is_contiguous(),
                  "advance: table must be contiguous float32 (R, B or 1, 16)");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "advance: t must be contiguous float32");
  const int64_t batch = step.numel();
  STD_TORCH_CHECK(batch == 0 || t.numel() % batch == 0, "advance: t must be (k B,)");
  return {batch, table.size(0), table.size(1), batch == 0 ? 0 : t.numel() / batch};
}

inline const float* diffuse_coefficient(const char* name, const Tensor& value, int64_t batch) {
  STD_TORCH_CHECK(value.scalar_type() == ScalarType::Float && value.dim() == 1 && value.size(0) == batch && value.is_contiguous(),
                  "diffuse: ", name, " must be contiguous float32 (B,)");
  return value.const_data_ptr<float>();
}

}  // namespace genengine
