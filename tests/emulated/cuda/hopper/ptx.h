// Stands in for csrc/cuda/hopper/ptx.h where there is no GPU, an independent reading of the PTX ISA manual: the same names, on
// the block of block.h; the descriptors of matrix.h are the kernels' own. Copies and products are done at drawn times, within
// what barriers and waits allow; misuse ends the process.
#pragma once
#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "cuda/hopper/block.h"
#include "cuda/hopper/matrix.h"
#include "cuda/warp.h"

namespace genengine::hopper {

constexpr int kWarpgroup = 128;

struct Half {
  uint16_t bits;
};
struct alignas(16) FourWords {
  uint32_t word[4];
};

using Barrier = uint64_t;

inline uint32_t shared_address(const void* pointer) { return emulated::mine().memory.address(pointer); }
inline int block_index() { return emulated::mine().index; }
inline int block_count() { return emulated::Grid::instance().count(); }

// ---- barriers --------------------------------------------------------------------------------------------------------------

inline void barrier_init(Barrier* barrier, int arrivals) { emulated::mine().barriers.init(barrier, arrivals); }
inline void barrier_publish() { emulated::mine().barriers.publish(); }
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulated::mine().barriers.arrive(shared_address(barrier), bytes);
}
inline void barrier_arrive(Barrier* barrier) { emulated::mine().barriers.arrive(shared_address(barrier), 0); }
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulated::mine().barriers.wait(shared_address(barrier), parity);
}

inline void named_sync(int id, int threads) { emulated::mine().named.sync(id, threads); }
inline void named_arrive(int id, int threads) { emulated::mine().named.arrive(id, threads); }

template <int Count>
void take_registers() {
  emulated::mine().registers.change(Count, true);
}
template <int Count>
void give_registers() {
  emulated::mine().registers.change(Count, false);
}

// ---- copies ----------------------------------------------------------------------------------------------------------------

inline void prefetch_map(const TensorMap* map) { emulated::check_map(*map); }
inline void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3) {
  emulated::mine().copies.load(shared_address(to), *map, shared_address(barrier), {c0, c1, c2, c3});
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  emulated::mine().copies.load(shared_address(to), from, bytes, shared_address(barrier));
}
inline void tma_store(const TensorMap* map, const void* from, int c0, int c1, int c2, int c3) {
  emulated::mine().copies.store(*map, shared_address(from), {c0, c1, c2, c3});
}
inline void bulk_add(float* to, const float* from, uint32_t bytes) {
  emulated::mine().copies.add(to, shared_address(from), bytes);
}
inline void bulk_commit() { emulated::mine().copies.commit(); }
template <int Pending>
void bulk_wait_read() {
  emulated::mine().copies.wait(Pending, true);
}
template <int Pending>
void bulk_wait() {
  emulated::mine().copies.wait(Pending, false);
}

inline void store_shared(void* to, uint32_t word) { emulated::mine().memory.store(to, &word, sizeof(word)); }
inline void store_shared(void* to, const FourFloats& values) { emulated::mine().memory.store(to, &values, sizeof(values)); }
inline void publish_to_async() { emulated::mine().memory.publish(); }

// ---- turns of blocks -------------------------------------------------------------------------------------------------------

inline void await_count(const int* counter, int value) {
  Fibers::instance().wait_until([counter, value] { return *counter >= value; },
                                [counter, value] { return emulated::text("for a counter to reach %d from %d", value, *counter); });
}
inline void count_up(int* counter) {
  if (emulated::mine().copies.writes()) emulated::refuse("count_up: this thread has not waited for its stores (bulk_wait)");
  ++*counter;
}

// ---- products --------------------------------------------------------------------------------------------------------------

inline void wgmma_fence() { emulated::my_products().fence(); }
inline void wgmma_commit() { emulated::my_products().commit(); }
template <int Pending>
void wgmma_wait() {
  emulated::my_products().wait(Pending);
}

template <int Count, class Register>
void pin(Register (&)[Count]) {}

template <class T, int N>
struct Product {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  static constexpr bool kHalf = std::is_same_v<T, Half>;

  template <Sums A, Sums B>
  static void of_shared(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    constexpr bool kADown = A == Sums::down_columns, kBDown = B == Sums::down_columns;
    emulated::my_products().issue({N, kHalf, false, kADown, kBDown, accumulate, a, b}, sums, nullptr);
  }
  template <Sums B>
  static void of_registers(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    constexpr bool kBDown = B == Sums::down_columns;
    emulated::my_products().issue({N, kHalf, true, false, kBDown, accumulate, 0, b}, sums, a);
  }
};

// ---- arithmetic ------------------------------------------------------------------------------------------------------------

// Numbers below the normal ones are zeros, before and after.
inline float exp2_approx(float x) {
  const float y = exp2f(fabsf(x) < 0x1p-126f ? 0.f : x);
  return y < 0x1p-126f ? 0.f : y;
}

template <class T>
uint32_t pack(float low, float high) {
  const auto bits = [](float value) -> uint32_t {
    if constexpr (std::is_same_v<T, Half>)
      return emulated::to_half(value);
    else
      return to_bf16(value).bits;
  };
  return bits(low) | bits(high) << 16;
}

template <class T>
float unpack_low(uint32_t word) {
  return emulated::values_of(std::is_same_v<T, Half>)[word & 0xffff];
}
template <class T>
float unpack_high(uint32_t word) {
  return emulated::values_of(std::is_same_v<T, Half>)[word >> 16];
}

}  // namespace genengine::hopper
