// TMA: boxes of tensors to and from shared memory, and sums of floats, at drawn times.
#pragma once
#include <stdint.h>

#include <array>
#include <vector>

#include "cuda/hopper/barriers.h"
#include "cuda/hopper/memory.h"

namespace genengine::hopper {

// A tensor in global memory and the box that a copy takes of it, innermost dimension first; strides in bytes, that of the
// innermost is `element`. swizzle: bytes of a line that are swizzled, 32, 64 or 128, or 0.
struct alignas(64) TensorMap {
  char* base;
  int64_t size[4], stride[4];
  int box[4];
  int element, swizzle;

  int box_bytes() const { return element * box[0] * box[1] * box[2] * box[3]; }
};

namespace emulated {

using Place = std::array<int, 4>;  // of a box in its tensor

// What the hardware's descriptor asks of a map.
inline void check_map(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) refuse("tensor map: must be aligned to 64 bytes");
  if (map.element != 2 && map.element != 4) refuse("tensor map: elements must have 2 or 4 bytes, got %d", map.element);
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0) refuse("tensor map: its base must be aligned to 16 bytes");
  for (int d = 0; d < 4; ++d) {
    if (map.size[d] < 1) refuse("tensor map: size %d must be at least 1", d);
    if (map.box[d] < 1 || map.box[d] > 256) refuse("tensor map: box %d must be in 1 .. 256, got %d", d, map.box[d]);
    if (d > 0 && (map.stride[d] % 16 != 0 || map.stride[d] < 0 || map.stride[d] >= 1ll << 40))
      refuse("tensor map: stride %d must be a multiple of 16 bytes below 2^40, got %lld", d,
             static_cast<long long>(map.stride[d]));
  }
  const int line = map.element * map.box[0];
  if (line % 16 != 0) refuse("tensor map: a box's line must be a multiple of 16 bytes, got %d", line);
  if (map.swizzle != 0 && map.swizzle != 32 && map.swizzle != 64 && map.swizzle != 128)
    refuse("tensor map: swizzle must be 0, 32, 64 or 128 bytes, got %d", map.swizzle);
  if (map.swizzle != 0 && line > map.swizzle)
    refuse("tensor map: a line of %d bytes exceeds its swizzle, %d", line, map.swizzle);
}

// body(element of the box, its place in global memory or nullptr beyond the tensor) for each element, in the box's order.
template <class Body>
void each_element(const TensorMap& map, const Place& from, Body body) {
  int number = 0;
  Place i;
  for (i[3] = 0; i[3] < map.box[3]; ++i[3])
    for (i[2] = 0; i[2] < map.box[2]; ++i[2])
      for (i[1] = 0; i[1] < map.box[1]; ++i[1])
        for (i[0] = 0; i[0] < map.box[0]; ++i[0], ++number) {
          char* at = map.base;
          for (int d = 0; d < 4 && at; ++d) {
            const int64_t index = static_cast<int64_t>(from[d]) + i[d];
            at = index < 0 || index >= map.size[d] ? nullptr : at + index * (d ? map.stride[d] : map.element);
          }
          body(number, at);
        }
}

class Copies {
 public:
  Copies(SharedMemory& memory, Barriers& barriers, Draws& draws) : memory_(memory), barriers_(barriers), draws_(draws) {}

  void begin(int threads) {
    copies_.clear();
    groups_.assign(threads, 0);
  }

  void load(uint32_t to, const TensorMap& map, uint32_t barrier, Place from) {
    check_map(map);
    check_place(to, map);
    start_load({Kind::load, map, from, to, static_cast<uint32_t>(map.box_bytes()), barrier, nullptr, {}, 0, 0, Pace::late, false});
  }

  // Bytes as they are.
  void load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || to % 16 != 0 || bytes % 16 != 0)
      refuse("bulk_load: both ends and the size must be multiples of 16, got %p, %u and %u", from, to, bytes);
    start_load({Kind::bytes, {}, {}, to, bytes, barrier, const_cast<void*>(from), {}, 0, 0, Pace::late, false});
  }

  void store(const TensorMap& map, uint32_t from, Place to) {
    check_map(map);
    check_place(from, map);
    start_store({Kind::store, map, to, from, static_cast<uint32_t>(map.box_bytes()), 0, nullptr, {}, 0, 0, Pace::late, false});
  }

  void add(float* to, uint32_t from, uint32_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || from % 16 != 0 || bytes % 16 != 0)
      refuse("bulk_add: both ends and the size must be multiples of 16, got %p, %u and %u", to, from, bytes);
    memory_.check(from, bytes);
    start_store({Kind::add, {}, {}, from, bytes, 0, to, {}, 0, 0, Pace::late, false});
  }

  void commit() { ++groups_[Fibers::instance().thread()]; }

  // Until at most `pending` of the thread's groups are to be read from shared memory (or to be written).
  void wait(int pending, bool only_read) {
    const int thread = Fibers::instance().thread();
    const int64_t done = groups_[thread] - pending;
    Fibers::instance().wait_until(
        [this, thread, done, only_read] {
          for (const Copy& copy : copies_)
            if (copy.stores() && copy.thread == thread && copy.group < done && !(only_read && copy.read))
              return false;
          return true;
        },
        [] { return "for stores to memory"; });
  }

  // A thread ends: nothing of shared memory may be in use.
  void leave() const {
    for (const Copy& copy : copies_)
      if (copy.thread == Fibers::instance().thread() && copy.stores() && !copy.read)
        refuse("a store of shared memory at %u is still to read it when its thread ends (bulk_commit, bulk_wait_read)",
               copy.at);
  }

  // This thread has something to be written yet.
  bool writes() const {
    return std::any_of(copies_.begin(), copies_.end(),
                       [](const Copy& copy) { return copy.stores() && copy.thread == Fibers::instance().thread(); });
  }

  // The block ended. What was stored is written.
  void end() {
    for (const Copy& copy : copies_)
      if (!copy.stores()) refuse("a load: shared memory at %u is still written when the block ends", copy.at);
    while (force(true)) {
    }
  }

  // Work goes on as drawn. Says whether any did.
  bool go_on() {
    bool any = false;
    for (Copy& copy : copies_)
      if (copy.pace == Pace::drawn && draws_.one_in(4)) {
        advance(copy);
        any = true;
      }
    std::erase_if(copies_, [](const Copy& copy) { return copy.over; });
    return any;
  }

  // A piece of one store, or of one load, for sure, if there is any.
  bool force(bool stores) {
    std::vector<Copy*> found;
    for (Copy& copy : copies_)
      if (copy.stores() == stores) found.push_back(&copy);
    if (found.empty()) return false;
    advance(*found[draws_.below(found.size())]);
    std::erase_if(copies_, [](const Copy& copy) { return copy.over; });
    return true;
  }

 private:
  enum class Kind { load, bytes, store, add };
  struct Copy {
    Kind kind;
    TensorMap map;
    Place place;
    uint32_t at, bytes, barrier;
    void* global;  // of what goes without a map
    std::vector<char> data;  // once read
    int thread;
    int64_t group;
    Pace pace;
    bool read;
    bool over = false;

    bool stores() const { return kind == Kind::store || kind == Kind::add; }
  };

  static bool overlap(const Copy& copy, uint32_t at, uint32_t bytes) {
    return copy.at < at + bytes && at < copy.at + copy.bytes;
  }

  void check_place(uint32_t at, const TensorMap& map) const {
    memory_.check(at, map.box_bytes());
    if (at % 128 != 0) refuse("tensor copy: shared memory at %u must be aligned to 128 bytes", at);
  }

  void start_load(Copy copy) {
    barriers_.check(copy.barrier, "copy");
    for (const Copy& other : copies_)
      if (!(other.stores() && other.read) && overlap(other, copy.at, copy.bytes))
        refuse("a load: shared memory at %u is still %s by an earlier copy", copy.at, other.stores() ? "read" : "written");
    memory_.poison(copy.at, copy.bytes);
    copy.thread = Fibers::instance().thread();
    copy.pace = draws_.pace();
    start(std::move(copy));
  }

  void start_store(Copy copy) {
    copy.thread = Fibers::instance().thread();
    copy.group = groups_[copy.thread];
    copy.pace = draws_.pace();
    copy.data.assign(memory_.read(copy.at, copy.bytes), memory_.read(copy.at, copy.bytes) + copy.bytes);
    start(std::move(copy));
  }

  void start(Copy copy) {
    copies_.push_back(std::move(copy));
    while (copies_.back().pace == Pace::at_once && !copies_.back().over) advance(copies_.back());
    if (copies_.back().over) copies_.pop_back();
  }

  void advance(Copy& copy) {
    if (!copy.stores()) {
      land(copy);
    } else if (!copy.read) {
      if (memcmp(memory_.read(copy.at, copy.bytes), copy.data.data(), copy.bytes) != 0)
        refuse("shared memory at %u: overwritten before a store has read it (bulk_wait_read)", copy.at);
      copy.read = true;
    } else {
      write(copy);
    }
  }

  // Lines lie one after the other, as long as the box's; their chunks are swizzled by the address.
  static uint32_t place_of(const Copy& copy, int number) {
    return swizzled(copy.at + number * copy.map.element, copy.map.swizzle);
  }

  void land(Copy& copy) {
    if (copy.kind == Kind::bytes)
      memory_.write(copy.at, copy.global, copy.bytes);
    else
      each_element(copy.map, copy.place, [&](int number, const char* from) {
        const char zeros[4] = {};
        memory_.write(place_of(copy, number), from ? from : zeros, copy.map.element);
      });
    copy.over = true;
    barriers_.complete(copy.barrier, copy.bytes);
  }

  static void write(Copy& copy) {
    if (copy.kind == Kind::store)
      each_element(copy.map, copy.place, [&](int number, char* to) {
        if (to) memcpy(to, copy.data.data() + (place_of(copy, number) - copy.at), copy.map.element);
      });
    else
      for (uint32_t i = 0; i < copy.bytes / 4; ++i) {
        float value;
        memcpy(&value, copy.data.data() + 4 * i, 4);
        static_cast<float*>(copy.global)[i] += value;
      }
    copy.over = true;
  }

  SharedMemory& memory_;
  Barriers& barriers_;
  Draws& draws_;
  std::vector<Copy> copies_;
  std::vector<int64_t> groups_;
};

}  // namespace emulated
}  // namespace genengine::hopper
