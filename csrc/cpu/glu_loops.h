// The loops behind glu and its backward. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/glu.h"
#include "genengine/types.h"

namespace genengine {

// Strides in elements; the innermost is 1.
struct GluView {  // (B, N, ...)
  const void* data;
  int64_t batch, token;
};

constexpr int64_t kGluChunk = 32;  // rows whose bias gradient one task sums

struct Glu {
  GluView x, grad;          // (B, N, 2 D); of the backward alone (B, N, D)
  const float* bias;        // (2 D)
  void* out;                // dense: y (B, N, D), or dx (B, N, 2 D)
  float* partial;           // of the backward: (chunks, 2 D) sums of dx; null: not wanted
  int64_t rows, tokens, dim;
  int64_t gate, value;      // where they start in a row: 0 and D, or D and 0
  Type type;
  Activation activation;
  bool stream;  // write past the caches
};

GENENGINE_LOOP(void, glu_forward, (const Glu& op, int64_t begin, int64_t end))   // rows
GENENGINE_LOOP(void, glu_backward, (const Glu& op, int64_t begin, int64_t end))  // chunks of rows

}  // namespace genengine
