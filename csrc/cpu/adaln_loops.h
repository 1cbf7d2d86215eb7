// The loops behind adaln and gated_adaln. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/types.h"

namespace genengine {

// Strides in elements; the innermost is 1.
struct TokenView {  // (B, N, D)
  const void* data;
  int64_t batch, token;
};
struct RowView {  // (B, D)
  const void* data;
  int64_t batch;
};

struct AdalnForward {
  TokenView x, branch;  // branch.data is null for plain adaln
  RowView gate, scale, shift;
  void *x_out, *h;  // dense
  Type x_type, h_type;  // of x and x_out; of everything else
  int64_t tokens, dim;
  float eps;
  bool stream;  // write past the caches
};

constexpr int64_t kAdalnChunk = 16;  // tokens whose dscale, dshift, dgate one task sums, and chunks summed in a group

struct AdalnBackward {
  TokenView grad_x, grad_h, x, branch;  // grad_x.data and branch.data are null for plain adaln
  RowView gate, scale;
  void *dx, *dbranch;  // dense
  float* partial;      // (B, chunks, 3, D): dscale, dshift, dgate summed over each chunk
  Type x_type, h_type;
  int64_t tokens, dim, chunks;
  float eps;
};

// Rows b * tokens + n in [begin, end).
GENENGINE_LOOP(void, adaln_forward, (const AdalnForward& op, int64_t begin, int64_t end))
// Chunks b * chunks + c in [begin, end).
GENENGINE_LOOP(void, adaln_backward, (const AdalnBackward& op, int64_t begin, int64_t end))
// out[0, dim) = the sum over chunks of partial[chunk * 3 * dim + i], in groups of kAdalnChunk.
GENENGINE_LOOP(void, adaln_reduce, (void* out, Type type, const float* partial, int64_t chunks, int64_t dim))

}  // namespace genengine
