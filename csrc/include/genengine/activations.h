// Activation functions of one float with their first and second derivatives, for host and device: of bias_act and glu.
//
//   activate<A, Rounded>(u, alpha)    act(u); Rounded: for a result that is then rounded to bfloat16
//   activate_slope<A>(u, alpha)       act'(u): at the kinks of relu and lrelu the derivative from below
//   activate_curvature<A>(u, alpha)   act''(u)
//
// Branch-free, so that a loop over a tile vectorises; NaN stays NaN. FLOPs of act and act', a fused multiply-add counted as
// two: relu 1, 1; silu 22, 27; gelu 43 (Rounded 29), 46; gelu_tanh 41 (Rounded 29), 46; tanh 38, 40; sigmoid 21, 23.
//
// Both GELUs are u Phi(u) with Phi(-u) = 1 - Phi(u), so gelu(u) = relu(u) - a Q(a) with a = |u| and Q = 1 - Phi, and
// gelu'(u) = 1 - D(a) above 0, D(a) below, with D = Q - a phi. Q and D fall from 1/2 to nothing within a few units: a
// polynomial of minimax error gives them, made so that they are 1/2 at 0 and exactly 0 from `cut` on, without exponential
// or division. Errors with float32 arithmetic: Q 1.2e-7, D 1.2e-7; Rounded: a Q errs by at most 0.2 units in the last place
// of bfloat16, or 2e-6.
#pragma once
#include "genengine/functions.h"

namespace genengine {

enum class Activation : int { linear, relu, lrelu, silu, gelu, gelu_tanh, tanh, sigmoid };

// An activation as an argument's type.
template <Activation A>
struct Tag {
  static constexpr Activation kActivation = A;
};

// Whether the second derivative is anything but zero.
constexpr bool is_curved(Activation a) {
  return a != Activation::linear && a != Activation::relu && a != Activation::lrelu;
}

// c0 + c1 t + c2 t^2 + ...
GENENGINE_HD float polynomial(float, float c) { return c; }
template <class... Rest>
GENENGINE_HD float polynomial(float t, float c, Rest... rest) {
  return multiply_add(t, polynomial(t, rest...), c);
}

GENENGINE_HD float at_most(float x, float limit) { return limit < x ? limit : x; }
GENENGINE_HD float within(float x, float limit) { return at_most(-limit > x ? -limit : x, limit); }
// |x| up to the limit, also where x is NaN: compared as integers, for which there is one instruction.
GENENGINE_HD float magnitude(float x, float limit) {
  const int32_t bits = as_int(x) & 0x7fffffff, bound = as_int(limit);
  return as_float(bits < bound ? bits : bound);
}
GENENGINE_HD float rectified(float u) { return u < 0.f ? 0.f : u; }

// s(u) and 1 - s(u), neither by cancellation.
struct Logistic {
  float value, rest;
  GENENGINE_HD_MEMBER explicit Logistic(float u) {
    const float e = exponential_within(-u);
    value = 1.f / (1.f + e);
    rest = e * value;
  }
};

// ---- GELU ------------------------------------------------------------------------------------------------------------

// (cut - b) (1 / (2 cut) + b p(b - centre)): 1/2 at 0, nothing at cut
template <class... Coefficients>
GENENGINE_HD float falling(float b, float cut, float centre, Coefficients... coefficients) {
  return (cut - b) * multiply_add(b, polynomial(b - centre, coefficients...), 0.5f / cut);
}

GENENGINE_HD float gelu(float u) {
  const float b = magnitude(u, 5.5f);
  const float tail = falling(b, 5.5f, 2.5f, -0.0355356745f, 0.0121531496f, -0.00262702489f, -0.000249378296f, 0.000457902846f,
                             -0.000152756751f, 2.36198161e-06f, 1.46639295e-05f, -4.03776676e-06f, -2.80173879e-07f,
                             3.28923534e-07f, -3.54615111e-08f, -9.32456601e-09f, 2.08842499e-09f, -6.17801713e-11f,
                             -3.55134563e-12f);
  return multiply_add(-b, tail, rectified(u));
}

GENENGINE_HD float gelu_rounded(float u) {
  const float b = magnitude(u, 5.f);
  const float tail = falling(b, 5.f, 2.f, -0.0462056436f, 0.0153595442f, -0.00127125648f, -0.00168209628f, 0.000793649349f,
                             -6.68588327e-05f, -5.0510349e-05f, 1.65157708e-05f, -1.57778254e-06f);
  return multiply_add(-b, tail, rectified(u));
}

GENENGINE_HD float gelu_tanh(float u) {
  const float b = magnitude(u, 5.25f);
  const float tail = falling(b, 5.25f, 2.5f, -0.0372176096f, 0.0126470141f, -0.00263163145f, -0.000312546792f, 0.000464007288f,
                             -0.000142406905f, 2.95579457e-06f, 1.14110471e-05f, -3.73908824e-06f, 2.48040209e-07f,
                             2.27214628e-07f, -7.73002498e-08f, 1.34761147e-09f, 3.39301831e-09f, -4.60772615e-10f);
  return multiply_add(-b, tail, rectified(u));
}

GENENGINE_HD float gelu_tanh_rounded(float u) {
  const float b = magnitude(u, 4.75f);
  const float tail = falling(b, 4.75f, 2.f, -0.0485020913f, 0.0158515535f, -0.00113081117f, -0.00176616933f, 0.000784514588f,
                             -5.9220667e-05f, -4.78028232e-05f, 1.47301662e-05f, -1.33399953e-06f);
  return multiply_add(-b, tail, rectified(u));
}

// gelu'(u) from gelu'(-|u|)
GENENGINE_HD float mirrored(float u, float below) { return u > 0.f ? 1.f - below : u <= 0.f ? below : u; }

GENENGINE_HD float gelu_slope(float u) {
  const float b = magnitude(u, 6.f);
  const float below = falling(b, 6.f, 2.5f, -0.0376317427f, 0.0223383028f, -0.0124878641f, 0.00375078409f, 0.000583166489f,
                              -0.000975775591f, 0.00029259242f, 3.39089747e-05f, -4.4509623e-05f, 7.75710487e-06f,
                              2.39858582e-06f, -1.10745702e-06f, 2.38248852e-08f, 6.29080716e-08f, -1.01691171e-08f,
                              -1.0960215e-09f, 4.28352159e-10f, -3.20206778e-11f);
  return mirrored(u, below);
}

GENENGINE_HD float gelu_tanh_slope(float u) {
  const float b = magnitude(u, 5.5f);
  const float below = falling(b, 5.5f, 2.5f, -0.0414238498f, 0.0250488892f, -0.0137331998f, 0.00367170852f, 0.000839962449f,
                              -0.000965792686f, 0.000239977264f, 2.316063e-05f, -2.8043858e-05f, 8.37231983e-06f,
                              -8.64110916e-07f, -7.98321423e-07f, 3.92075151e-07f, -1.32907396e-09f, -3.28033849e-08f,
                              4.02618117e-09f, 1.02165476e-09f, -1.87279525e-10f);
  return mirrored(u, below);
}

// phi(u) (2 - u^2)
GENENGINE_HD float gelu_curvature(float u) {
  const float z = at_most(u * u, 170.f);
  return 0.398942280f * exponential_within(-0.5f * z) * (2.f - z);
}

// u s(v) with v = sqrt(8 / pi) (u + 0.044715 u^3), s the sigmoid: 2 s' v' + u (s'' v'^2 + s' v'')
GENENGINE_HD float gelu_tanh_curvature(float u) {
  const float b = within(u, 8.f), z = b * b;
  const float v = b * multiply_add(z, 0.0713548163f, 1.59576912f), dv = multiply_add(z, 0.214064449f, 1.59576912f);
  const Logistic s(v);
  return s.value * s.rest * multiply_add(b, multiply_add(dv * dv, s.rest - s.value, 0.428128898f * b), 2.f * dv);
}

// ---- every activation ------------------------------------------------------------------------------------------------

template <Activation A, bool Rounded = false>
GENENGINE_HD float activate(float u, [[maybe_unused]] float alpha) {
  if constexpr (A == Activation::relu) return rectified(u);
  if constexpr (A == Activation::lrelu) return u < 0.f ? alpha * u : u;
  if constexpr (A == Activation::silu) return u / (1.f + exponential_within(-u));
  if constexpr (A == Activation::gelu) return Rounded ? gelu_rounded(u) : gelu(u);
  if constexpr (A == Activation::gelu_tanh) return Rounded ? gelu_tanh_rounded(u) : gelu_tanh(u);
  if constexpr (A == Activation::tanh) return hyperbolic_tangent(u);
  if constexpr (A == Activation::sigmoid) return sigmoid(u);
  return u;
}

template <Activation A>
GENENGINE_HD float activate_slope([[maybe_unused]] float u, [[maybe_unused]] float alpha) {
  if constexpr (A == Activation::relu) return u <= 0.f ? 0.f : 1.f;
  if constexpr (A == Activation::lrelu) return u <= 0.f ? alpha : 1.f;
  if constexpr (A == Activation::silu) {
    const Logistic s(within(u, 87.f));
    return multiply_add(within(u, 87.f) * s.value, s.rest, s.value);
  }
  if constexpr (A == Activation::gelu) return gelu_slope(u);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh_slope(u);
  if constexpr (A == Activation::tanh) {
    const float t = hyperbolic_tangent(u);
    return multiply_add(-t, t, 1.f);
  }
  if constexpr (A == Activation::sigmoid) {
    const Logistic s(u);
    return s.value * s.rest;
  }
  return 1.f;
}

template <Activation A>
GENENGINE_HD float activate_curvature([[maybe_unused]] float u, [[maybe_unused]] float alpha) {
  if constexpr (A == Activation::silu) {
    const float b = within(u, 87.f);
    const Logistic s(b);
    return s.value * s.rest * multiply_add(b, s.rest - s.value, 2.f);
  }
  if constexpr (A == Activation::gelu) return gelu_curvature(u);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh_curvature(u);
  if constexpr (A == Activation::tanh) {
    const float t = hyperbolic_tangent(u);
    return -2.f * t * multiply_add(-t, t, 1.f);
  }
  if constexpr (A == Activation::sigmoid) {
    const Logistic s(u);
    return s.value * s.rest * (s.rest - s.value);
  }
  return 0.f;
}

}  // namespace genengine
