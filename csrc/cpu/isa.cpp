// Run-time choice of the instruction set, and the op by which tests reach all three.
#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "torch_api.h"

namespace genengine {
namespace {

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

int initial_isa() {
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  const int best = best_isa();
  if (const char* wanted = std::getenv("GENENGINE_ISA"))
    for (int i = 0; i <= best; ++i)
      if (std::strcmp(wanted, names[i]) == 0) return i;
  return best;
}

std::atomic<bool>& asked_for() {
  static std::atomic<bool> value{std::getenv("GENENGINE_ISA") != nullptr};
  return value;
}

std::atomic<int>& isa() {
  static std::atomic<int> value{initial_isa()};
  return value;
}

// Sets the instruction set if `wanted` is one the CPU has; returns the one in use.
int64_t cpu_isa(int64_t wanted) {
  if (wanted >= 0 && wanted <= best_isa()) {
    isa() = static_cast<int>(wanted);
    asked_for() = true;
  }
  return isa();
}

}  // namespace

bool pairs_are_fast() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  return amd || asked_for().load(std::memory_order_relaxed);
#else
  return false;
#endif
}

Isa current_isa() { return static_cast<Isa>(isa().load(std::memory_order_relaxed)); }

}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&genengine::cpu_isa)); }
