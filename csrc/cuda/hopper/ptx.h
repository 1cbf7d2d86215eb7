// Hopper's instructions that C++ has no words for, one function each: barriers in shared memory, the bulk tensor copy engine
// (TMA), products of a warpgroup (wgmma), register hand-over. tests/emulated/cuda/hopper/ptx.h stands in for it without a GPU.
// Names and semantics: PTX ISA 8.x, sections on mbarrier, cp.async.bulk, wgmma and setmaxnreg.
//
// Tiles in shared memory. A tile of `rows` x 16-bit elements is made of boxes of kColumns = 16, 32 or 64 columns, a box after the
// other, each `rows` lines of 2 kColumns bytes; within a line the 16-byte chunks are swizzled by the line's number, as TMA writes
// them and wgmma reads them: address bits 4.. are xored with bits 7.., one bit for 32-byte lines, two for 64, three for 128.
// Boxes begin at multiples of 1024 bytes, so that these are bits of the offset in the box, too.
#pragma once
#include <cuda.h>
#include <stdint.h>

#include <type_traits>

#include "cuda/hopper/matrix.h"
#include "cuda/warp.h"

namespace genengine::hopper {

constexpr int kWarpgroup = 128;  // threads that issue a product together

struct Half {
  uint16_t bits;
};
struct alignas(16) FourWords {
  uint32_t word[4];
};

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

GENENGINE_DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }
GENENGINE_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
GENENGINE_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

// ---- barriers in shared memory: a phase ends when all arrivals and all bytes it waits for have come ------------------------

GENENGINE_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the barriers were made and before anyone else, TMA included, sees them; a block barrier follows.
GENENGINE_DEVICE void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and makes the phase wait for as many bytes of copies.
GENENGINE_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

GENENGINE_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Until the phase with this parity has ended: 0 for the first, 1 for the second, 0 again for the third.
GENENGINE_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra WAIT;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Barriers of some of the block's threads, by number 1 .. 15 (0 is __syncthreads): `threads` counts those that sync and arrive.
GENENGINE_DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
GENENGINE_DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// All threads of a warpgroup: take registers that others have given up, or give up those above Count (a multiple of 8).
template <int Count>
GENENGINE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
GENENGINE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- copies ----------------------------------------------------------------------------------------------------------------

GENENGINE_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// The map's box at the coordinates (innermost first) into shared memory, zeros beyond the tensor's end; its bytes, all of the
// box's, count at the barrier. One thread.
GENENGINE_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Bytes of global memory as they are, both ends and the count multiples of 16, counted at the barrier. One thread.
GENENGINE_DEVICE void bulk_load(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(reinterpret_cast<uint64_t>(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// A box of shared memory into the tensor, nothing beyond its end. One thread, which also commits and waits.
GENENGINE_DEVICE void tma_store(const TensorMap* map, const void* from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// to[i] += from[i], bytes / 4 floats, both ends 16-byte aligned; the additions of several blocks come in any order.
GENENGINE_DEVICE void bulk_add(float* to, const float* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   reinterpret_cast<uint64_t>(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

GENENGINE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most Pending of this thread's groups have yet to read their shared memory, or to be written entirely.
template <int Pending>
GENENGINE_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
template <int Pending>
GENENGINE_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

GENENGINE_DEVICE void store_shared(void* to, uint32_t word) { *static_cast<uint32_t*>(to) = word; }
GENENGINE_DEVICE void store_shared(void* to, const FourFloats& values) { *static_cast<FourFloats*>(to) = values; }

// Each thread that wrote shared memory with ordinary stores, before the barrier after which TMA or wgmma reads it.
GENENGINE_DEVICE void publish_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- turns of blocks: counters in global memory ----------------------------------------------------------------------------

// Until the counter has reached `value`; what its writers wrote before is then seen, by bulk copies that follow, too.
GENENGINE_DEVICE void await_count(const int* counter, int value) {
  int found;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
  while (found < value);
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Counts one up after all this thread has written, by bulk copies that it has waited for, too.
GENENGINE_DEVICE void count_up(int* counter) {
  asm volatile("fence.proxy.async;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// ---- products --------------------------------------------------------------------------------------------------------------

// Before the first product of a batch, and after registers that take part were written by other instructions.
GENENGINE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GENENGINE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most Pending committed batches are unfinished; only then are sums read and operands overwritten.
template <int Pending>
GENENGINE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler may not move work on these registers across this place.
template <int Count, class Register>
GENENGINE_DEVICE void pin(Register (&values)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if constexpr (std::is_same_v<Register, float>)
      asm volatile("" : "+f"(values[i])::"memory");
    else
      asm volatile("" : "+r"(values[i])::"memory");
  }
}

// sums (64 x N) = a (64 x 16) b (16 x N) + (accumulate ? sums : 0), by all threads of a warpgroup. Thread i holds of the sums
// rows 16 (i / 32) + i % 32 / 4 (registers 4 k, 4 k + 1) and 8 rows below (4 k + 2, 4 k + 3), columns 8 k + 2 (i % 4) and the
// next. Of an a in registers, in pairs: the same rows, columns 2 (i % 4) and the next (words 0, 1: upper row, lower), and 8
// columns on (words 2, 3). A, B: whether the sum runs along the rows of the tile that holds them or down its columns.
template <class T, int N>
struct Product;

#define GENENGINE_S8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define GENENGINE_S16_0 GENENGINE_S8(0, 1, 2, 3, 4, 5, 6, 7) ", " GENENGINE_S8(8, 9, 10, 11, 12, 13, 14, 15)
#define GENENGINE_S16_1 GENENGINE_S8(16, 17, 18, 19, 20, 21, 22, 23) ", " GENENGINE_S8(24, 25, 26, 27, 28, 29, 30, 31)
#define GENENGINE_S16_2 GENENGINE_S8(32, 33, 34, 35, 36, 37, 38, 39) ", " GENENGINE_S8(40, 41, 42, 43, 44, 45, 46, 47)
#define GENENGINE_S16_3 GENENGINE_S8(48, 49, 50, 51, 52, 53, 54, 55) ", " GENENGINE_S8(56, 57, 58, 59, 60, 61, 62, 63)
#define GENENGINE_S16_4 GENENGINE_S8(64, 65, 66, 67, 68, 69, 70, 71) ", " GENENGINE_S8(72, 73, 74, 75, 76, 77, 78, 79)
#define GENENGINE_S32 GENENGINE_S16_0 ", " GENENGINE_S16_1
#define GENENGINE_S36 GENENGINE_S32 ", %32, %33, %34, %35"
#define GENENGINE_S40 GENENGINE_S32 ", " GENENGINE_S8(32, 33, 34, 35, 36, 37, 38, 39)
#define GENENGINE_S48 GENENGINE_S32 ", " GENENGINE_S16_2
#define GENENGINE_S64 GENENGINE_S48 ", " GENENGINE_S16_3
#define GENENGINE_S88 GENENGINE_S64 ", " GENENGINE_S16_4 ", " GENENGINE_S8(80, 81, 82, 83, 84, 85, 86, 87)
#define GENENGINE_F4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define GENENGINE_F16(i) GENENGINE_F4(i), GENENGINE_F4(i + 4), GENENGINE_F4(i + 8), GENENGINE_F4(i + 12)
#define GENENGINE_F32 GENENGINE_F16(0), GENENGINE_F16(16)
#define GENENGINE_F36 GENENGINE_F32, GENENGINE_F4(32)
#define GENENGINE_F40 GENENGINE_F36, GENENGINE_F4(36)
#define GENENGINE_F48 GENENGINE_F32, GENENGINE_F16(32)
#define GENENGINE_F64 GENENGINE_F48, GENENGINE_F16(48)
#define GENENGINE_F88 GENENGINE_F64, GENENGINE_F16(64), GENENGINE_F4(80), GENENGINE_F4(84)

#define GENENGINE_SHARED(N, KIND, R, r0, r1, r2, r3, r4)                                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND  \
               " {" GENENGINE_S##R "}, %" #r0 ", %" #r1 ", p, 1, 1, %" #r3 ", %" #r4 ";\n}"                                    \
               : GENENGINE_F##R                                                                                                \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(A)), "n"(static_cast<int>(B)))
#define GENENGINE_REGISTERS(N, KIND, R, r0, r1, r2, r3, r4, r5, r6)                                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND  \
               " {" GENENGINE_S##R "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4 ", p, 1, 1, %" #r6 ";\n}"              \
               : GENENGINE_F##R                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(B)))
#define GENENGINE_PRODUCT(N, R, r0, r1, r2, r3, r4, r5, r6)                                                                    \
  template <class T>                                                                                                           \
  struct Product<T, N> {                                                                                                       \
    template <Sums A, Sums B>                                                                                                  \
    GENENGINE_DEVICE static void of_shared(float (&sums)[R], uint64_t a, uint64_t b, bool accumulate) {                        \
      if constexpr (std::is_same_v<T, Half>)                                                                                   \
        GENENGINE_SHARED(N, "f16", R, r0, r1, r2, r3, r4);                                                                     \
      else                                                                                                                     \
        GENENGINE_SHARED(N, "bf16", R, r0, r1, r2, r3, r4);                                                                    \
    }                                                                                                                          \
    template <Sums B>                                                                                                          \
    GENENGINE_DEVICE static void of_registers(float (&sums)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {         \
      if constexpr (std::is_same_v<T, Half>)                                                                                   \
        GENENGINE_REGISTERS(N, "f16", R, r0, r1, r2, r3, r4, r5, r6);                                                          \
      else                                                                                                                     \
        GENENGINE_REGISTERS(N, "bf16", R, r0, r1, r2, r3, r4, r5, r6);                                                         \
    }                                                                                                                          \
  }
GENENGINE_PRODUCT(64, 32, 32, 33, 34, 35, 36, 37, 38);
GENENGINE_PRODUCT(72, 36, 36, 37, 38, 39, 40, 41, 42);
GENENGINE_PRODUCT(80, 40, 40, 41, 42, 43, 44, 45, 46);
GENENGINE_PRODUCT(96, 48, 48, 49, 50, 51, 52, 53, 54);
GENENGINE_PRODUCT(128, 64, 64, 65, 66, 67, 68, 69, 70);
GENENGINE_PRODUCT(176, 88, 88, 89, 90, 91, 92, 93, 94);

// ---- arithmetic ------------------------------------------------------------------------------------------------------------

// 2^x to 2 units in the last place; 0 for -inf.
GENENGINE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to T, the first in the lower half.
template <class T>
GENENGINE_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The halves of such a word.
template <class T>
GENENGINE_DEVICE float unpack_low(uint32_t word) {
  if constexpr (std::is_same_v<T, Bf16>) return __uint_as_float(word << 16);
  float value;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(value) : "r"(word));
  return value;
}
template <class T>
GENENGINE_DEVICE float unpack_high(uint32_t word) {
  if constexpr (std::is_same_v<T, Bf16>) return __uint_as_float(word & 0xffff0000u);
  return unpack_low<T>(word >> 16);
}

}  // namespace genengine::hopper
