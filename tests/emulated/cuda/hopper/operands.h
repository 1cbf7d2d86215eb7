// How wgmma finds its operands: matrices in shared memory by their descriptors, fragments in the registers of a warpgroup's
// threads. From the PTX ISA manual (wgmma: matrix descriptors, register fragments) and CUTLASS's list of canonical layouts.
#pragma once
#include <math.h>
#include <stdint.h>

#include <array>
#include <vector>

#include "cuda/hopper/memory.h"

namespace genengine::hopper::emulated {

constexpr int kThreads = 128, kRows = 64, kDepth = 16;  // of a product: its warpgroup's threads, rows, terms of a sum

struct Instruction {
  int columns;
  bool half, a_in_registers, a_down, b_down, accumulate;
  uint64_t a, b;
  bool operator==(const Instruction&) const = default;
};

inline float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return bits >> 15 ? -size : size;
}

// Rounded to nearest, ties to even.
inline uint16_t to_half(float value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  if (value != value) return 0x7fff;
  const float size = fabsf(value);
  if (size >= 65520.f) return sign | 0x7c00;
  const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  const int units = static_cast<int>(nearbyintf(ldexpf(size, 10 - exponent)));  // of the last place, 2048 where it rounds up to
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + units);
}

// The values of all 16-bit patterns.
inline const float* values_of(bool half) {
  static const std::vector<float> tables = [] {
    std::vector<float> table(2 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
      table[bits] = from_half(static_cast<uint16_t>(bits));
      const uint32_t wide = bits << 16;
      memcpy(&table[1 << 16 | bits], &wide, 4);
    }
    return table;
  }();
  return tables.data() + (half ? 0 : 1 << 16);
}

struct Descriptor {
  uint32_t start, leading, stride, base;
  int line;

  explicit Descriptor(uint64_t bits)
      : start(bits << 4 & 0x3fff0), leading(bits >> 12 & 0x3fff0), stride(bits >> 28 & 0x3fff0), base(bits >> 49 & 7) {
    constexpr int kLines[4] = {0, 128, 64, 32};
    line = kLines[bits >> 62];
    if (line == 0) refuse("wgmma: the matrix at %u is not swizzled; unswizzled ones are not emulated", start);
    if (base != 0) refuse("wgmma: base offset %u; only 0 is emulated", base);
    const uint32_t pattern = 8 * line;
    if (start % pattern >= static_cast<uint32_t>(line))
      refuse("wgmma: the matrix at %u begins within a pattern of %u bytes", start, pattern);
  }
};

// `count` rows of 16 terms, as values[term * count + row]: of a (rows of the sums) or of b (their columns).
inline void decode(const SharedMemory& memory, uint64_t bits, bool down, bool half, int count, float* values) {
  const Descriptor matrix(bits);
  const float* table = values_of(half);
  const auto chunk = [&](uint32_t at) {
    std::array<uint16_t, 8> words;
    memcpy(words.data(), memory.read(swizzled(at, matrix.line), 16), 16);
    return words;
  };
  if (!down) {  // a row's terms lie in a line; eight lines are a group, the next one `stride` on
    if (matrix.start % matrix.line + 32 > static_cast<uint32_t>(matrix.line))
      refuse("wgmma: 16 columns at %u are beyond a line", matrix.start);
    for (int row = 0; row < count; ++row)
      for (int side = 0; side < 2; ++side) {
        const auto words = chunk(matrix.start + row / 8 * matrix.stride + row % 8 * matrix.line + side * 16);
        for (int i = 0; i < 8; ++i) values[(side * 8 + i) * count + row] = table[words[i]];
      }
    return;
  }
  // A term's rows lie in lines, as many chunks of eight as a line has in one box, the next box `leading` on; eight terms are
  // eight lines, the next eight `stride` on.
  if (matrix.start % matrix.line != 0) refuse("wgmma: the columns at %u begin within a line", matrix.start);
  const int chunks = matrix.line / 16;
  for (int term = 0; term < kDepth; ++term)
    for (int i = 0; i < count / 8; ++i) {
      const uint32_t box = matrix.start + i / chunks * matrix.leading + term / 8 * matrix.stride;
      const auto words = chunk(box + term % 8 * matrix.line + i % chunks * 16);
      for (int j = 0; j < 8; ++j) values[term * count + i * 8 + j] = table[words[j]];
    }
}

// Of a thread's sums, register i: its row and column.
inline int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i & 2 ? 8 : 0); }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// An a in registers, as values[term * 64 + row].
inline void decode(const std::array<std::array<uint32_t, 4>, kThreads>& words, bool half, float* values) {
  const float* table = values_of(half);
  for (int thread = 0; thread < kThreads; ++thread)
    for (int word = 0; word < 4; ++word)
      for (int side = 0; side < 2; ++side) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8, term = word / 2 * 8 + thread % 4 * 2 + side;
        values[term * kRows + row] = table[words[thread][word] >> 16 * side & 0xffff];
      }
}

}  // namespace genengine::hopper::emulated
