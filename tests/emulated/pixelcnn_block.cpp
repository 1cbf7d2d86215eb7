// The block of threads of csrc/cuda/pixelcnn_sample.cu, on fibers: for tests/ops/test_pixelcnn_block.py.
#include <algorithm>

#include "cuda/pixelcnn_team.h"

using namespace genengine;

namespace {

template <class T>
PixelCNNState layout_of(const PixelCNNCall& call, int rows) {
  return PixelCNNState(call.shape, call.images, call.wavefront, {sizeof(T), sizeof(T), BlockTeam<T>::kPad, rows});
}

template <class T>
int64_t run(const PixelCNNCall& call, char* scratch, uint64_t seed, int omit) {
  int64_t barriers = 0;
  for (int64_t group = 0; group * call.images < call.batch; ++group)
    barriers = Fibers::instance().run(kTeamThreads, seed + static_cast<uint64_t>(group), omit, [&, group] {
      PixelSampler<BlockTeam<T>>(BlockTeam<T>(), call, group, scratch).run();
    });
  return barriers;
}

}  // namespace

// As the test fills it: the call, and what the emulation takes beside it.
struct BlockCall {
  const int* fields;
  const void* matrices;
  const float* vectors;
  float *x, *log_prob;
  const bool* known;
  const int64_t *labels, *seed, *ids;
  int64_t batch;
  char *state, *scratch;
  float temperature;
  int pairs, images, wavefront, rows, first_row, last_row, omit;
  uint64_t order;
};

static PixelCNNCall call_of(const BlockCall& b) {
  PixelCNNCall call{};
  std::copy(b.fields, b.fields + sizeof(PixelCNNShape) / sizeof(int), &call.shape.size);
  call.matrices = b.matrices;
  call.vectors = b.vectors;
  call.x = b.x;
  call.log_prob = b.log_prob;
  call.known = b.known;
  call.labels = b.labels;
  call.seed = b.seed;
  call.ids = b.ids;
  call.batch = b.batch;
  call.state = b.state;
  call.images = b.images;
  call.temperature = b.temperature;
  call.inverse_temperature = 1 / b.temperature;
  call.wavefront = b.wavefront;
  call.first_row = b.first_row;
  call.last_row = b.last_row;
  call.layout = b.pairs ? layout_of<Bf16>(call, b.rows) : layout_of<float>(call, b.rows);
  call.state_stride = call.layout.bytes;
  return call;
}

extern "C" void block_bytes(const BlockCall* b, int64_t* state, int64_t* scratch) {
  const PixelCNNState layout = call_of(*b).layout;
  *state = layout.bytes;
  *scratch = layout.scratch_bytes;
}

// Barriers of the last group.
extern "C" int64_t block_sample(const BlockCall* b) {
  const PixelCNNCall call = call_of(*b);
  return b->pairs ? run<Bf16>(call, b->scratch, b->order, b->omit) : run<float>(call, b->scratch, b->order, b->omit);
}
