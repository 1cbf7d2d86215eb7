// diffuse over a range of one sample: eps is drawn into an L1 tile and used for both outputs.
#include "cpu/elementwise_loops.h"
#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

// One output, left to right, no fused multiply-add.
void affine(float* out, float a, const float* x, float b, const float* eps, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = a * x[i] + b * eps[i];
}

}  // namespace

void diffuse_range(const DiffuseSample& s, int64_t first, int64_t count) {
  alignas(64) float x[kTile], z[kTile], out[kTile];
  for (int64_t end = first + count; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    const float* x0 = load_tile(s.x0, s.type, first, n, x);
    const float* eps = noise_tile(s.noise, first, n, z);
    affine(out, s.alpha, x0, s.sigma, eps, n);
    store_tile(s.x_t, s.type, first, n, out, s.stream);
    affine(out, s.c_x0, x0, s.c_eps, eps, n);
    store_tile(s.target, s.type, first, n, out, s.stream);
  }
  if (s.stream) fence();
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
