// Barriers in shared memory (mbarrier) and numbered ones (bar.sync, bar.arrive), and the registers that warpgroups hand over.
#pragma once
#include <stdint.h>

#include <map>
#include <numeric>
#include <vector>

#include "cuda/hopper/memory.h"

namespace genengine::hopper::emulated {

class Barriers {
 public:
  explicit Barriers(SharedMemory& memory) : memory_(memory) {}
  void begin() { barriers_.clear(); }

  void init(uint64_t* barrier, int arrivals) {
    const uint32_t at = memory_.address(barrier);
    if (at % 8 != 0) refuse("barrier_init: barrier at %u must be aligned to 8 bytes", at);
    if (arrivals < 1) refuse("barrier_init: arrivals must be at least 1, got %d", arrivals);
    if (barriers_.count(at)) refuse("barrier_init: barrier at %u was made before", at);
    barriers_[at] = {arrivals, arrivals, 0, 0, Fibers::instance().thread(), false};
    *barrier = mark(at);
  }

  void publish() {
    for (auto& [at, state] : barriers_) state.published |= state.maker == Fibers::instance().thread();
  }

  void arrive(uint32_t at, uint32_t bytes) {
    State& state = find(at, "arrival");
    if (state.arrivals == 0) refuse("barrier at %u: more than its %d arrivals in a phase", at, state.each);
    state.bytes += bytes;
    --state.arrivals;
    end_phase(state);
  }

  // Bytes of a copy that have come.
  void complete(uint32_t at, uint32_t bytes) {
    State& state = find(at, "copy");
    state.bytes -= bytes;
    if (state.bytes < 0) refuse("barrier at %u: copies brought %lld bytes more than it expects", at, -1ll * state.bytes);
    end_phase(state);
  }

  void wait(uint32_t at, uint32_t parity) {
    State& state = find(at, "wait");
    if (parity > 1) refuse("barrier_wait: parity must be 0 or 1, got %u", parity);
    if ((state.phase & 1) != parity) return Fibers::instance().wait_until([] { return true; }, [] { return ""; });
    const int64_t phase = state.phase;
    Fibers::instance().wait_until(
        [&state, parity] { return (state.phase & 1) != parity; },
        [&state, at, parity] {
          return text("for parity %u of the barrier at %u: in phase %lld, %d of %d arrivals and %lld bytes missing", parity, at,
                      static_cast<long long>(state.phase), state.arrivals, state.each, static_cast<long long>(state.bytes));
        });
    if (state.phase > phase + 1) refuse("barrier at %u: two phases ended while a thread waited for the first", at);
  }

  // Whoever uses a barrier: it is there.
  void check(uint32_t at, const char* what) { find(at, what); }

 private:
  struct State {
    int each, arrivals;  // of a phase; missing
    int64_t bytes, phase;
    int maker;
    bool published;
  };

  static uint64_t mark(uint32_t at) { return 0x6261727269657200ull ^ static_cast<uint64_t>(at) << 32; }

  State& find(uint32_t at, const char* what) {
    const auto found = barriers_.find(at);
    if (found == barriers_.end()) refuse("barrier at %u: %s before barrier_init", at, what);
    if (!found->second.published) refuse("barrier at %u: %s before its maker's barrier_publish", at, what);
    uint64_t bits;
    memcpy(&bits, memory_.data() + (at - SharedMemory::kFirst), sizeof(bits));
    if (bits != mark(at)) refuse("barrier at %u: overwritten in shared memory", at);
    return found->second;
  }

  static void end_phase(State& state) {
    if (state.arrivals != 0 || state.bytes != 0) return;
    ++state.phase;
    state.arrivals = state.each;
  }

  SharedMemory& memory_;
  std::map<uint32_t, State> barriers_;
};

class NamedBarriers {
 public:
  void begin(int threads) {
    for (State& state : states_) state = {0, 0, 0, std::vector<int>(threads / kWarpThreads)};
  }

  void end() const {
    for (const State& state : states_)
      if (state.come != 0)
        refuse("named barrier %td: %d arrivals of %d at the end", &state - states_, state.come, state.threads);
  }

  void arrive(int id, int threads) { join(id, threads); }

  void sync(int id, int threads) {
    const int64_t turn = join(id, threads);
    State& state = states_[id];
    const auto why = [&state, id] {
      return text("for named barrier %d: %d of %d threads have come", id, state.come, state.threads);
    };
    Fibers::instance().wait_until([&state, turn] { return state.turn > turn; }, why);
  }

 private:
  struct State {
    int threads = 0, come = 0;
    int64_t turn = 0;
    std::vector<int> of_warp;
  };

  // The number of the turn that the thread takes part in.
  int64_t join(int id, int threads) {
    if (id < 1 || id > 15) refuse("named barrier: id must be 1 .. 15, got %d", id);
    if (threads < kWarpThreads || threads % kWarpThreads != 0)
      refuse("named barrier %d: %d threads are not whole warps", id, threads);
    State& state = states_[id];
    if (state.come > 0 && state.threads != threads)
      refuse("named barrier %d: of %d threads and of %d", id, state.threads, threads);
    state.threads = threads;
    ++state.come;
    ++state.of_warp[Fibers::instance().thread() / kWarpThreads];
    const int64_t turn = state.turn;
    if (state.come == threads) {
      for (int& count : state.of_warp)
        if (std::exchange(count, 0) % kWarpThreads != 0) refuse("named barrier %d: a warp came in part", id);
      state.come = 0;
      ++state.turn;
    }
    return turn;
  }

  State states_[16];
};

// setmaxnreg: the block has the registers of its launch, and a thread that wants more waits until they were given up.
class Registers {
 public:
  void begin(int threads, int each) {
    all_ = threads * each;
    of_thread_.assign(threads, each);
  }

  void change(int count, bool take) {
    int& mine = of_thread_[Fibers::instance().thread()];
    const char* name = take ? "take_registers" : "give_registers";
    if (count % 8 != 0 || count < 24 || count > 256)
      refuse("%s: count must be a multiple of 8 in 24 .. 256, got %d", name, count);
    if (take ? count < mine : count > mine) refuse("%s: the thread has %d registers, got count %d", name, mine, count);
    if (take)
      Fibers::instance().wait_until(
          [this, &mine, count] { return used() - mine + count <= all_; },
          [this, count] { return text("for %d registers: %d of %d are taken", count, used(), all_); });
    mine = count;
  }

  void end() const {
    for (size_t i = 0; i < of_thread_.size(); ++i)
      if (of_thread_[i] != of_thread_[i / 128 * 128])
        refuse("registers: only part of warpgroup %zu took or gave up some", i / 128);
  }

 private:
  int used() const { return std::accumulate(of_thread_.begin(), of_thread_.end(), 0); }

  int all_ = 0;
  std::vector<int> of_thread_;
};

}  // namespace genengine::hopper::emulated
