// ema_update over a range of one pair.
#include "cpu/ema_update_loops.h"

#include "cpu/isa/row.h"
#include "genengine/ema_update.h"

namespace genengine {
namespace GENENGINE_ISA {
namespace {

template <class A, class V>
void run(void* average, const void* value, float weight, int64_t count) {
  A* a = static_cast<A*>(average);
  const V* v = static_cast<const V*>(value);
  each(count, GENENGINE_BODY { write(a + i, ema(read(a + i, span), read(v + i, span), weight), span); });
}

template <class A>
void run(void* average, const void* value, Type type, float weight, int64_t count) {
  switch (type) {
    case Type::f32: return run<A, float>(average, value, weight, count);
    case Type::f16: return run<A, Half>(average, value, weight, count);
    case Type::bf16: return run<A, BFloat>(average, value, weight, count);
  }
}

}  // namespace

void ema_range(void* average, Type average_type, const void* value, Type value_type, float weight, int64_t count) {
  switch (average_type) {
    case Type::f32: return run<float>(average, value, value_type, weight, count);
    case Type::f16: return run<Half>(average, value, value_type, weight, count);
    case Type::bf16: return run<BFloat>(average, value, value_type, weight, count);
  }
}

}  // namespace GENENGINE_ISA
}  // namespace genengine
