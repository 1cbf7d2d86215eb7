// reparameterize over a range of one sample: tiles of mean and logvar enter L1, eps is drawn there and drawn again for the
// backward.
#include "cpu/reparameterize_loops.h"

#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

template <Kl Kind>
void forward(float* __restrict z, float* __restrict kl, const float* mean, const float* logvar, const float* eps, float free_bits,
             int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    kl[i] = reparameterize_element<Kind>(mean[i], logvar[i], eps[i], free_bits, z[i]);
}

template <Kl Kind>
void backward(float* __restrict dmean, float* __restrict dlogvar, const float* grad_z, float grad_kl, const float* mean, const float* logvar,
              const float* eps, float free_bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    reparameterize_gradient<Kind>(grad_z[i], grad_kl, mean[i], logvar[i], eps[i], free_bits, dmean[i], dlogvar[i]);
}

template <class Forward>
float forward_tiles(const ReparameterizeSample& s, int64_t first, int64_t count, Forward run) {
  alignas(64) float m[kTile], v[kTile], noise[kTile], z[kTile], kl[kTile];
  float total = 0.f;
  for (int64_t end = first + count; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    const float* eps = noise_tile(s.noise, first, n, noise);
    const float* mean = load_tile(s.mean, s.type, first, n, m);
    const float* logvar = load_tile(s.logvar, s.type, first, n, v);
    run(z, kl, mean, logvar, eps, s.free_bits, n);
    total += sum_tile(kl, n);
    store_tile(s.z, s.type, first, n, z, s.stream);
  }
  if (s.stream) fence();
  return total;
}

template <class Backward>
void backward_tiles(const ReparameterizeSample& s, int64_t first, int64_t count, Backward run) {
  alignas(64) float g[kTile], m[kTile], v[kTile], noise[kTile], dmean[kTile], dlogvar[kTile];
  for (int64_t end = first + count; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    const float* eps = noise_tile(s.noise, first, n, noise);
    const float* grad_z = load_tile(s.grad_z, s.type, first, n, g);
    const float* mean = load_tile(s.mean, s.type, first, n, m);
    const float* logvar = load_tile(s.logvar, s.type, first, n, v);
    run(dmean, dlogvar, grad_z, s.grad_kl, mean, logvar, eps, s.free_bits, n);
    store_tile(s.dmean, s.type, first, n, dmean, s.stream);
    store_tile(s.dlogvar, s.type, first, n, dlogvar, s.stream);
  }
  if (s.stream) fence();
}

}  // namespace

float reparameterize_range(const ReparameterizeSample& s, int64_t first, int64_t count) {
  switch (s.kl) {
    case Kl::analytic: return forward_tiles(s, first, count, forward<Kl::analytic>);
    case Kl::free_bits: return forward_tiles(s, first, count, forward<Kl::free_bits>);
    case Kl::monte_carlo: return forward_tiles(s, first, count, forward<Kl::monte_carlo>);
  }
  return 0.f;
}

void reparameterize_backward_range(const ReparameterizeSample& s, int64_t first, int64_t count) {
  switch (s.kl) {
    case Kl::analytic: return backward_tiles(s, first, count, backward<Kl::analytic>);
    case Kl::free_bits: return backward_tiles(s, first, count, backward<Kl::free_bits>);
    case Kl::monte_carlo: return backward_tiles(s, first, count, backward<Kl::monte_carlo>);
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
