// ema_update on CUDA: one launch for up to kPairs tensors, whose addresses travel as a kernel parameter, so that nothing is
// copied from the host and the launch may be captured. A block takes kSpan elements of one tensor.
// inspect: ema_update_vectorised elements=32
#include "genengine/ema_update.h"

#include <vector>

#include "cuda/launch.h"
#include "ema_update_checks.h"

namespace genengine {

constexpr int kSpan = 32 * kThreads;  // elements of a block
constexpr int kPairs = 1000;          // 32 KB of parameters, CUDA's limit

struct EmaPairs {
  void* average[kPairs];
  const void* value[kPairs];
  int64_t count[kPairs];
  int32_t first_block[kPairs];  // of the grid
  int32_t pairs;
  float weight;
};

// The pair that a block belongs to: the last one that starts no later.
__device__ __forceinline__ int pair_of(const EmaPairs& table, int block) {
  int low = 0, high = table.pairs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class A, class V>
__global__ void GENENGINE_BOUNDS ema_update_vectorised(const __grid_constant__ EmaPairs table) {
  constexpr int kElements = 16 / (sizeof(A) < sizeof(V) ? sizeof(A) : sizeof(V));
  const int pair = pair_of(table, static_cast<int>(blockIdx.x));
  A* average = static_cast<A*>(table.average[pair]);
  const V* value = static_cast<const V*>(table.value[pair]);
  const int64_t first = static_cast<int64_t>(static_cast<int>(blockIdx.x) - table.first_block[pair]) * kSpan;
  const int64_t left = table.count[pair] - first, span = left < kSpan ? left : kSpan;
  const bool aligned = (reinterpret_cast<uintptr_t>(average) | reinterpret_cast<uintptr_t>(value)) % 16 == 0;
  const int64_t whole = aligned ? span / kElements * kElements : 0;
  for (int64_t i = threadIdx.x * kElements; i < whole; i += kThreads * kElements) {
    const Wide<kElements> at((first + i) / kElements);
    float a[kElements], v[kElements];
    load(at, static_cast<const A*>(average), a);
    load(at, value, v);
#pragma unroll
    for (int k = 0; k < kElements; ++k) a[k] = ema(a[k], v[k], table.weight);
    at.store(average, a);
  }
  for (int64_t i = first + whole + threadIdx.x; i < first + span; i += kThreads)
    average[i] = narrow<A>(ema(widen(average[i]), widen(value[i]), table.weight));
}

namespace {

// The pairs of one combination of dtypes, launched when the table is full.
class Batch {
 public:
  Batch(const Launcher& launcher, Type average, Type value, float weight) : launcher_(launcher), average_(average), value_(value) {
    table_.pairs = 0;
    table_.weight = weight;
  }

  bool takes(Type average, Type value) const { return average == average_ && value == value_; }

  void add(const Tensor& average, const Tensor& value) {
    const int64_t blocks = (average.numel() + kSpan - 1) / kSpan;
    STD_TORCH_CHECK(blocks < INT32_MAX, "ema_update: a tensor must hold fewer than 2^44 elements, got ", average.numel());
    if (table_.pairs == kPairs || blocks_ + blocks > INT32_MAX) launch();
    table_.average[table_.pairs] = average.data_ptr();
    table_.value[table_.pairs] = value.data_ptr();
    table_.count[table_.pairs] = average.numel();
    table_.first_block[table_.pairs++] = static_cast<int32_t>(blocks_);
    blocks_ += blocks;
  }

  void launch() {
    if (table_.pairs == 0) return;
    with_type(average_, [&](auto average) {
      with_type(value_, [&](auto value) {
        using A = typename decltype(average)::type;
        using V = typename decltype(value)::type;
        launcher_.run<ema_update_vectorised<A, V>>({dim3(static_cast<unsigned>(blocks_)), dim3(kThreads)}, table_);
      });
    });
    table_.pairs = 0;
    blocks_ = 0;
  }

 private:
  const Launcher& launcher_;
  Type average_, value_;
  EmaPairs table_;
  int64_t blocks_ = 0;
};

void ema_update(TensorList averages, TensorList values, double weight) {
  const char* op = "ema_update";
  check_ema_lists(averages, values);
  if (averages.size() == 0) return;
  const Launcher launcher(op, averages[0]);
  std::vector<Batch> batches;
  for (size_t i = 0; i < averages.size(); ++i) {
    const Tensor &average = averages[i], &value = values[i];
    launcher.require_here("averages", average);
    launcher.require_here("values", value);
    check_ema_pair(average, value);
    if (average.numel() == 0) continue;
    const Type average_type = type_of(op, "averages", average), value_type = type_of(op, "values", value);
    Batch* batch = nullptr;
    for (Batch& other : batches)
      if (other.takes(average_type, value_type)) batch = &other;
    if (!batch) batch = &batches.emplace_back(launcher, average_type, value_type, static_cast<float>(weight));
    batch->add(average, value);
  }
  for (Batch& batch : batches) batch.launch();
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) { m.impl("ema_update", TORCH_BOX(&genengine::ema_update)); }
