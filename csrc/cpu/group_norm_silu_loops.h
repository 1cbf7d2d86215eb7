// The loops behind group_norm_silu. No torch, no STL.
//
// channels_last: a sample is a matrix of `width` columns, whole pixels per row and whole vectors, so that a column is
// always the same channel; the last row may be short. Blocks of kGroupNormRows rows are the unit of threading, and of the
// partial sums: their order, and so every bit, is the same for any number of threads.
// C order: a group is one run of memory, and one task.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/types.h"

namespace genengine {

constexpr int64_t kGroupNormRows = 64;     // of a block
constexpr int64_t kGroupNormColumns = 256;  // of a row, at least; and of the rows that a run is cut into

struct GroupNorm {
  const void *x, *grad;  // samples dense; strides in elements. grad: backward alone
  int64_t x_batch, grad_batch;
  // add_group_norm_silu: the first pass writes x = left + branch, dense; its backward adds grad_x, that of x, to dx. Or null.
  const void *left, *branch, *grad_x;
  int64_t left_batch, branch_batch, grad_x_batch;
  void* sum;  // x, to be written
  void* out;  // y or dx, dense
  Type type;
  const void *weight, *bias;  // (C), or null
  Type parameter_type;
  const void *scale, *shift;  // (B, C), or null
  int64_t scale_batch, shift_batch;
  Type modulation_type;
  int64_t channels, pixels, groups, width;
  double* partial;  // channels_last: (B, blocks, 2, width), the two sums of every column of a block
  float* rows;      // channels_last: (B, 5, width), what every column is multiplied with
  double* sums;     // backward: (B, 2, C), sum(dv) and sum(dv x^)
  float *mean, *rstd;  // (B, G): written forward, read backward
  void *dweight, *dbias, *dscale, *dshift;  // or null
  float eps;
  bool silu, stream;  // stream: write past the caches
  int64_t group_channels() const { return channels / groups; }
  int64_t block() const { return kGroupNormRows * width; }
  int64_t blocks() const { return (channels * pixels + block() - 1) / block(); }
};

// channels_last, one sample: sums of a block, then the rows from all blocks, then the output of a block.
GENENGINE_LOOP(void, group_norm_sums, (const GroupNorm& op, int64_t b, int64_t block))
GENENGINE_LOOP(void, group_norm_fold, (const GroupNorm& op, int64_t b))
GENENGINE_LOOP(void, group_norm_apply, (const GroupNorm& op, int64_t b, int64_t block))
// Backward likewise, from rows that hold mean, gain and offset.
GENENGINE_LOOP(void, group_norm_backward_prepare, (const GroupNorm& op, int64_t b))
GENENGINE_LOOP(void, group_norm_backward_sums, (const GroupNorm& op, int64_t b, int64_t block))
GENENGINE_LOOP(void, group_norm_backward_fold, (const GroupNorm& op, int64_t b))
GENENGINE_LOOP(void, group_norm_backward_apply, (const GroupNorm& op, int64_t b, int64_t block))
// C order: one group of one sample.
GENENGINE_LOOP(void, group_norm_run, (const GroupNorm& op, int64_t b, int64_t g))
GENENGINE_LOOP(void, group_norm_backward_run, (const GroupNorm& op, int64_t b, int64_t g))
// From `sums`: dscale, dshift of samples [begin, end); dweight, dbias of channels [begin, end) over the whole batch.
GENENGINE_LOOP(void, group_norm_modulation_gradients, (const GroupNorm& op, int64_t begin, int64_t end))
GENENGINE_LOOP(void, group_norm_parameter_gradients, (const GroupNorm& op, int64_t batch, int64_t begin, int64_t end))

}  // namespace genengine
