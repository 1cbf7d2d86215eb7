// wgmma: a warpgroup's products, done at drawn times between their issue and the wait that covers them, each warp's rows at a
// time of their own: a warp's wait says nothing of the others. Sums in flight are NaN to their threads, who may not write them
// either; operands in registers must stay as they are until then.
#pragma once
#include <stdint.h>

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "cuda/hopper/operands.h"

namespace genengine::hopper::emulated {

class Products {
 public:
  Products(const SharedMemory& memory, Draws& draws, int first_thread)
      : memory_(&memory), draws_(&draws), first_thread_(first_thread) {}

  void fence() {
    Thread& mine = me();
    mine.fenced = true;
    for (Seen& seen : mine.seen) memcpy(seen.words.data(), seen.at, seen.words.size() * 4);
  }

  // This thread's part of an instruction that all of the warpgroup issue.
  [[gnu::noinline]] void issue(const Instruction& what, float* sums, const uint32_t* a) {
    Thread& mine = me();
    if (!mine.fenced) refuse("wgmma: no wgmma_fence before the first product of a batch");
    const int64_t number = mine.issued++;
    if (number == first_ + static_cast<int64_t>(queue_.size()))
      queue_.push_back({what, sums_at(sums, what.columns), {}, 0, draws_->pace()});
    Issued& issued = queue_[number - first_];
    if (!(issued.what == what)) refuse("wgmma: the threads of a warpgroup issue different products");
    take(*issued.sums, sums, what.accumulate, number);
    if (what.a_in_registers) {
      unchanged_since_fence(a, 4);
      memcpy(issued.a[index()].data(), a, 16);
      mine.held.push_back({a, number, issued.a[index()]});
    }
    ++issued.threads;
    if (issued.threads == kThreads && issued.pace == Pace::at_once) go_on(false);
  }

  void commit() {
    Thread& mine = me();
    const size_t number = mine.commits++;
    if (number == ends_.size()) ends_.push_back(mine.issued);
    if (ends_[number] != mine.issued) refuse("wgmma_commit: the threads of a warpgroup commit different products");
    mine.fenced = false;
  }

  // Until at most `pending` of the thread's batches are unfinished.
  void wait(int pending) {
    const int64_t batches = static_cast<int64_t>(me().commits) - pending, done = batches > 0 ? ends_[batches - 1] : 0;
    const int64_t& mine_done = done_[index() / kWarpThreads];
    Fibers::instance().wait_until([&mine_done, done] { return mine_done >= done; },
                                  [&mine_done, done] {
                                    return text("for products: %lld of %lld are done", static_cast<long long>(mine_done),
                                                static_cast<long long>(done));
                                  });
    Thread& mine = me();
    for (const Held& held : mine.held)
      if (held.number < done && memcmp(held.at, held.words.data(), 16) != 0)
        refuse("wgmma: registers of an operand were overwritten before the product had read them");
    std::erase_if(mine.held, [done](const Held& held) { return held.number < done; });
    for (auto& sums : sums_) give(*sums, done);
    std::erase_if(sums_, [](const auto& sums) { return sums->holders == 0; });
  }

  void leave() {
    const Thread& mine = me();
    if (mine.issued > (mine.commits ? ends_[mine.commits - 1] : 0))
      refuse("wgmma: products were not committed when their thread ends");
    for (const auto& sums : sums_)
      if (sums->of[index()]) refuse("wgmma: products were not waited for when their thread ends");
  }

  // A warp's rows are done product after product: those whose time has come, or some for sure. Says whether any were.
  bool go_on(bool force) {
    bool any = false;
    const size_t first_warp = draws_->below(kWarps);
    for (size_t i = 0; i < queue_.size() && queue_[i].threads == kThreads; ++i) {
      std::vector<int> warps;
      for (size_t j = 0; j < kWarps; ++j) {
        const int warp = static_cast<int>((first_warp + j) % kWarps);
        const Pace pace = queue_[i].pace;
        if (done_[warp] != first_ + static_cast<int64_t>(i)) continue;
        if (!(pace == Pace::at_once || std::exchange(force, false) || (pace == Pace::drawn && draws_->one_in(3)))) continue;
        warps.push_back(warp);
        ++done_[warp];
      }
      if (!warps.empty()) multiply(queue_[i], warps);
      any |= !warps.empty();
    }
    while (!queue_.empty() && *std::min_element(done_.begin(), done_.end()) > first_) {
      queue_.pop_front();
      ++first_;
    }
    return any;
  }

 private:
  static constexpr int kWarps = kThreads / kWarpThreads, kWarpRows = kRows / kWarps;
  static constexpr uint32_t kInFlight = 0x7fdead01;  // a NaN

  // Sums while products are to be added to them: value[row * columns + column], and where each thread has its own.
  struct Sums {
    int columns, holders = 0;
    std::vector<float> value;
    std::array<float*, kThreads> of{};
    std::array<int64_t, kThreads> last{};  // product
  };
  struct Issued {
    Instruction what;
    std::shared_ptr<Sums> sums;
    std::array<std::array<uint32_t, 4>, kThreads> a;
    int threads;
    Pace pace;
  };
  struct Held {
    const uint32_t* at;
    int64_t number;
    std::array<uint32_t, 4> words;
  };
  // Registers that took part in products, as they were at the last fence.
  struct Seen {
    const void* at;
    std::vector<uint32_t> words;
  };
  struct Thread {
    int64_t issued = 0;
    size_t commits = 0;
    bool fenced = false;
    std::vector<Held> held;
    std::vector<Seen> seen;
  };

  int index() const { return Fibers::instance().thread() - first_thread_; }
  Thread& me() { return threads_[index()]; }

  std::shared_ptr<Sums> sums_at(const float* at, int columns) {
    for (auto& sums : sums_)
      if (sums->of[index()] == at) {
        if (sums->columns != columns) refuse("wgmma: sums of %d columns and of %d at the same place", sums->columns, columns);
        return sums;
      }
    sums_.push_back(std::make_shared<Sums>(Sums{columns, 0, std::vector<float>(kRows * columns), {}, {}}));
    return sums_.back();
  }

  // From the thread's registers, which are NaN from then on.
  void take(Sums& sums, float* at, bool accumulate, int64_t number) {
    const int thread = index(), count = sums.columns / 2;
    sums.last[thread] = number;
    if (sums.of[thread] == at) return;
    for (const auto& other : sums_)
      if (other->of[thread] == at) refuse("wgmma: sums are in flight for some threads of the warpgroup and not for others");
    if (sums.of[thread]) refuse("wgmma: the threads of a warpgroup add to different sums");
    if (accumulate) unchanged_since_fence(at, count);
    sums.of[thread] = at;
    ++sums.holders;
    for (int i = 0; i < count; ++i) {
      sums.value[row_of(thread, i) * sums.columns + column_of(thread, i)] = at[i];
      memcpy(at + i, &kInFlight, 4);
    }
  }

  // Back to the thread's registers, if the products up to `done` were the last.
  void give(Sums& sums, int64_t done) {
    const int thread = index();
    float* at = sums.of[thread];
    if (!at || sums.last[thread] >= done) return;
    for (int i = 0; i < sums.columns / 2; ++i) {
      if (memcmp(at + i, &kInFlight, 4) != 0) refuse("wgmma: sums were written while a product was to be added to them");
      at[i] = sums.value[row_of(thread, i) * sums.columns + column_of(thread, i)];
    }
    sums.of[thread] = nullptr;
    --sums.holders;
  }

  void unchanged_since_fence(const void* at, int count) {
    Thread& mine = me();
    for (const Seen& seen : mine.seen)
      if (seen.at == at && static_cast<int>(seen.words.size()) == count) {
        if (memcmp(at, seen.words.data(), 4 * count) != 0) refuse("wgmma: registers were written after the wgmma_fence");
        return;
      }
    mine.seen.push_back({at, std::vector<uint32_t>(count)});
    memcpy(mine.seen.back().words.data(), at, 4 * count);
  }

  // The rows of some of the warps.
  void multiply(Issued& issued, const std::vector<int>& warps) {
    const Instruction& what = issued.what;
    const int columns = what.columns;
    a_.resize(kDepth * kRows);
    b_.resize(kDepth * columns);
    if (what.a_in_registers)
      decode(issued.a, what.half, a_.data());
    else
      decode(*memory_, what.a, what.a_down, what.half, kRows, a_.data());
    decode(*memory_, what.b, what.b_down, what.half, columns, b_.data());
    for (const int warp : warps)
      for (int row = warp * kWarpRows; row < (warp + 1) * kWarpRows; ++row) {
        float* sums = issued.sums->value.data() + row * columns;
        if (!what.accumulate) std::fill(sums, sums + columns, 0.f);
        for (int term = 0; term < kDepth; ++term) {
          const float a = a_[term * kRows + row], *b = b_.data() + term * columns;
          for (int i = 0; i < columns; ++i) sums[i] += a * b[i];
        }
      }
  }

  const SharedMemory* memory_;
  Draws* draws_;
  int first_thread_;
  std::array<Thread, kThreads> threads_;
  std::deque<Issued> queue_;  // issued and not done
  int64_t first_ = 0;         // number of the first of them
  std::array<int64_t, kWarps> done_{};  // by each warp
  std::vector<int64_t> ends_;  // of batches: products before
  std::vector<std::shared_ptr<Sums>> sums_;
  std::vector<float> a_, b_;
};

}  // namespace genengine::hopper::emulated
