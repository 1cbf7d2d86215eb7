// The loops behind bias_act and its backwards. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"
#include "genengine/bias_act.h"
#include "genengine/types.h"

namespace genengine {

// Dense memory as rows of `length` elements, the last perhaps short. channels > 0: row r has one bias, bias[r % channels];
// 0: element i of every row has bias[i].
struct BiasedRows {
  int64_t elements, length, channels;
  const float* bias;
  int64_t segments, rows_per_task;  // a task: one of the segments of a row (channels > 0), or so many rows
  int64_t tasks;
};

constexpr int64_t kBiasSegment = 16384;  // elements

struct BiasActForward {
  BiasedRows rows;
  const void* x;
  void* y;
  Type type;
  Activation activation;
  BiasActOptions options;
  bool stream;  // write past the caches
};

struct BiasActBackward {
  BiasedRows rows;
  const void *grad, *x;
  const void* grad_dx;      // of the second backward alone; null: the first
  const float* grad_dbias;  // laid out like the bias; of the second backward
  void *dx, *d_grad;        // dx null: not wanted
  float* partial;           // sums of dx, null: not wanted; channels > 0: (tasks), else (tasks, length)
  Type type;
  Activation activation;
  BiasActOptions options;
  bool stream;
};

GENENGINE_LOOP(void, bias_act_forward, (const BiasActForward& op, int64_t begin, int64_t end))  // tasks
GENENGINE_LOOP(void, bias_act_backward, (const BiasActBackward& op, int64_t begin, int64_t end))

}  // namespace genengine
