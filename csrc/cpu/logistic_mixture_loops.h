// The loops of logistic_mixture. No torch, no STL.
#pragma once
#include "cpu/normal_loops.h"
#include "genengine/logistic_mixture.h"
#include "genengine/types.h"

namespace genengine {

constexpr int64_t kMixtureTile = 16;  // pixels that go together

// Parameters or their gradients, in elements.
struct ParamPlanes {
  void* base;
  int64_t batch_stride, param_stride, pixel_stride;
};

// A call. Batches are of `pixels` pixels, which may be those of many samples in a row (channels_last); `image` pixels make a
// sample. x, grad and log_prob are float32 and contiguous: (B, C, image) and (B, image).
struct MixtureCall {
  ParamPlanes params, dparams;
  Type type;
  int64_t components, pixels, image;
  int channels;
  Bins bins;
  float *x, *log_prob;
  const float* grad;
  const int64_t *seed, *ids;  // ids may be null
  int64_t seed_stride;
  uint32_t step;
  float temperature, inverse_temperature;
};

// Each does `count` <= kMixtureTile pixels of batch b from `first` on; scratch: kMixtureTile floats for every parameter,
// and for every component.
GENENGINE_LOOP(void, mixture_log_prob, (const MixtureCall& call, int64_t b, int64_t first, int64_t count, float* scratch))
GENENGINE_LOOP(void, mixture_log_prob_backward,
               (const MixtureCall& call, int64_t b, int64_t first, int64_t count, float* scratch))
GENENGINE_LOOP(void, mixture_sample, (const MixtureCall& call, int64_t b, int64_t first, int64_t count, float* scratch))

}  // namespace genengine
