// ema_update on the CPU: the ranges of all tensors, one list for the threads.
#include "cpu/ema_update_loops.h"

#include <vector>

#include "ema_update_checks.h"

namespace genengine {
namespace {

struct Range {
  char* average;
  const char* value;
  Type average_type, value_type;
  int64_t count;
};

void append(std::vector<Range>& ranges, const Tensor& average, const Tensor& value) {
  const char* op = "ema_update";
  const Type average_type = type_of(op, "averages", average), value_type = type_of(op, "values", value);
  const int64_t average_size = static_cast<int64_t>(average.element_size()), value_size = static_cast<int64_t>(value.element_size());
  char* a = static_cast<char*>(average.data_ptr());
  const char* v = static_cast<const char*>(value.data_ptr());
  for (int64_t first = 0; first < average.numel(); first += kGrain) {
    const int64_t left = average.numel() - first;
    ranges.push_back({a + first * average_size, v + first * value_size, average_type, value_type, left < kGrain ? left : kGrain});
  }
}

void ema_update(TensorList averages, TensorList values, double weight) {
  check_ema_lists(averages, values);
  std::vector<Range> ranges;
  for (size_t i = 0; i < averages.size(); ++i) {
    check_ema_pair(averages[i], values[i]);
    append(ranges, averages[i], values[i]);
  }
  const auto run = GENENGINE_PICK(ema_range);
  torch::stable::parallel_for(0, static_cast<int64_t>(ranges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Range& r = ranges[static_cast<size_t>(i)];
      run(r.average, r.average_type, r.value, r.value_type, static_cast<float>(weight), r.count);
    }
  });
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) { m.impl("ema_update", TORCH_BOX(&genengine::ema_update)); }
