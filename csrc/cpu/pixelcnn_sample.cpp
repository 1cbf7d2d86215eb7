// pixelcnn_sample on the CPU: each thread takes whole groups of images through all rows, without barriers.
#include "cpu/pixelcnn_sample_loops.h"

#include "pixelcnn_sample_checks.h"

namespace genengine {
namespace {

bool multiplies_pairs(Type type) { return type == Type::bf16 && current_isa() == Isa::avx512bf16 && pairs_are_fast(); }

constexpr int kRows = 64;  // of a product: what is gathered for it stays in the nearest cache

PixelCNNState layout(const PixelCNNShape& shape, Type type, int64_t images, bool wavefront) {
  const PixelCNNStyle style = {type == Type::f32 ? 4 : 2, input_size(type, multiplies_pairs(type)), 0, kRows};
  return PixelCNNState(shape, static_cast<int>(images), wavefront, style);
}

int64_t pixelcnn_state(const Tensor& matrices, IntList fields, int64_t images, bool wavefront) {
  const char* op = "pixelcnn_state";
  const PixelCNNState state = layout(pixelcnn_shape(op, fields), pixelcnn_type(op, matrices), images, wavefront);
  return state.bytes + state.scratch_bytes;
}

void pixelcnn_sample(Tensor x, Tensor log_prob, Tensor state, const Tensor& matrices, const Tensor& vectors, IntList fields,
                     const OptionalTensor& labels, const OptionalTensor& known, const Tensor& seed, const Tensor& sample_ids,
                     double temperature, bool wavefront, int64_t images, int64_t first_row, int64_t last_row) {
  const char* op = "pixelcnn_sample";
  PixelCNNCall call = pixelcnn_call(op, x, log_prob, state, matrices, vectors, fields, labels, known, seed, sample_ids, temperature,
                                    wavefront, images, first_row, last_row);
  if (call.batch == 0) return;
  const Type type = pixelcnn_type(op, matrices);
  call.layout = layout(call.shape, type, images, call.wavefront);
  call.state_stride = call.layout.bytes + call.layout.scratch_bytes;
  const int64_t groups = (call.batch + images - 1) / images;
  STD_TORCH_CHECK(state.numel() >= groups * call.state_stride, op, ": state must hold ", groups * call.state_stride, " bytes, got ",
                  state.numel());
  const auto run = GENENGINE_PICK(pixelcnn_sample);
  const bool pairs = multiplies_pairs(type);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) run(call, group, type, pairs);
  });
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CPU, m) {
  m.impl("pixelcnn_sample", TORCH_BOX(&genengine::pixelcnn_sample));
  m.impl("pixelcnn_state", TORCH_BOX(&genengine::pixelcnn_state));
}
