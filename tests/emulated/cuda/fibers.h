// The threads of a block as fibers of one host thread. Between two points where they must wait for one another each runs alone,
// and which goes next is drawn: what depends on it is a race, and shows as results that differ with the seed of the draws.
// Threads that do not all come to a barrier are found out.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace genengine {

constexpr int kWarpThreads = 32;

class Fibers {
 public:
  enum class Wait { none, warp, block, until, over };

  // What goes on beside the threads (copies, say), once a round; idle: no thread may go on, unless this makes one. Says whether
  // anything happened.
  using Beside = std::function<bool(bool idle)>;

  // body() on each of `threads` threads; returns the number of times that all waited for one another. omit: every how manieth
  // barrier is left out, 0 for none: to see what a missing one does. blocks: as many, at the same time, of `threads` threads each.
  int64_t run(int threads, uint64_t seed, int omit, std::function<void()> body, Beside beside = {}, int blocks = 1) {
    of_block_ = threads;
    threads *= blocks;
    body_ = std::move(body);
    beside_ = std::move(beside);
    omit_ = omit;
    passed_.assign(threads, 0);
    draws_.seed(seed);
    barriers_ = 0;
    waits_.assign(threads, Wait::none);
    untils_.assign(threads, Until{});
    draw_paces();
    slots_.assign(threads, Slots{});
    started_.assign(threads, false);
    places_.resize(threads);
    stacks_.resize(threads);
    for (auto& stack : stacks_)
      if (!stack) stack.reset(new char[kStack]);
    while (schedule()) {
    }
    return barriers_;
  }

  // Of all; and as a block counts its own.
  int current() const { return current_; }
  int thread() const { return current_ % of_block_; }
  int block() const { return current_ / of_block_; }

  void wait(Wait for_what) {
    waits_[current_] = for_what;
    if (_setjmp(places_[current_].buffer) == 0) _longjmp(main_.buffer, 1);
  }

  void barrier() {
    if (omit_ == 0 || ++passed_[current_] % omit_ != 0) wait(Wait::block);
  }

  // Until free() holds; why() tells what that is if it never does.
  void wait_until(std::function<bool()> free, std::function<std::string()> why) {
    if (free() && draws_() % 2) return;
    untils_[current_] = {std::move(free), std::move(why)};
    wait(Wait::until);
    untils_[current_] = {};
  }

  // What every lane of the warp offers, read by each after all have offered: read(lane) gives another's.
  template <class T, class Read>
  auto exchange(const T& offered, Read read) {
    static_assert(sizeof(T) <= sizeof(Slots::bytes[0]));
    Slots& mine = slots_[current_];
    const int turn = mine.turn ^= 1;  // two slots: when this one is written again all have read it, or they would not be here
    memcpy(mine.bytes[turn], &offered, sizeof(T));
    wait(Wait::warp);
    const Slots* warp = &slots_[current_ / kWarpThreads * kWarpThreads];
    return read([=](int lane) {
      T value;
      memcpy(&value, warp[lane].bytes[turn], sizeof(T));
      return value;
    });
  }

  static Fibers& instance() {
    static Fibers fibers;
    return fibers;
  }

 private:
  static constexpr size_t kStack = 128 << 10;
  struct Slots {
    char bytes[2][32];
    int turn;
  };
  struct Place {
    jmp_buf buffer;
  };

  static void enter() {
    Fibers& self = instance();
    self.body_();
    self.wait(Wait::over);
  }

  // On to a thread, until it waits. Once begun, by jumps: to swap contexts asks the kernel for the signal mask each time.
  void go_on(int thread) {
    current_ = thread;
    if (_setjmp(main_.buffer) != 0) return;
    if (started_[thread]) _longjmp(places_[thread].buffer, 1);
    started_[thread] = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[thread].get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Fibers::enter, 0);
    setcontext(&context);
  }

  // Runs those that may, in a drawn order, then lets go those that waited for one another. False: all are over.
  bool schedule() {
    std::vector<int> ready;
    for (size_t i = 0; i < waits_.size(); ++i)
      if (waits_[i] == Wait::none) ready.push_back(static_cast<int>(i));
    std::shuffle(ready.begin(), ready.end(), draws_);
    bool may_go_on = false;
    const std::vector<char> rests = draw_rests();
    for (const int i : ready)
      if (rests[i / kWarpThreads])
        may_go_on = true;
      else
        go_on(i);
    for (size_t first = 0; first < waits_.size(); first += kWarpThreads) {
      const size_t last = std::min(first + kWarpThreads, waits_.size());
      may_go_on |= release(first, last, Wait::warp);
    }
    for (size_t first = 0; first < waits_.size(); first += of_block_)
      if (release(first, first + of_block_, Wait::block)) {
        ++barriers_;
        may_go_on = true;
      }
    for (size_t i = 0; i < waits_.size(); ++i)
      if (waits_[i] == Wait::until && untils_[i].free()) {
        waits_[i] = Wait::none;
        may_go_on = true;
      }
    if (std::all_of(waits_.begin(), waits_.end(), [](Wait wait) { return wait == Wait::over; })) return false;
    if (beside_ && beside_(!may_go_on)) may_go_on = true;
    if (!may_go_on) give_up();
    return true;
  }

  // With something going on beside them, warps are of different speed: a warp rests in a round by its own probability.
  void draw_paces() {
    rest_.assign((waits_.size() + kWarpThreads - 1) / kWarpThreads, 0);
    if (beside_)
      for (int& sixteenths : rest_) sixteenths = std::array{0, 0, 8, 14}[draws_() % 4];
  }

  std::vector<char> draw_rests() {
    std::vector<char> rests(rest_.size());
    for (size_t i = 0; i < rests.size(); ++i) rests[i] = rest_[i] > 0 && static_cast<int>(draws_() % 16) < rest_[i];
    return rests;
  }

  [[noreturn]] void give_up() {
    fprintf(stderr, "threads of a block wait at different points, or some have ended\n");
    const auto doing = [this](size_t i) -> std::string {
      if (waits_[i] == Wait::until) return "until " + untils_[i].why();
      return waits_[i] == Wait::warp ? "for its warp" : waits_[i] == Wait::block ? "for the block" : "no more: it has ended";
    };
    for (size_t i = 0, next; i < waits_.size(); i = next) {
      const std::string what = doing(i);
      for (next = i + 1; next < waits_.size() && doing(next) == what;) ++next;
      fprintf(stderr, "  threads %zu .. %zu wait %s\n", i, next - 1, what.c_str());
    }
    abort();
  }

  bool release(size_t begin, size_t end, Wait from) {
    for (size_t i = begin; i < end; ++i)
      if (waits_[i] != from) return false;
    for (size_t i = begin; i < end; ++i) waits_[i] = Wait::none;
    return true;
  }

  struct Until {
    std::function<bool()> free;
    std::function<std::string()> why;
  };

  std::function<void()> body_;
  Beside beside_;
  std::mt19937_64 draws_;
  std::vector<Place> places_;
  std::vector<char> started_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Wait> waits_;
  std::vector<Until> untils_;
  std::vector<int> rest_;
  std::vector<Slots> slots_;
  std::vector<int64_t> passed_;
  Place main_;
  int current_ = 0, of_block_ = 1, omit_ = 0;
  int64_t barriers_ = 0;
};

}  // namespace genengine
