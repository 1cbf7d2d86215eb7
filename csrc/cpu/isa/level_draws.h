// Draws from categorical distributions by the inverse CDF, with the bits of genengine/ops/_categorical.py: what the loops
// that sample autoregressive models share. Included only by csrc/cpu/isa/*.cpp. No torch, no STL.
#pragma once
#include "cpu/level_draws.h"

#include "cpu/isa/convert.h"
#include "genengine/functions.h"
#include "genengine/normal.h"

namespace genengine {
namespace GENENGINE_ISA {

// The largest of n >= 1 values; with a NaN among them, any.
inline float largest_of(const float* values, int64_t n) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = values[0];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    _Pragma("GCC ivdep") for (int j = 0; j < kLanes; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  }
  for (; i < n; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  for (const float lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
  return lanes[0];
}

struct LevelDraws {
  double* sums;  // level_draw_sums(pitch)
  int64_t pitch;  // between two of them, at least the levels filled up to whole vectors
  int64_t levels;
  float inverse_temperature;

  // write(r, level, log p) for all r < n whose uniform(r) is positive. Row r of logits holds whole vectors, too.
  template <class U, class F>
  void draw(int64_t n, const float* logits, int64_t stride, U uniform, F write) const {
    int64_t row[kAbreast];
    float u[kAbreast];
    int count = 0;
    for (int64_t r = 0; r < n; ++r) {
      u[count] = uniform(r);
      row[count] = r;
      count += u[count] > 0.f;
      if (count < kAbreast && r + 1 < n) continue;
      draw_some(count, row, u, logits, stride, write);
      count = 0;
    }
  }

 private:
  template <class F>
  void draw_some(int count, const int64_t* row, const float* u, const float* logits, int64_t stride, F write) const {
    float largest[kAbreast];
    for (int d = 0; d < count; ++d) largest[d] = weigh(logits + row[d] * stride, sums + d * pitch);
    if (count == kAbreast)
      add_up<kAbreast>(sums);
    else
      for (int d = 0; d < count; ++d) add_up<1>(sums + d * pitch);
    for (int d = 0; d < count; ++d) {
      const double *sum = sums + d * pitch, total = sum[levels - 1];
      const int64_t level = level_above(sum, static_cast<double>(u[d]) * total);
      const float logit = logits[row[d] * stride + level];
      write(row[d], level, (logit - largest[d]) * inverse_temperature - logarithm(static_cast<float>(total)));
    }
  }

  // Weights e^((logit - largest) / T); returns the largest.
  float weigh(const float* logits, double* weights) const {
    const float largest = largest_of(logits, levels);
    for (int64_t i = 0; i < levels; i += kLanes) {
      _Pragma("GCC ivdep") for (int j = 0; j < kLanes; ++j)
          weights[i + j] = static_cast<double>(exp_ieee((logits[i + j] - largest) * inverse_temperature));
    }
    return largest;
  }
  // Each row becomes its partial sums, one chain in the order of the levels.
  template <int Rows>
  void add_up(double* rows) const {
    double total[Rows] = {};
    for (int64_t i = 0; i < levels; ++i)
      for (int d = 0; d < Rows; ++d) rows[d * pitch + i] = total[d] += rows[d * pitch + i];
  }
  // The first of 0 .. levels - 2 whose sum exceeds the target, else the last level.
  int64_t level_above(const double* sum, double target) const {
    int64_t low = 0, high = levels - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sum[middle] <= target)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace GENENGINE_ISA
}  // namespace genengine
