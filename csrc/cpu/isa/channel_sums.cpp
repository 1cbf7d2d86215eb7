// Bias vectors spread to float32 rows, and rows of partial sums added up.
#include "cpu/channel_sums_loops.h"

#include "cpu/isa/tile.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

constexpr int64_t kGroup = 32;  // partial sums added before they join the total: the error grows with its size alone

float element(const void* from, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(from)[i];
  if (type == Type::f16) return to_float(static_cast<const Half*>(from)[i]);
  return to_float(static_cast<const BFloat*>(from)[i]);
}

// sums[c] += the sum over inner of row (channels, inner)
void add_row(float* sums, const float* row, int64_t channels, int64_t inner) {
  if (inner == 1) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += row[c];
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    float sum = 0.f;
    for (int64_t i = 0; i < inner; ++i) sum += row[c * inner + i];
    sums[c] += sum;
  }
}

}  // namespace

void spread_channels(float* to, const void* from, Type type, int64_t stride, int64_t repeats, int64_t channels, int64_t inner) {
  for (int64_t c = 0; c < channels; ++c) {
    const float value = element(from, type, c * stride);
    for (int64_t i = 0; i < inner; ++i) to[c * inner + i] = value;
  }
  const int64_t period = channels * inner;
  for (int64_t r = 1; r < repeats; ++r) memcpy(to + r * period, to, sizeof(float) * static_cast<size_t>(period));
}

void sum_channels(void* out, Type type, const float* partial, int64_t outer, int64_t channels, int64_t inner) {
  float total[kTile], some[kTile];
  for (int64_t first = 0; first < channels; first += kTile) {
    const int64_t count = channels - first < kTile ? channels - first : kTile;
    memset(total, 0, sizeof total);
    for (int64_t a = 0; a < outer; a += kGroup) {
      memset(some, 0, sizeof some);
      for (int64_t b = a; b < outer && b < a + kGroup; ++b)
        add_row(some, partial + (b * channels + first) * inner, count, inner);
      for (int64_t c = 0; c < count; ++c) total[c] += some[c];
    }
    store_tile(out, type, first, count, total, false);
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
