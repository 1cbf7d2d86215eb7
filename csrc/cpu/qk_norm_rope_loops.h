// The loops behind qk_norm_rope. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/types.h"

namespace genengine {

// Strides in elements; the innermost is 1.
struct PackedView {  // (B, N, 3, H, D)
  const void* data;
  int64_t batch, token, part, head;
};
struct TableView {  // (1 or B, N, R/2), float32
  const float* data;
  int64_t batch, token;
};

struct QkNormRope {
  PackedView qkv, grad, out;  // grad: of the backward alone. The forward's out may be qkv itself: then v stays.
  const void* weight[2];      // of q and k; null: ones
  TableView cos, sin;
  float* partial;  // of the backward, (chunks, 2, D): dweight of q and k summed over each chunk; null: not wanted
  int64_t batch, tokens, heads, dim, half;  // half: R/2, 0 without rotation
  float eps;
  Type type, weight_type;
  bool norm, interleaved, back;  // back: the rotation is undone
  bool copy_v, stream;           // stream: write past the caches
};

constexpr int64_t kQkChunk = 16;  // tokens whose dweight one task sums, and chunks summed in a group

// Tokens b * tokens + n in [begin, end).
GENENGINE_LOOP(void, qk_norm_rope_forward, (const QkNormRope& op, int64_t begin, int64_t end))
// Chunks of kQkChunk tokens in [begin, end).
GENENGINE_LOOP(void, qk_norm_rope_backward, (const QkNormRope& op, int64_t begin, int64_t end))
// out[0, dim) = the sum over chunks of partial[chunk * 2 * dim + i], in groups of kQkChunk.
GENENGINE_LOOP(void, qk_norm_rope_reduce, (void* out, Type type, const float* partial, int64_t chunks, int64_t dim))

}  // namespace genengine
