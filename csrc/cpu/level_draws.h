// The room that csrc/cpu/isa/level_draws.h needs. No torch, no STL.
#pragma once
#include <stdint.h>

namespace genengine {

constexpr int kAbreast = 4;  // draws whose sums, each a chain of additions, go on side by side

// Doubles, for levels filled up to whole vectors.
constexpr int64_t level_draw_sums(int64_t levels) { return kAbreast * levels; }

}  // namespace genengine
