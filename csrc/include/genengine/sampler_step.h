// One row of a coefficient table (genengine/table.py): its columns, and the scalar step that every backend follows.
//
//   m  = o0 + g1 (o1 - o0) + g2 (o2 - o1);  y = phi(p x + q m)
//   x' = a x + b m + c y + h1 H1 + h2 H2 + h3 H3 + s (exp(l v) z)        left to right, no fused multiply-add
//
// Bytes per element: reads x, the branches, the registers with h != 0, the noise if given and v where l != 0; writes x', k
// copies of x_in and the registers named by the flags. About 12 FLOPs, plus 17 per normal drawn and 20 per exponential.
// Accumulates in float32.
#pragma once
#include "genengine/normal.h"

namespace genengine {

constexpr int kColumns = 16, kMaxBranches = 3, kMaxHistory = 3;

enum Column : int { kTModel, kG1, kG2, kP, kQ, kR, kA, kB, kC, kH1, kH2, kH3, kS, kL, kCIn, kFlags };
enum class Phi : int { identity = 0, clamp = 1, threshold = 2 };
enum class Write : int { keep = 0, y = 1, x = 2 };

GENENGINE_HD Phi phi_of(int flags) { return static_cast<Phi>(flags & 3); }
GENENGINE_HD Write write_of(int flags, int j) { return static_cast<Write>((flags >> (2 + 2 * j)) & 3); }

// A zero coefficient never multiplies: NaN and uninitialised memory do not leak through it.
GENENGINE_HD float term(float coefficient, float value) { return coefficient != 0.f ? coefficient * value : 0.f; }

GENENGINE_HD float apply_phi(float u, Phi phi, float r) {
  if (phi == Phi::identity) return u;
  const float clamped = u < -r ? -r : (u > r ? r : u);  // keeps NaN
  return phi == Phi::clamp ? clamped : clamped / r;
}

// Noise of the learned standard deviation s exp(l v), still to be multiplied by s; the exponent is bounded to [-87, 88].
GENENGINE_HD float spread(float l, float v, float z) { return exp_ieee(l * v) * z; }

}  // namespace genengine
