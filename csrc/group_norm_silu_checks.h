// What the CPU and CUDA sides of group_norm_silu check and allocate alike.
#pragma once
#include "elementwise_checks.h"

namespace genengine {

// The inputs of one call, checked, dense where the kernels need them dense. x is (B, C, S), or (B, S, C) in channels_last.
struct GroupNormInputs {
  const char* op;
  int64_t batch, channels, pixels, groups;
  bool channels_last;
  bool by_pixel;  // a pixel's channels are neighbours, as they also are if there is but one pixel
  Type type, parameter_type, modulation_type;
  Tensor x;
  OptionalTensor weight, bias, scale, shift;

  GroupNormInputs(const char* name, const Tensor& x_in, const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                  const OptionalTensor& scale_in, const OptionalTensor& shift_in, int64_t num_groups, bool last)
      : op(name), groups(num_groups), channels_last(last), type(type_of(name, "x", x_in)), parameter_type(type),
        modulation_type(type), x(x_in) {
    STD_TORCH_CHECK(x.dim() == 3, op, ": x must be (B, C, S), or (B, S, C) in channels_last");
    batch = x.size(0);
    channels = x.size(last ? 2 : 1);
    pixels = x.size(last ? 1 : 2);
    by_pixel = last || (pixels == 1 && channels > 1);
    STD_TORCH_CHECK(groups > 0 && channels % groups == 0, op, ": num_groups must divide C = ", channels, ", got ", groups);
    if (!dense_from(x, 1)) x = torch::stable::contiguous(x);
    STD_TORCH_CHECK(weight_in.has_value() == bias_in.has_value(), op, ": weight and bias come together");
    STD_TORCH_CHECK(scale_in.has_value() == shift_in.has_value(), op, ": scale and shift come together");
    if (weight_in) {
      parameter_type = dtype_of_rows("weight", *weight_in);
      weight = row("weight", *weight_in, parameter_type, 1);
      bias = row("bias", *bias_in, parameter_type, 1);
    }
    if (scale_in) {
      modulation_type = dtype_of_rows("scale", *scale_in);
      scale = row("scale", *scale_in, modulation_type, 2);
      shift = row("shift", *shift_in, modulation_type, 2);
    }
  }

  bool empty() const { return batch == 0 || channels == 0 || pixels == 0; }
  Tensor like_x() const { return torch::stable::new_empty(x, {batch, x.size(1), x.size(2)}); }
  Tensor statistics() const { return torch::stable::new_empty(x, {batch, groups}, ScalarType::Float); }
  Tensor no_statistics() const { return torch::stable::new_zeros(x, {batch, groups}, ScalarType::Float); }

  Tensor dense_like_x(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == batch && t.size(1) == x.size(1) && t.size(2) == x.size(2) &&
                        t.scalar_type() == x.scalar_type(),
                    op, ": ", name, " must have x's shape and dtype");
    return dense_from(t, 1) ? t : torch::stable::contiguous(t);
  }

  Tensor given_statistics(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == batch && t.size(1) == groups && t.scalar_type() == ScalarType::Float, op, ": ",
                    name, " must be float32 (B, G) = (", batch, ", ", groups, ")");
    return torch::stable::contiguous(t);
  }

 private:
  Type dtype_of_rows(const char* name, const Tensor& t) const {
    const Type found = type_of(op, name, t);
    STD_TORCH_CHECK(found == type || found == Type::f32, op, ": ", name, " must have x's dtype or float32");
    return found;
  }
  Tensor row(const char* name, const Tensor& t, Type wanted, int64_t dims) const {
    STD_TORCH_CHECK(t.dim() == dims && t.size(dims - 1) == channels && (dims == 1 || t.size(0) == batch), op, ": ", name,
                    dims == 1 ? " must be (C) with C = " : " must be (B, C) with C = ", channels);
    STD_TORCH_CHECK(type_of(op, name, t) == wanted, op, ": ", name, " has the wrong dtype");
    return channels <= 1 || t.stride(dims - 1) == 1 ? t : torch::stable::contiguous(t);
  }
};

// The outputs of the backward; empty where there is no such input.
struct GroupNormGradients {
  Tensor dx, dweight, dbias, dscale, dshift;

  explicit GroupNormGradients(const GroupNormInputs& in)
      : dx(in.like_x()), dweight(parameter(in)), dbias(parameter(in)), dscale(modulation(in)), dshift(modulation(in)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zeroed() const {
    const auto zeros = [](Tensor t) { return torch::stable::zero_(t); };
    return {dx, zeros(dweight), zeros(dbias), zeros(dscale), zeros(dshift)};
  }

 private:
  static Tensor parameter(const GroupNormInputs& in) {
    return in.weight ? torch::stable::new_empty(*in.weight, {in.channels}) : torch::stable::new_empty(in.x, {0});
  }
  static Tensor modulation(const GroupNormInputs& in) {
    return in.scale ? torch::stable::new_empty(*in.scale, {in.batch, in.channels}) : torch::stable::new_empty(in.x, {0});
  }
};

}  // namespace genengine
