// The loops of the ops that go once over the elements of a sample: sampler_step and diffuse. No torch, no STL.
#pragma once
#include <stdint.h>

#include "cpu/normal_loops.h"
#include "genengine/types.h"

namespace genengine {

// Where the noise of one sample comes from: nowhere, memory (float32), or the specification.
struct NoiseSource {
  const float* given = nullptr;
  bool draw = false;
  NoiseKey key{};
  // channels_last: element e of memory holds logical element (e % channels) * pixels + e / channels. 1: C order.
  int64_t channels = 1, pixels = 0;
};

// One sample of sampler_step; element 0 of every pointer is the sample's first.
struct StepSample {
  const float* row;  // 16 coefficients
  const void* x;
  const void* outputs[3];
  int branches;
  float* history[3];
  int registers;
  NoiseSource noise;
  const void* variance;  // v of exp(l v), or null
  void* out;
  void* x_in[3];
  int copies;  // of x_in
  Type state, model;
  bool stream;  // the written tensors exceed the caches: non-temporal stores
};
GENENGINE_LOOP(void, step_range, (const StepSample& sample, int64_t first, int64_t count))

// x_t = alpha x0 + sigma eps, target = c_x0 x0 + c_eps eps
struct DiffuseSample {
  const void* x0;
  void* x_t;
  void* target;
  float alpha, sigma, c_x0, c_eps;
  NoiseSource noise;
  Type type;
  bool stream;
};
GENENGINE_LOOP(void, diffuse_range, (const DiffuseSample& sample, int64_t first, int64_t count))

// out = x, for a sample whose steps are done.
GENENGINE_LOOP(void, copy_range, (const void* x, void* out, Type type, int64_t first, int64_t count))

}  // namespace genengine
