// pixelcnn_sample on CUDA: a block takes a group of images through all rows of the call, in one launch. What later pixels
// read is in global memory, where the next launch finds it; what a step works with is in shared memory where it fits.
// Reads the weights once per step and block, from L2; sums float32, in an order that depends on k alone (pixelcnn_team.h).
#include "cuda/launch.h"
#include "cuda/pixelcnn_team.h"
#include "pixelcnn_sample_checks.h"

// inspect: pixelcnn_group<Bf16 needs=HMMA

namespace genengine {

template <class T, bool Shared>
__global__ void __launch_bounds__(kTeamThreads, 1) pixelcnn_group(const __grid_constant__ PixelCNNCall call) {
  extern __shared__ __align__(256) char shared[];
  char* scratch = Shared ? shared : call.state + blockIdx.x * call.state_stride + call.layout.bytes;
  const BlockTeam<T> team;
  PixelSampler<BlockTeam<T>>(team, call, blockIdx.x, scratch).run();
}

namespace {

constexpr int kRows = 32;  // of a product: two tiles of sixteen

struct Placement {
  PixelCNNState layout;
  bool shared;

  int64_t bytes() const { return layout.bytes + (shared ? 0 : layout.scratch_bytes); }
};

// As many rows to a product as there are and shared memory has room for: what it does not take is left to the cache that holds
// weights. What a step of the group's images works with must fit at least.
Placement placement(const char* op, const PixelCNNShape& shape, Type type, int64_t images, bool wavefront, int32_t device) {
  int room = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA device ", device, " does not answer: ", cudaGetErrorString(error));
  const auto layout = [&](int rows) {
    const PixelCNNStyle style = type == Type::f32 ? PixelCNNStyle{4, 4, BlockTeam<float>::kPad, rows}
                                                  : PixelCNNStyle{2, 2, BlockTeam<Bf16>::kPad, rows};
    return PixelCNNState(shape, static_cast<int>(images), wavefront, style);
  };
  const int64_t most = images * (wavefront ? Wavefront(shape).rows_in_flight() : shape.size);
  for (int rows = most < kRows ? static_cast<int>(most) : kRows; rows >= images; rows /= 2)
    if (const PixelCNNState fitting = layout(rows); fitting.scratch_bytes <= room) return {fitting, true};
  return {layout(kRows), false};
}

int64_t pixelcnn_state(const Tensor& matrices, IntList fields, int64_t images, bool wavefront) {
  const char* op = "pixelcnn_state";
  return placement(op, pixelcnn_shape(op, fields), pixelcnn_type(op, matrices), images, wavefront, matrices.get_device_index())
      .bytes();
}

void pixelcnn_sample(Tensor x, Tensor log_prob, Tensor state, const Tensor& matrices, const Tensor& vectors, IntList fields,
                     const OptionalTensor& labels, const OptionalTensor& known, const Tensor& seed, const Tensor& sample_ids,
                     double temperature, bool wavefront, int64_t images, int64_t first_row, int64_t last_row) {
  const char* op = "pixelcnn_sample";
  const Launcher launcher(op, x);
  launcher.require_here("log_prob", log_prob);
  launcher.require_here("state", state);
  launcher.require_here("weights.matrices", matrices);
  launcher.require_here("weights.vectors", vectors);
  launcher.require_here("labels", labels);
  launcher.require_here("known", known);
  launcher.require_here("seed", seed);
  launcher.require_here("sample_ids", sample_ids);
  PixelCNNCall call = pixelcnn_call(op, x, log_prob, state, matrices, vectors, fields, labels, known, seed, sample_ids, temperature,
                                    wavefront, images, first_row, last_row);
  if (call.batch == 0 || first_row == last_row) return;
  const Type type = pixelcnn_type(op, matrices);
  const Placement place = placement(op, call.shape, type, images, wavefront, x.get_device_index());
  call.layout = place.layout;
  call.state_stride = place.bytes();
  const int64_t groups = (call.batch + images - 1) / images;
  STD_TORCH_CHECK(state.numel() >= groups * call.state_stride, op, ": state must hold ", groups * call.state_stride, " bytes, got ",
                  state.numel());
  for (const void* address : {call.matrices, static_cast<const void*>(call.vectors), static_cast<const void*>(call.state)})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0, op,
                    ": weights and state must begin at a multiple of 16 bytes; pass a copy, .clone()");
  Grid grid = {dim3(static_cast<unsigned>(groups)), dim3(kTeamThreads)};
  grid.shared = place.shared ? static_cast<size_t>(place.layout.scratch_bytes) : 0;
  const auto run = [&](auto type_tag) {
    using T = typename decltype(type_tag)::type;
    place.shared ? launcher.run<pixelcnn_group<T, true>>(grid, call) : launcher.run<pixelcnn_group<T, false>>(grid, call);
  };
  type == Type::f32 ? run(std::type_identity<float>{}) : run(std::type_identity<Bf16>{});
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("pixelcnn_sample", TORCH_BOX(&genengine::pixelcnn_sample));
  m.impl("pixelcnn_state", TORCH_BOX(&genengine::pixelcnn_state));
}
