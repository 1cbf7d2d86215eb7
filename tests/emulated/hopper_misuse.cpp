// Wrong uses of Hopper's instructions, each of which tests/emulated/cuda/hopper must find: for
// tests/ops/test_hopper_instructions.py.
#include <functional>
#include <map>
#include <string>

#include "cuda/hopper/ptx.h"

using namespace genengine;
using namespace genengine::hopper;

namespace {

constexpr Sums kAlong = Sums::along_rows;
using P64 = Product<Bf16, 64>;

alignas(16) char tensor[64 * 128];  // global memory: 64 rows of 128 bytes
alignas(64) const TensorMap map = {tensor, {64, 1, 64, 1}, {2, 128, 128, 128}, {64, 1, 64, 1}, 2, 128};
constexpr uint32_t kTile = 64 * 128;

// What a thread has: barriers from the beginning on, and two tiles.
struct Thread {
  char* memory;
  int number = thread_index();
  bool first = number == 0;

  Barrier* barrier(int i = 0) const { return reinterpret_cast<Barrier*>(memory) + i; }
  char* tile(int i = 0) const { return memory + 1024 + i * kTile; }
  uint64_t matrix(int i = 0) const { return hopper::matrix<kAlong, 128>(tile(i)); }

  void make(int arrivals = 1) const {
    if (first) barrier_init(barrier(), arrivals), barrier_publish();
    block_barrier();
  }
  void load(int i = 0) const {
    if (first) barrier_expect(barrier(), kTile), tma_load(tile(i), &map, barrier(), 0, 0, 0, 0);
  }
  void loaded() const {
    make();
    load();
    barrier_wait(barrier(), 0);
  }
  void store(int i = 0) const { tma_store(&map, tile(i), 0, 0, 0, 0), bulk_commit(); }
};

struct Registers {
  float sums[32] = {};
  uint32_t a[4] = {};
};

using Misuse = std::function<void(const Thread&)>;

void of_barriers(std::map<std::string, Misuse>& all) {
  all["arrive too often"] = [](const Thread& t) {
    t.make();
    if (t.first) barrier_expect(t.barrier(), 16), barrier_arrive(t.barrier());
  };
  all["bytes not expected"] = [](const Thread& t) {
    t.make();
    if (t.first) tma_load(t.tile(), &map, t.barrier(), 0, 0, 0, 0), barrier_wait(t.barrier(), 0);
  };
  all["barrier not made"] = [](const Thread& t) { barrier_wait(t.barrier(), 0); };
  all["barrier not published"] = [](const Thread& t) {
    if (t.first) barrier_init(t.barrier(), 1);
    block_barrier();
    barrier_wait(t.barrier(), 0);
  };
  all["barrier made twice"] = [](const Thread& t) { t.make(), t.make(); };
  all["barrier misaligned"] = [](const Thread& t) {
    struct Bytes {
      char bytes[8];
    };
    barrier_init(reinterpret_cast<Barrier*>(reinterpret_cast<Bytes*>(t.memory + 4)), 1);
  };
  all["barrier overwritten"] = [](const Thread& t) {
    t.make();
    if (t.first) memset(t.memory, 0, 8);
    block_barrier();
    barrier_wait(t.barrier(), 0);
  };
  all["nobody arrives"] = [](const Thread& t) { t.make(), barrier_wait(t.barrier(), 0); };
  all["a phase passes unseen"] = [](const Thread& t) {
    t.make();
    if (t.first)
      for (int i = 0; i < 100; ++i) barrier_arrive(t.barrier()), barrier_wait(t.barrier(), i % 2);
    else
      barrier_wait(t.barrier(), 0);
  };
  all["named: too few"] = [](const Thread&) { named_sync(3, 256); };
  all["named: part of a warp"] = [](const Thread& t) {
    for (int i = t.number % 32 < 16 ? 0 : 1; i < 2; ++i) named_arrive(3, 96);
  };
  all["named: different counts"] = [](const Thread& t) { named_sync(3, t.number < 64 ? 64 : 128); };
  all["named: left over"] = [](const Thread&) { named_arrive(3, 256); };
  all["a thread leaves"] = [](const Thread& t) {
    if (!t.first) block_barrier();
  };
}

void of_copies(std::map<std::string, Misuse>& all) {
  all["copy misaligned"] = [](const Thread& t) {
    t.make();
    if (t.first) tma_load(t.tile() + 16, &map, t.barrier(), 0, 0, 0, 0);
  };
  all["copy beyond the memory"] = [](const Thread& t) {
    t.make();
    if (t.first) tma_load(t.tile(1) + 1024, &map, t.barrier(), 0, 0, 0, 0);
  };
  all["map of odd strides"] = [](const Thread&) {
    TensorMap odd = map;
    odd.stride[2] = 72;
    prefetch_map(&odd);
  };
  all["map of long lines"] = [](const Thread&) {
    TensorMap wide = map;
    wide.swizzle = 64;
    prefetch_map(&wide);
  };
  all["a load is left"] = [](const Thread& t) { t.make(), t.load(); };
  all["loads overlap"] = [](const Thread& t) {
    t.make(2);
    t.load(), t.load();
  };
  all["load where a store reads"] = [](const Thread& t) {
    t.loaded();
    if (t.first) t.store(), t.load(), bulk_wait_read<0>(), barrier_wait(t.barrier(), 1);
  };
  all["store not waited for"] = [](const Thread& t) {
    t.loaded();
    if (t.first) t.store();
  };
  all["store's memory overwritten"] = [](const Thread& t) {
    t.loaded();
    if (t.first) t.store(), store_shared(t.tile(), 5), publish_to_async(), bulk_wait_read<0>();
  };
  all["store not published"] = [](const Thread& t) {
    t.loaded();
    store_shared(t.tile() + 4 * t.number, t.number);
    block_barrier();
    if (t.first) t.store(), bulk_wait_read<0>();
  };
  all["published by another"] = [](const Thread& t) {
    t.loaded();
    store_shared(t.tile() + 4 * t.number, t.number);
    block_barrier();
    if (t.first) publish_to_async(), t.store(), bulk_wait_read<0>();
  };
  all["load of odd bytes"] = [](const Thread& t) {
    t.make();
    if (t.first) bulk_load(t.tile(), tensor, 24, t.barrier());
  };
  all["counted up before it is written"] = [](const Thread& t) {
    static int counter;
    t.loaded();
    if (t.first) t.store(), bulk_wait_read<0>(), count_up(&counter);
  };
  all["a turn never comes"] = [](const Thread&) {
    static const int counter = 2;
    await_count(&counter, 3);
  };
  all["beyond the memory"] = [](const Thread& t) { memset(t.tile(2), 1, 4); };
}

void of_products(std::map<std::string, Misuse>& all) {
  const auto multiply = [](const Thread& t, Registers& r) {
    P64::of_shared<kAlong, kAlong>(r.sums, t.matrix(), t.matrix(), true);
  };
  const auto finish = [] { wgmma_commit(), wgmma_wait<0>(); };
  all["no fence"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), multiply(t, r), finish();
  };
  all["no fence for the second batch"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), multiply(t, r), finish(), multiply(t, r), finish();
  };
  all["sums written after the fence"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), multiply(t, r), finish(), wgmma_fence();
    r.sums[3] += 1;
    multiply(t, r), finish();
  };
  all["sums written in flight"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), multiply(t, r), wgmma_commit();
    r.sums[3] = 0;
    wgmma_wait<0>();
  };
  all["operand overwritten in flight"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), P64::of_registers<kAlong>(r.sums, r.a, t.matrix(), false), wgmma_commit();
    r.a[1] = 7;
    wgmma_wait<0>();
  };
  all["operand written after the fence"] = [=](const Thread& t) {
    Registers r;
    t.loaded();
    for (int i = 0; i < 2; ++i) {
      wgmma_fence();
      if (i == 1) r.a[1] = 7;
      P64::of_registers<kAlong>(r.sums, r.a, t.matrix(), false);
      finish();
    }
  };
  all["not committed"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), multiply(t, r), wgmma_wait<0>();
  };
  all["not waited for"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), multiply(t, r), wgmma_commit(), wgmma_wait<1>();
  };
  all["different products"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence();
    P64::of_shared<kAlong, kAlong>(r.sums, t.matrix(), advanced(t.matrix(), t.number < 32 ? 0 : 32), false);
    finish();
  };
  all["different batches"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), multiply(t, r);
    if (t.first) wgmma_commit(), wgmma_fence();
    multiply(t, r), finish();
  };
  all["a warp does not multiply"] = [=](const Thread& t) {
    Registers r;
    t.loaded();
    if (t.number >= 32) wgmma_fence(), multiply(t, r), finish();
  };
  all["matrix within a pattern"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), P64::of_shared<kAlong, kAlong>(r.sums, advanced(t.matrix(), 128), t.matrix(), false), finish();
  };
  all["matrix beyond a line"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), P64::of_shared<kAlong, kAlong>(r.sums, advanced(t.matrix(), 112), t.matrix(), false), finish();
  };
  all["matrix beyond the memory"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), wgmma_fence(), P64::of_shared<kAlong, kAlong>(r.sums, advanced(t.matrix(1), 1024), t.matrix(), false), finish();
  };
  all["operand not published"] = [=](const Thread& t) {
    Registers r;
    t.loaded(), store_shared(t.tile() + 4 * t.number, t.number), block_barrier(), wgmma_fence(), multiply(t, r), finish();
  };
}

void of_registers(std::map<std::string, Misuse>& all) {
  all["not in eights"] = [](const Thread&) { give_registers<100>(); };
  all["gives what it has not"] = [](const Thread&) { give_registers<256>(); };
  all["takes less than it has"] = [](const Thread&) { take_registers<24>(); };
  all["takes more than there are"] = [](const Thread&) { take_registers<256>(); };
  all["part of a warpgroup gives"] = [](const Thread& t) {
    if (t.number < 64) give_registers<24>();
  };
}

}  // namespace

// For every seed below `seeds`, since some are seen only where work is done late.
extern "C" void misuse(const char* name, int seeds) {
  std::map<std::string, Misuse> all;
  of_barriers(all), of_copies(all), of_products(all), of_registers(all);
  const Misuse& body = all.at(name);
  for (int seed = 0; seed < seeds; ++seed)
    emulated::Grid::instance().run({128, 1, 1024 + 2 * kTile, static_cast<uint64_t>(seed)},
                                    [&](char* memory) { body(Thread{memory}); });
}

// A product whose operand is overwritten, or whose sums are read, before it was waited for: what comes out, at `sums` (64, 64).
extern "C" void too_early(float* sums, int overwrite, int read, uint64_t seed) {
  emulated::Grid::instance().run({128, 1, 1024 + 2 * kTile, seed}, [&](char* memory) {
    const Thread t{memory};
    Registers r;
    for (uint16_t i = 0; t.first && i < 64 * 64; ++i) memcpy(tensor + 2 * i, i % 65 ? "\0\0" : "\x80\x3f", 2);  // the identity
    t.loaded();
    wgmma_fence();
    P64::of_shared<kAlong, kAlong>(r.sums, t.matrix(), t.matrix(), false);
    wgmma_commit();
    block_barrier();
    if (overwrite) t.load();
    if (!read) wgmma_wait<0>();
    memcpy(sums + 32 * t.number, r.sums, sizeof(r.sums));
    wgmma_wait<0>();
    if (overwrite) barrier_wait(t.barrier(), 1);
  });
}
