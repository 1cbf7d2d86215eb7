// A grid's blocks, one after the other, each with its shared memory, barriers, copies and products.
#pragma once
#include <stdint.h>

#include <vector>

#include "cuda/hopper/barriers.h"
#include "cuda/hopper/copies.h"
#include "cuda/hopper/memory.h"
#include "cuda/hopper/products.h"

namespace genengine::hopper::emulated {

struct Launch {
  int threads, blocks;
  size_t shared_bytes;
  uint64_t seed;  // of all that is drawn
};

struct Block {
  int index = 0, count = 0;
  Draws draws;
  SharedMemory memory;
  Barriers barriers{memory};
  NamedBarriers named;
  Registers registers;
  Copies copies{memory, barriers, draws};
  std::vector<Products> products;

  static Block& instance() {
    static Block block;
    return block;
  }

  Products& my_products() { return products[Fibers::instance().current() / kThreads]; }

  // body(shared memory) on all threads of all blocks.
  template <class Body>
  void run(const Launch& launch, Body body) {
    count = launch.blocks;
    for (index = 0; index < count; ++index) {
      begin(launch);
      const auto thread = [&] {
        body(memory.data());
        copies.leave();
        my_products().leave();
      };
      Fibers::instance().run(launch.threads, launch.seed + index, 0, thread, [this](bool idle) { return go_on(idle); });
      copies.end();
      named.end();
      registers.end();
      memory.end();
    }
  }

 private:
  void begin(const Launch& launch) {
    draws.seed(launch.seed + index);
    memory.begin(launch.shared_bytes, launch.threads);
    barriers.begin();
    named.begin(launch.threads);
    registers.begin(launch.threads, std::min(65536 / launch.threads / 8 * 8, 248));  // what a launch leaves each thread
    copies.begin(launch.threads);
    products.clear();
    for (int first = 0; first < launch.threads; first += kThreads) products.emplace_back(memory, draws, first);
  }

  bool go_on(bool idle) {
    bool any = copies.go_on(false);
    for (Products& each : products) any |= each.go_on(false);
    if (!idle || any) return any;
    const size_t sources = products.size() + 1, first = draws.below(sources);
    for (size_t i = 0; i < sources && !any; ++i) {
      const size_t source = (first + i) % sources;
      any = source == products.size() ? copies.go_on(true) : products[source].go_on(true);
    }
    return any;
  }
};

}  // namespace genengine::hopper::emulated
