// The scalar formulas of reparameterize, forward and backward, for host and device. V is float, or on the CPU sixteen.
//
//   forward    z = mean + s eps, s = exp(logvar / 2);  kl += (mean^2 + s^2 - 1 - logvar) / 2  or  (z^2 - eps^2 - logvar) / 2
//   backward   with g = grad_z, k = grad_kl of the sample:
//              analytic      dmean = g + k mean,  dlogvar = (g s eps + k (s^2 - 1)) / 2;   k = 0 below the free bits
//              monte_carlo   dmean = g + k z,     dlogvar = ((g + k z) s eps - k) / 2
//
// Per element, e bytes each: forward moves 3 e, backward 5 e; about 25 FLOPs, plus 17 per normal drawn. Type may be 16-bit;
// all arithmetic and all sums are float32. exp(logvar) is s^2: one exponential. Sums run in a fixed order, without atomics.
#pragma once
#include "genengine/functions.h"

namespace genengine {

constexpr uint32_t kReparameterizeStream = 2;

enum class Kl : int { analytic, free_bits, monte_carlo };

inline Kl kl_of(bool monte_carlo, double free_bits) {
  return monte_carlo ? Kl::monte_carlo : (free_bits > 0 ? Kl::free_bits : Kl::analytic);
}

template <class V>
GENENGINE_HD V analytic_kl(V mean, V logvar, V variance) {
  return 0.5f * multiply_add(mean, mean, (variance - 1.f) - logvar);
}

template <Kl Kind, class V>
GENENGINE_HD V reparameterize_element(V mean, V logvar, V eps, float free_bits, V& z) {
  const V sigma = exponential(0.5f * logvar);
  z = multiply_add(sigma, eps, mean);
  if constexpr (Kind == Kl::monte_carlo) return 0.5f * (z * z - multiply_add(eps, eps, logvar));
  const V kl = analytic_kl(mean, logvar, sigma * sigma);
  if constexpr (Kind == Kl::free_bits) return at_least(kl, free_bits);
  return kl;
}

template <Kl Kind, class V>
GENENGINE_HD void reparameterize_gradient(V grad_z, V grad_kl, V mean, V logvar, V eps, float free_bits, V& dmean, V& dlogvar) {
  const V sigma = exponential(0.5f * logvar), variance = sigma * sigma;
  if constexpr (Kind == Kl::monte_carlo) {
    dmean = multiply_add(grad_kl, multiply_add(sigma, eps, mean), grad_z);
    dlogvar = 0.5f * (dmean * sigma * eps - grad_kl);
  } else {
    if constexpr (Kind == Kl::free_bits) grad_kl = zero_below(grad_kl, analytic_kl(mean, logvar, variance), free_bits);
    dmean = multiply_add(grad_kl, mean, grad_z);
    dlogvar = 0.5f * multiply_add(grad_z * sigma, eps, grad_kl * (variance - 1.f));
  }
}

}  // namespace genengine
