// A grid's blocks, some of them at a time, each with its shared memory, barriers, copies and products.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "cuda/hopper/barriers.h"
#include "cuda/hopper/copies.h"
#include "cuda/hopper/memory.h"
#include "cuda/hopper/products.h"

namespace genengine::hopper::emulated {

struct Launch {
  int threads, blocks;
  size_t shared_bytes;
  uint64_t seed;     // of all that is drawn
  int together = 1;  // blocks that run at the same time; the next ones follow when all have ended
};

struct Block {
  int index = 0;
  Draws draws;
  SharedMemory memory;
  Barriers barriers{memory};
  NamedBarriers named;
  Registers registers;
  Copies copies{memory, barriers, draws};
  std::vector<Products> products;

  void begin(const Launch& launch, int number) {
    index = number;
    draws.seed(launch.seed + index);
    memory.begin(launch.shared_bytes, launch.threads);
    barriers.begin();
    named.begin(launch.threads);
    registers.begin(launch.threads, std::min(65536 / launch.threads / 8 * 8, 248));  // what a launch leaves each thread
    copies.begin(launch.threads);
    products.clear();
    for (int first = 0; first < launch.threads; first += kThreads) products.emplace_back(memory, draws, first);
    sources_.resize(products.size() + 2);
    std::iota(sources_.begin(), sources_.end(), 0);
    draw_sources();
    steady_ = !draws.one_in(4);
    if (draws.one_in(3)) std::swap(*std::find(sources_.begin(), sources_.end(), products.size()), sources_.back());  // stores
  }

  void end() {
    copies.end();
    named.end();
    registers.end();
    memory.end();
  }

  // Work goes on beside the threads, as drawn. Says whether any did.
  bool go_on() {
    bool any = copies.go_on();
    for (Products& each : products) any |= each.go_on(false);
    return any;
  }

  // A piece of it for sure, if there is any: of the stores, the loads, or a warpgroup's products, whichever comes first in a
  // drawn order. Where that is one for the whole block, what comes last is as late as can be.
  bool force() {
    if (!steady_) draw_sources();
    for (const size_t source : sources_)
      if (source < products.size() ? products[source].go_on(true) : copies.force(source == products.size())) return true;
    return false;
  }

 private:
  void draw_sources() {
    for (size_t i = sources_.size(); i > 1; --i) std::swap(sources_[i - 1], sources_[draws.below(i)]);
  }

  std::vector<size_t> sources_;
  bool steady_ = false;
};

class Grid {
 public:
  static Grid& instance() {
    static Grid grid;
    return grid;
  }

  int count() const { return count_; }
  Block& mine() { return *blocks_[Fibers::instance().block()]; }

  // body(shared memory) on all threads of all blocks.
  template <class Body>
  void run(const Launch& launch, Body body) {
    count_ = launch.blocks;
    for (int first = 0; first < count_; first += launch.together) {
      const int together = std::min(launch.together, count_ - first);
      while (static_cast<int>(blocks_.size()) < together) blocks_.push_back(std::make_unique<Block>());
      blocks_.resize(together);
      for (int i = 0; i < together; ++i) blocks_[i]->begin(launch, first + i);
      const auto thread = [&] {
        Block& block = mine();
        body(block.memory.data());
        block.copies.leave();
        block.products[Fibers::instance().thread() / kThreads].leave();
      };
      Fibers::instance().run(launch.threads, launch.seed + first, 0, thread, [this](bool idle) { return go_on(idle); }, together);
      for (const auto& block : blocks_) block->end();
    }
  }

 private:
  bool go_on(bool idle) {
    bool any = false;
    for (const auto& block : blocks_) any |= block->go_on();
    if (!idle || any) return any;
    const size_t first = blocks_[0]->draws.below(blocks_.size());
    for (size_t i = 0; i < blocks_.size() && !any; ++i) any = blocks_[(first + i) % blocks_.size()]->force();
    return any;
  }

  int count_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
};

inline Block& mine() { return Grid::instance().mine(); }
inline Products& my_products() { return mine().products[Fibers::instance().thread() / kThreads]; }

}  // namespace genengine::hopper::emulated
