// A grid's blocks, some of them at a time, each with its shared memory, barriers, copies and products.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <memory>
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
  }

  void end() {
    copies.end();
    named.end();
    registers.end();
    memory.end();
  }

  // Work goes on beside the threads: as drawn, or one piece of it for sure. Says whether any did.
  bool go_on(bool force) {
    bool any = force ? false : copies.go_on(false);
    const size_t sources = products.size() + 1, first = draws.below(sources);
    for (size_t i = 0; i < sources && !(force && any); ++i) {
      const size_t source = (first + i) % sources;
      if (source < products.size())
        any |= products[source].go_on(force);
      else if (force)
        any |= copies.go_on(true);
    }
    return any;
  }
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
    for (const auto& block : blocks_) any |= block->go_on(false);
    if (!idle || any) return any;
    const size_t first = blocks_[0]->draws.below(blocks_.size());
    for (size_t i = 0; i < blocks_.size() && !any; ++i) any = blocks_[(first + i) % blocks_.size()]->go_on(true);
    return any;
  }

  int count_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;
};

inline Block& mine() { return Grid::instance().mine(); }
inline Products& my_products() { return mine().products[Fibers::instance().thread() / kThreads]; }

}  // namespace genengine::hopper::emulated
