// Tiles: elements enter as float32 in L1 whatever their dtype, and leave the same way. float32 tensors are read in place.
#pragma once
#include "cpu/elementwise_loops.h"
#include "cpu/isa/convert.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

constexpr int64_t kTile = 1024;  // floats; a dozen tiles fit in a 48 KB L1

inline const float* load_tile(const void* source, Type type, int64_t first, int64_t count, float* scratch) {
  if (type == Type::f32) return static_cast<const float*>(source) + first;
  if (type == Type::f16)
    load_row(scratch, static_cast<const Half*>(source) + first, count);
  else
    load_row(scratch, static_cast<const BFloat*>(source) + first, count);
  return scratch;
}

// store_row past the caches, with ordinary stores up to the first aligned group and after the last whole one.
template <class T>
inline void stream_row(T* to, const float* from, int64_t n) {
  constexpr uintptr_t bytes = kLanes * sizeof(T);
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % bytes != 0; ++i) from_float(to[i], from[i]);
  for (; i + kLanes <= n; i += kLanes) GENENGINE_ISA::stream(to + i, load(from + i));
  for (; i < n; ++i) from_float(to[i], from[i]);
}

template <class T>
inline void store_as(T* target, const float* source, int64_t count, bool stream) {
  if (stream)
    stream_row(target, source, count);
  else
    store_row(target, source, count);
}

inline void store_tile(void* target, Type type, int64_t first, int64_t count, const float* source, bool stream) {
  if (type == Type::f32) store_as(static_cast<float*>(target) + first, source, count, stream);
  if (type == Type::f16) store_as(static_cast<Half*>(target) + first, source, count, stream);
  if (type == Type::bf16) store_as(static_cast<BFloat*>(target) + first, source, count, stream);
}

// Noise of the memory elements [first, first + count), count <= kTile, or null if the sample has none.
inline const float* noise_tile(const NoiseSource& noise, int64_t first, int64_t count, float* scratch) {
  if (noise.given) return noise.given + first;
  if (!noise.draw) return nullptr;
  if (noise.channels == 1) {
    fill_normal(scratch, first, count, noise.key);
    return scratch;
  }
  // channels_last: each channel's pixels are consecutive in the specification, so draw them so and scatter.
  float channel[kTile];
  const int64_t channels = noise.channels, pixel = first / channels, last = (first + count - 1) / channels;
  for (int64_t c = 0; c < channels; ++c) {
    fill_normal(channel, c * noise.pixels + pixel, last - pixel + 1, noise.key);
    for (int64_t p = pixel; p <= last; ++p) {
      const int64_t i = p * channels + c - first;
      if (i >= 0 && i < count) scratch[i] = channel[p - pixel];
    }
  }
  return scratch;
}

}  // namespace
}  // namespace GENENGINE_ISA
}  // namespace genengine
