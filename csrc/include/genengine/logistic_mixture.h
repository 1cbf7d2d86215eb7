// The scalar formulas of logistic_mixture for host and device; see genengine/ops/logistic_mixture.py.
//
//   log(sigmoid(a) - sigmoid(b)) = -max(-a, 0) - max(b, 0) + log((1 - e^-d) / ((1 + e^-|a|) (1 + e^-|b|))),    d = a - b
//
// The fractions of the C channels of a component lie in (1/16, 1) each: they are multiplied up, and one logarithm and one
// division serve them all. Per pixel of P = K (1 + 2 C + C (C - 1) / 2) parameters of e bytes each: log_prob reads P e + 4 C
// bytes and takes about K (30 + 80 C + 25 C (C - 1) / 2) FLOPs, four exponentials for a channel and component; the backward
// writes P e more and takes half as many FLOPs again; sample reads K e and what the chosen component needs. All arithmetic is
// float32; sums over components run in their order, without atomics.
#pragma once
#include "genengine/functions.h"
#include "genengine/normal.h"

namespace genengine {

constexpr uint32_t kMixtureStream = 7;
constexpr float kLowestLogScale = -7.f;
constexpr int kMaxChannels = 4;

GENENGINE_HD int mixture_pairs(int channels) { return channels * (channels - 1) / 2; }
GENENGINE_HD int params_per_component(int channels) { return 1 + 2 * channels + mixture_pairs(channels); }

struct Bins {
  float last, h, log_width;  // bins - 1; half a bin; log(2 h)
};

// The whole number of the bin that holds x; NaN stays NaN.
GENENGINE_HD float nearest_bin(float x, float last) {
  const float t = (x + 1.f) * (0.5f * last), low = t < 0.f ? 0.f : t, bounded = low > last ? last : low;
  return (bounded + 12582912.f) - 12582912.f;
}
GENENGINE_HD float bin_value(float bin, float last) { return (2.f * bin - last) / last; }

// ---- log-probability -------------------------------------------------------------------------------------------------

// One channel of one component: its log-probability is linear + log(numerator / denominator).
struct Slice {
  float linear, numerator, denominator;
};
// The derivatives of that with respect to the mean and the log-scale.
struct SliceGradient {
  float mean, log_scale;
};

// What stands for infinity where a bin has no end, and for the width of such a bin: e^-1e4 is nothing.
constexpr float kFar = 1e4f;

// (1 - e^-d) / d for d <= 1/2, to d^7.
GENENGINE_HD float relative_width(float d) {
  float p = multiply_add(d, -2.4801587e-5f, 1.9841270e-4f);
  p = multiply_add(p, d, -1.3888889e-3f);
  p = multiply_add(p, d, 8.3333333e-3f);
  p = multiply_add(p, d, -4.1666667e-2f);
  p = multiply_add(p, d, 1.6666667e-1f);
  p = multiply_add(p, d, -0.5f);
  return multiply_add(p, d, 1.f);
}

// bin: of x. Gradient null: not wanted. Of a narrow bin, d <= 1/2, log d is split off: d may even underflow.
GENENGINE_HD Slice logistic_slice(float x, float bin, float mean, float log_scale, const Bins& bins, SliceGradient* gradient) {
  const float s = at_least(log_scale, kLowestLogScale), inverse = exponential_within(-s), centred = x - mean;
  const bool lowest = bin == 0.f, highest = bin == bins.last;
  const float a = highest ? kFar : (centred + bins.h) * inverse, b = lowest ? -kFar : (centred - bins.h) * inverse;
  const float d = lowest | highest ? kFar : 2.f * bins.h * inverse;
  const float exp_a = exponential_within(-absolute(a)), exp_b = exponential_within(-absolute(b)), exp_d = exponential_within(-d);
  const float numerator = select(d > 0.5f, 1.f - exp_d, relative_width(d)), one_a = 1.f + exp_a, one_b = 1.f + exp_b;
  if (gradient) {
    const float scale = 1.f / (one_a * one_b * numerator);
    const float sigma_a = (a > 0.f ? exp_a : 1.f) * (one_b * numerator * scale);  // sigmoid(-a)
    const float sigma_b = (b > 0.f ? 1.f : exp_b) * (one_a * numerator * scale);  // sigmoid(b)
    const float width = (d > 0.5f ? d : 1.f) * exp_d * (one_a * one_b * scale);   // d / (e^d - 1)
    gradient->mean = inverse * (sigma_b - sigma_a);
    gradient->log_scale = zero_below(multiply_add(b, sigma_b, -a * sigma_a) - width, log_scale, kLowestLogScale);
  }
  const float split = d > 0.5f ? 0.f : bins.log_width - s;
  return {split + ((a < 0.f ? a : 0.f) - (b > 0.f ? b : 0.f)), numerator, one_a * one_b};
}

// What a component's slices make of its logit: log p(k, pixel) less the logarithm of the logits' sum.
GENENGINE_HD float joint_log_prob(float linear, float numerator, float denominator) {
  return multiply_add(denominator, 0.f, linear) + log_unit(numerator / denominator);  // log_unit does not know NaN
}

// A sum of exponentials as it grows, where the exponents cannot be kept, is e^largest sum; it begins with kNothing and 0, and
// -infinity adds nothing to it.
constexpr float kNothing = -3e38f;
GENENGINE_HD void add_exponential(float& largest, float& sum, float value) {
  const float finite = select(value < kNothing, kNothing, value), gap = finite - largest, less = exponential_within(-absolute(gap));
  sum = select(gap > 0.f, multiply_add(sum, less, 1.f), sum + less);
  largest = select(gap > 0.f, finite, largest);
}

// ---- sampling: the same bits everywhere, so no fused multiply-add ------------------------------------------------------

// The value of a channel from its mean and log-scale and a uniform u.
GENENGINE_HD float sample_channel(float mean, float log_scale, float u, float temperature, float last) {
  const float scale = exp_ieee(at_least(log_scale, kLowestLogScale)) * temperature;
  return bin_value(nearest_bin(mean + scale * (log_unit(u) - log_unit(1.f - u)), last), last);
}

GENENGINE_HD float component_weight(float logit, float largest, float inverse_temperature) {
  return exp_ieee((logit - largest) * inverse_temperature);
}

}  // namespace genengine
