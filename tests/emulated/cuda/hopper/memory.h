// A block's shared memory as Hopper has it: addresses of its own, and two views. Ordinary loads and stores go to one, copies
// and products (the async proxy) to the other; what a thread stores reaches the second when that thread publishes it, and
// what copies bring is in both.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/fibers.h"

namespace genengine::hopper::emulated {

[[gnu::format(printf, 1, 2)]] inline std::string text(const char* format, ...) {
  char line[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  return line;
}

// A misuse of the instructions: says who did what, and ends the process.
template <class... Values>
[[noreturn]] void refuse(const char* format, Values... values) {
  const Fibers& fibers = Fibers::instance();
  fprintf(stderr, "block %d, thread %d: %s\n", fibers.block(), fibers.thread(), text(format, values...).c_str());
  abort();
}

// When asynchronous work is done: at once, at a drawn time, or only when nothing else can go on.
enum class Pace { at_once, drawn, late };

class Draws {
 public:
  void seed(uint64_t seed) {
    draws_.seed(seed ^ 0x9e3779b97f4a7c15ull);
    constexpr int kModes[] = {0, 2, 2, 3};  // all at once, all late, or each its own
    mode_ = kModes[draws_() % 4];
  }
  Pace pace() { return static_cast<Pace>(mode_ < 3 ? mode_ : static_cast<int>(draws_() % 3)); }
  bool one_in(int count) { return draws_() % count == 0; }
  size_t below(size_t count) { return draws_() % count; }

 private:
  std::mt19937_64 draws_;
  int mode_ = 0;
};

class SharedMemory {
 public:
  static constexpr uint32_t kFirst = 1024;  // the system's own come before
  static constexpr unsigned char kPoison = 0xff;  // NaN in every type

  void begin(size_t bytes, int threads) {
    if (bytes > 227 * 1024) refuse("shared memory: a block has at most 232448 bytes, got %zu", bytes);
    bytes_ = bytes;
    for (std::vector<char>* view : {&ordinary_, &async_}) view->assign(bytes + 2048, static_cast<char>(kPoison));
    written_.assign(threads, {});
  }
  // Nothing around it was written.
  void end() const {
    const char *first = base(ordinary_), *last = first + bytes_;
    for (const char& at : ordinary_)
      if ((&at < first || &at >= last) && static_cast<unsigned char>(at) != kPoison)
        refuse("shared memory: written outside its %zu bytes", bytes_);
  }

  char* data() { return base(ordinary_); }
  size_t bytes() const { return bytes_; }

  uint32_t address(const void* pointer) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(pointer), first = reinterpret_cast<uintptr_t>(base(ordinary_));
    if (at < first || at >= first + bytes_) refuse("shared memory: %p is not an address in it", pointer);
    return static_cast<uint32_t>(at - first) + kFirst;
  }

  // An ordinary store, which copies and products see only after this thread published it.
  void store(void* to, const void* from, size_t bytes) {
    const uint32_t at = address(to);
    check(at, bytes);
    memcpy(to, from, bytes);
    written_[Fibers::instance().thread()].push_back({at, static_cast<uint32_t>(bytes)});
  }
  void publish() {
    auto& mine = written_[Fibers::instance().thread()];
    for (const auto& [at, bytes] : mine) memcpy(base(async_) + (at - kFirst), base(ordinary_) + (at - kFirst), bytes);
    mine.clear();
  }

  // What copies and products read; all that threads stored there must have been published.
  const char* read(uint32_t at, size_t bytes) const {
    check(at, bytes);
    const char *seen = base(async_) + (at - kFirst), *stored = base(ordinary_) + (at - kFirst);
    if (memcmp(seen, stored, bytes) != 0)
      refuse("shared memory at %u: stored by a thread that has not published it (store_shared, publish_to_async)", at);
    return seen;
  }

  // What a copy brings.
  void write(uint32_t at, const void* from, size_t bytes) {
    check(at, bytes);
    for (std::vector<char>* view : {&ordinary_, &async_}) memcpy(base(*view) + (at - kFirst), from, bytes);
  }
  void poison(uint32_t at, size_t bytes) {
    read(at, bytes);
    for (std::vector<char>* view : {&ordinary_, &async_}) memset(base(*view) + (at - kFirst), kPoison, bytes);
  }

  void check(uint32_t at, size_t bytes) const {
    if (at < kFirst || at - kFirst + bytes > bytes_)
      refuse("shared memory: %zu bytes at %u are beyond its %zu from %u on", bytes, at, bytes_, kFirst);
  }

 private:
  static const char* base(const std::vector<char>& view) {
    return view.data() + (-reinterpret_cast<uintptr_t>(view.data()) & 1023);
  }
  static char* base(std::vector<char>& view) { return const_cast<char*>(base(std::as_const(view))); }

  std::vector<char> ordinary_, async_;
  std::vector<std::vector<std::pair<uint32_t, uint32_t>>> written_;
  size_t bytes_ = 0;
};

// TMA's and wgmma's swizzle of lines: address bits 4.. are xored with bits 7.., as many as number a line's 16-byte chunks.
inline uint32_t swizzled(uint32_t address, int line) {
  const uint32_t bits = line == 128 ? 7 : line == 64 ? 3 : line == 32 ? 1 : 0;
  return address ^ (address >> 7 & bits) << 4;
}

}  // namespace genengine::hopper::emulated
