// Activation functions of one float with their first and second derivatives, for host and device: of bias_act and glu.
//
//   activate<A, Rounded>(u, alpha)    act(u); Rounded: for a result that is then rounded to 16 bits
//   activate_slope<A>(u, alpha)       act'(u): 0 at the kink of relu, alpha at that of lrelu
//   activate_curvature<A>(u, alpha)   act''(u)
//
// Branch-free, so that a loop over a tile vectorises; NaN stays NaN. FLOPs of act and act', a fused multiply-add counted as
// two: relu 1, 1; silu 25, 29; gelu 40 (Rounded 32), 43; gelu_tanh 38 (Rounded 32), 43; tanh 30, 32; sigmoid 24, 26.
//
// Both GELUs are u Phi(u) with Phi(-u) = 1 - Phi(u), so gelu(u) = relu(u) - a Q(a) with a = |u| and Q = 1 - Phi, and
// gelu'(u) = 1 - D(a) above 0, D(a) below, with D = Q - a phi. Q and D fall from 1/2 to nothing within a few units: they
// are (cut - a) times a minimax polynomial in a - centre, exactly 0 from `cut` on, without exponential or division.
// Errors of Q: 1.4e-7, of D 2.7e-7; Rounded 1.4e-6.
#pragma once
#include "genengine/functions.h"

namespace genengine {

enum class Activation : int { linear, relu, lrelu, silu, gelu, gelu_tanh, tanh, sigmoid };

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
GENENGINE_HD float rectified(float u) { return u < 0.f ? 0.f : u; }

// ---- GELU: the upper tail of its distribution function, times a ------------------------------------------------------

GENENGINE_HD float gelu_tail(float a) {
  const float b = at_most(a, 5.5f);
  const float r = polynomial(b - 2.f, 0.00650002295f, -0.01356884f, 0.0115494644f, -0.00441322522f, 2.36288924e-05f,
                             0.000649873225f, -0.000198790309f, -2.37406202e-05f, 2.54522802e-05f, -2.85366104e-06f,
                             -1.46441641e-06f, 4.20859209e-07f, 1.32443665e-08f, -1.89826928e-08f, 2.5162179e-09f,
                             -9.16549059e-11f, 5.90420508e-13f);
  return b * ((5.5f - b) * r);
}

GENENGINE_HD float gelu_tail_rounded(float a) {
  const float b = at_most(a, 5.f);
  const float r = polynomial(b - 2.f, 0.00758316461f, -0.0154691739f, 0.0128441798f, -0.004718896f, -8.25454335e-05f,
                             0.000727613573f, -0.000198908834f, -3.25862238e-05f, 2.43497871e-05f, -1.52962082e-06f,
                             -1.09546863e-06f, 1.83485028e-07f, -1.24595889e-09f);
  return b * ((5.f - b) * r);
}

GENENGINE_HD float gelu_tanh_tail(float a) {
  const float b = at_most(a, 5.25f);
  const float r = polynomial(b - 2.f, 0.00698497007f, -0.0145892454f, 0.0121783279f, -0.00443993974f, -4.28180465e-05f,
                             0.000633590389f, -0.000188954727f, -1.43194111e-05f, 2.20137335e-05f, -4.4517592e-06f,
                             -7.52872438e-07f, 5.30607281e-07f, -6.19665528e-08f, -1.80457427e-08f, 5.81236481e-09f,
                             -4.752021e-10f);
  return b * ((5.25f - b) * r);
}

GENENGINE_HD float gelu_tanh_tail_rounded(float a) {
  const float b = at_most(a, 5.f);
  const float r = polynomial(b - 2.f, 0.00756695634f, -0.0156106651f, 0.0128542669f, -0.00458733877f, -9.9179415e-05f,
                             0.000673290982f, -0.000188959311f, -2.04130556e-05f, 2.16587559e-05f, -3.00079955e-06f,
                             -7.32889248e-07f, 2.60144304e-07f, -2.17995879e-08f);
  return b * ((5.f - b) * r);
}

GENENGINE_HD float gelu_slope(float u) {
  const float b = at_most(absolute(u), 6.f);
  const float r = polynomial(b - 2.25f, -0.0157839265f, 0.0217117108f, -0.00432738103f, -0.00934821274f, 0.00707624527f,
                             -0.000942602463f, -0.000995853334f, 0.000450211723f, 1.65202564e-05f, -5.67582319e-05f,
                             9.8405726e-06f, 3.37485744e-06f, -1.3377736e-06f, -3.04454666e-08f, 8.20497945e-08f,
                             -9.56251611e-09f, -1.82492543e-09f, 5.00224639e-10f, -3.27513849e-11f);
  const float below = (6.f - b) * r;
  return u > 0.f ? 1.f - below : below;
}

GENENGINE_HD float gelu_tanh_slope(float u) {
  const float b = at_most(absolute(u), 5.5f);
  const float r = polynomial(b - 2.f, -0.0245997794f, 0.0237929095f, 0.00761675742f, -0.0184020791f, 0.0068828119f,
                             0.00129118748f, -0.00154280418f, 0.0002767595f, 0.000101453414f, -6.21012441e-05f,
                             8.64807407e-06f, 4.70599798e-06f, -2.34796312e-06f, 5.05513569e-08f, 1.99145873e-07f,
                             -3.73058135e-08f, -5.11144371e-09f, 2.1943154e-09f, -1.83954671e-10f);
  const float below = (5.5f - b) * r;
  return u > 0.f ? 1.f - below : below;
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
  const float s = sigmoid(v), ds = s * sigmoid(-v);
  return ds * multiply_add(b, multiply_add(dv * dv, 1.f - 2.f * s, 0.428128898f * b), 2.f * dv);
}

// ---- every activation ------------------------------------------------------------------------------------------------

template <Activation A, bool Rounded = false>
GENENGINE_HD float activate(float u, [[maybe_unused]] float alpha) {
  if constexpr (A == Activation::relu) return rectified(u);
  if constexpr (A == Activation::lrelu) return u < 0.f ? alpha * u : u;
  if constexpr (A == Activation::silu) return u / (1.f + exponential_within(-u));
  if constexpr (A == Activation::gelu)
    return rectified(u) - (Rounded ? gelu_tail_rounded(absolute(u)) : gelu_tail(absolute(u)));
  if constexpr (A == Activation::gelu_tanh)
    return rectified(u) - (Rounded ? gelu_tanh_tail_rounded(absolute(u)) : gelu_tanh_tail(absolute(u)));
  if constexpr (A == Activation::tanh) return hyperbolic_tangent(u);
  if constexpr (A == Activation::sigmoid) return sigmoid(u);
  return u;
}

template <Activation A>
GENENGINE_HD float activate_slope([[maybe_unused]] float u, [[maybe_unused]] float alpha) {
  if constexpr (A == Activation::relu) return u <= 0.f ? 0.f : 1.f;
  if constexpr (A == Activation::lrelu) return u <= 0.f ? alpha : 1.f;
  if constexpr (A == Activation::silu) {
    const float b = within(u, 87.f), s = sigmoid(b);
    return multiply_add(b * s, 1.f - s, s);
  }
  if constexpr (A == Activation::gelu) return gelu_slope(u);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh_slope(u);
  if constexpr (A == Activation::tanh) {
    const float t = hyperbolic_tangent(u);
    return multiply_add(-t, t, 1.f);
  }
  if constexpr (A == Activation::sigmoid) {
    const float s = sigmoid(u);
    return multiply_add(-s, s, s);
  }
  return 1.f;
}

template <Activation A>
GENENGINE_HD float activate_curvature([[maybe_unused]] float u, [[maybe_unused]] float alpha) {
  if constexpr (A == Activation::silu) {
    const float b = within(u, 87.f), s = sigmoid(b);
    return multiply_add(-s, s, s) * multiply_add(b, 1.f - 2.f * s, 2.f);
  }
  if constexpr (A == Activation::gelu) return gelu_curvature(u);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh_curvature(u);
  if constexpr (A == Activation::tanh) {
    const float t = hyperbolic_tangent(u);
    return -2.f * t * multiply_add(-t, t, 1.f);
  }
  if constexpr (A == Activation::sigmoid) {
    const float s = sigmoid(u);
    return multiply_add(-s, s, s) * (1.f - 2.f * s);
  }
  return 0.f;
}

}  // namespace genengine
