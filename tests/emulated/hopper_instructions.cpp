// What tests/emulated/cuda/hopper does, one instruction after the other, for tests/ops/test_hopper_instructions.py.
#include <stddef.h>

#include <utility>

#include "cuda/hopper/ptx.h"

using namespace genengine;
using namespace genengine::hopper;

namespace {

constexpr uint32_t kFirstTile = 1024;  // barriers come before

template <class Body>
void run(int threads, uint64_t seed, size_t bytes, Body body, int blocks = 1) {
  emulated::Grid::instance().run({threads, blocks, bytes, seed}, body);
}

Barrier* barrier_at(char* memory, int number) { return reinterpret_cast<Barrier*>(memory) + number; }

// Barriers 0 .. count - 1, each of one arrival.
void make_barriers(char* memory, int count) {
  if (thread_index() == 0) {
    for (int i = 0; i < count; ++i) barrier_init(barrier_at(memory, i), 1);
    barrier_publish();
  }
  block_barrier();
}

// ---- products --------------------------------------------------------------------------------------------------------------

constexpr int kDepth = 80;

struct ProductCall {
  char *a, *b;  // as their tiles lie: (64, K) or (K, 64), and (N, K) or (K, N)
  float* sums;  // (64, N), which the product is added to
  uint64_t seed;
};

// A tile of rows x columns, in boxes of lines of `line` bytes; down: the sum runs down its columns.
struct Operand {
  int rows, columns, line;
  bool down;

  int box_columns() const { return line / 2; }
  int boxes() const { return (columns + box_columns() - 1) / box_columns(); }
  uint32_t box() const { return (rows * line + 1023) / 1024 * 1024; }
  uint32_t bytes() const { return boxes() * box(); }
  uint32_t copied() const { return boxes() * rows * line; }

  TensorMap map(char* base) const {
    const int64_t row = 2 * columns;
    return {base, {columns, 1, rows, 1}, {2, row, row, row}, {box_columns(), 1, rows, 1}, 2, line};
  }
  void load(char* to, const TensorMap& map, Barrier* barrier) const {
    for (int i = 0; i < boxes(); ++i) tma_load(to + i * box(), &map, barrier, i * box_columns(), 0, 0, 0);
  }
  template <int Line>
  uint64_t matrix_of(const char* tile) const {
    return down ? matrix<Sums::down_columns, Line>(tile, box()) : matrix<Sums::along_rows, Line>(tile);
  }
  // Of the 16 terms from 16 step on.
  uint64_t at(const char* tile, int step) const {
    const uint64_t first = line == 32 ? matrix_of<32>(tile) : line == 64 ? matrix_of<64>(tile) : matrix_of<128>(tile);
    const int term = 16 * step;
    return advanced(first, down ? term * line : term / box_columns() * box() + term % box_columns() * 2);
  }
};

using Issue = void (*)(float* sums, const uint32_t (&words)[4], uint64_t a, uint64_t b);

template <class T, int N, Sums A, Sums B, bool InRegisters>
void issue(float* sums, const uint32_t (&words)[4], uint64_t a, uint64_t b) {
  float(&mine)[N / 2] = reinterpret_cast<float(&)[N / 2]>(*sums);
  if constexpr (InRegisters)
    Product<T, N>::template of_registers<B>(mine, words, b, true);
  else
    Product<T, N>::template of_shared<A, B>(mine, a, b, true);
}

template <class T, int N>
Issue issue_of(int a, bool b_down) {
  constexpr Sums kAlong = Sums::along_rows, kDown = Sums::down_columns;
  if (a == 2) return b_down ? issue<T, N, kAlong, kDown, true> : issue<T, N, kAlong, kAlong, true>;
  if (a == 1) return b_down ? issue<T, N, kDown, kDown, false> : issue<T, N, kDown, kAlong, false>;
  return b_down ? issue<T, N, kAlong, kDown, false> : issue<T, N, kAlong, kAlong, false>;
}

template <class T, int... N>
Issue issue_of(int n, int a, bool b_down, std::integer_sequence<int, N...>) {
  Issue found = nullptr;
  ((n == N ? void(found = issue_of<T, N>(a, b_down)) : void()), ...);
  return found;
}

void multiply(const ProductCall& call, const Operand& a, const Operand& b, int n, Issue issue) {
  const TensorMap map_a = a.map(call.a), map_b = b.map(call.b);
  run(128, call.seed, kFirstTile + a.bytes() + b.bytes(), [&](char* memory) {
    char *tile_a = memory + kFirstTile, *tile_b = tile_a + a.bytes();
    make_barriers(memory, 1);
    if (thread_index() == 0) {
      barrier_expect(barrier_at(memory, 0), a.copied() + b.copied());
      a.load(tile_a, map_a, barrier_at(memory, 0));
      b.load(tile_b, map_b, barrier_at(memory, 0));
    }
    barrier_wait(barrier_at(memory, 0), 0);
    const int lane = thread_index() % 32, upper = thread_index() / 32 * 16 + lane / 4, left = lane % 4 * 2;
    const auto place = [&](int i) { return (upper + i / 2 % 2 * 8) * n + i / 4 * 8 + left + i % 2; };
    float sums[128];
    for (int i = 0; i < n / 2; ++i) sums[i] = call.sums[place(i)];
    uint32_t words[kDepth / 16][4] = {};
    for (int step = 0; step < kDepth / 16 && !a.down; ++step)
      for (int word = 0; word < 4; ++word)  // of a's rows in memory
        memcpy(&words[step][word], call.a + 2 * ((upper + word % 2 * 8) * kDepth + step * 16 + word / 2 * 8 + left), 4);
    wgmma_fence();
    for (int step = 0; step < kDepth / 16; ++step) issue(sums, words[step], a.at(tile_a, step), b.at(tile_b, step));
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < n / 2; ++i) call.sums[place(i)] = sums[i];
  });
}

}  // namespace

// a: 0 along rows, 1 down columns, 2 in registers (and along rows in memory).
extern "C" void product(const ProductCall* call, int half, int n, int line, int a, int b_down) {
  constexpr std::integer_sequence<int, 64, 72, 80, 96, 128, 176> kColumns;
  const Operand left = a == 1 ? Operand{kDepth, 64, line, true} : Operand{64, kDepth, line, false};
  const Operand right = b_down ? Operand{kDepth, n, line, true} : Operand{n, kDepth, line, false};
  multiply(*call, left, right, n, half ? issue_of<Half>(n, a, b_down, kColumns) : issue_of<Bf16>(n, a, b_down, kColumns));
}

// ---- copies ----------------------------------------------------------------------------------------------------------------

// As the test fills it: unaligned.
static TensorMap map_from(const void* fields) {
  TensorMap map;
  memcpy(&map, fields, offsetof(TensorMap, swizzle) + sizeof(map.swizzle));
  return map;
}

// A box at `from` into shared memory, whose bytes come out as `raw`, and from there into the other tensor at `to`.
extern "C" void copy_box(const void* source, const int* from, const void* target, const int* to, char* raw, uint64_t seed) {
  const TensorMap source_map = map_from(source), target_map = map_from(target);
  const uint32_t bytes = source_map.box_bytes();
  run(32, seed, kFirstTile + bytes, [&](char* memory) {
    char* tile = memory + kFirstTile;
    make_barriers(memory, 1);
    if (thread_index() == 0) {
      barrier_expect(barrier_at(memory, 0), bytes);
      tma_load(tile, &source_map, barrier_at(memory, 0), from[0], from[1], from[2], from[3]);
    }
    barrier_wait(barrier_at(memory, 0), 0);
    if (thread_index() != 7) return;
    memcpy(raw, tile, bytes);
    tma_store(&target_map, tile, to[0], to[1], to[2], to[3]);
    bulk_commit();
    bulk_wait_read<0>();
  });
}

extern "C" void add_floats(float* to, int count, int blocks, uint64_t seed) {
  run(64, seed, 4 * count, [&](char* memory) {
    float* sums = reinterpret_cast<float*>(memory);
    for (int i = thread_index(); i < count; i += 64) {
      const float value = static_cast<float>(i + block_index());
      uint32_t word;
      memcpy(&word, &value, 4);
      store_shared(sums + i, word);
    }
    publish_to_async();
    block_barrier();
    if (thread_index() != 0) return;
    bulk_add(to, sums, 4 * count);
    bulk_commit();
    bulk_wait<0>();
  }, blocks);
}

// `count` boxes through a ring of two, from a thread of one warp to all of another three, which add up what they see.
extern "C" void pass_on(const void* source, int count, float* sums, uint64_t seed) {
  const TensorMap map = map_from(source);
  const int floats = map.box_bytes() / 4;
  run(128, seed, kFirstTile + 2 * map.box_bytes(), [&](char* memory) {
    const auto tile = [&](int i) { return memory + kFirstTile + i % 2 * map.box_bytes(); };
    const auto full = [&](int i) { return barrier_at(memory, i % 2); };
    const auto empty = [&](int i) { return barrier_at(memory, 2 + i % 2); };
    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i) barrier_init(full(i), 1), barrier_init(empty(i), 96);
      barrier_publish();
    }
    block_barrier();
    if (thread_index() == 0)
      for (int i = 0; i < count; ++i) {
        barrier_wait(empty(i), i / 2 % 2 ^ 1);
        barrier_expect(full(i), map.box_bytes());
        tma_load(tile(i), &map, full(i), 0, 0, i, 0);
      }
    if (thread_index() < 32) return;
    for (int i = 0; i < count; ++i) {
      barrier_wait(full(i), i / 2 % 2);
      float sum = 0;
      for (int j = 0; j < floats; ++j) sum += reinterpret_cast<const float*>(tile(i))[j];
      sums[(thread_index() - 32) * count + i] = sum;
      barrier_arrive(empty(i));
    }
  });
}

// Bytes from one place to another by way of shared memory.
extern "C" void copy_floats(const float* from, float* to, int count, uint64_t seed) {
  run(64, seed, kFirstTile + 4 * count, [&](char* memory) {
    make_barriers(memory, 1);
    if (thread_index() == 0) {
      barrier_expect(barrier_at(memory, 0), 4 * count);
      bulk_load(memory + kFirstTile, from, 4 * count, barrier_at(memory, 0));
    }
    barrier_wait(barrier_at(memory, 0), 0);
    for (int i = thread_index(); i < count; i += 64) memcpy(to + i, memory + kFirstTile + 4 * i, 4);
  });
}

// All blocks at the same time, the last one first: each writes its number where its turn is.
extern "C" void in_turns(int* order, int blocks, uint64_t seed) {
  int turn = 0;
  const auto body = [&](char*) {
    if (thread_index() != 0) return;
    await_count(&turn, blocks - 1 - block_index());
    order[turn] = block_index();
    count_up(&turn);
  };
  emulated::Grid::instance().run({32, blocks, 0, seed, blocks}, body);
}

extern "C" float exp2_of(float x) { return exp2_approx(x); }
extern "C" uint32_t packed(float low, float high, int half) { return half ? pack<Half>(low, high) : pack<Bf16>(low, high); }
