// csrc/cuda/hopper/attention_backward.h on fibers, its three launches, for tests/ops/test_hopper_attention_backward.py.
#include "cuda/hopper/attention_backward.h"

using namespace genengine;
using namespace genengine::hopper;

// As the test fills it: a tensor (B, N, H, D), strides in elements.
struct Rows {
  char* base;
  int64_t batch, token, head;
};

struct BackwardArguments {
  Rows grad_o, q, k, v, o, dq, dk, dv;
  const float* lse;
  float *stats, *sums;
  int* turns;
  int batch, heads, queries, keys, dim, half, causal, blocks, together;
  float scale;
  uint64_t seed;
};

namespace {

template <class Form>
TensorMap map_of(const Rows& x, const BackwardArguments& call, int tokens, int rows) {
  return {x.base,
          {Form::kDim, call.heads, tokens, call.batch},
          {2, 2 * x.head, 2 * x.token, 2 * x.batch},
          {Form::kColumns, 1, rows, 1},
          2,
          Form::kLine};
}

Strided strided(const Rows& x) { return {x.base, x.batch, x.token, x.head}; }

int padded(const BackwardArguments& call) { return (call.queries + 63) / 64 * 64; }

// A launch of threads that work alone, `items` in all.
template <class Body>
void each(int64_t items, int per_block, int threads, uint64_t seed, Body body) {
  const int blocks = static_cast<int>((items + per_block - 1) / per_block);
  emulated::Grid::instance().run({threads, blocks, 0, seed}, [&](char*) { body(); });
}

template <class Form>
void products(const BackwardArguments& call) {
  const int blocks = (call.keys + Form::kKeys - 1) / Form::kKeys;
  const BackwardCall backward = {map_of<Form>(call.grad_o, call, call.queries, Form::kQueries),
                                 map_of<Form>(call.q, call, call.queries, Form::kQueries),
                                 map_of<Form>(call.k, call, call.keys, Form::kKeys),
                                 map_of<Form>(call.v, call, call.keys, Form::kKeys),
                                 map_of<Form>(call.dk, call, call.keys, Form::kRows),
                                 map_of<Form>(call.dv, call, call.keys, Form::kRows),
                                 call.stats,
                                 call.sums,
                                 call.turns,
                                 call.scale * 1.44269504088896341f,
                                 call.scale,
                                 call.heads,
                                 call.queries,
                                 call.keys,
                                 blocks * call.heads * call.batch,
                                 blocks};
  emulated::Grid::instance().run({Form::kThreads, call.blocks, Form::kShared, call.seed, call.together},
                                 [&](char* memory) { attention_backward<Form>(backward, memory); });
}

template <class T, int Dim>
void run(const BackwardArguments& call) {
  const int64_t rows = static_cast<int64_t>(call.batch) * call.heads * padded(call);
  const PrepareCall prepare = {strided(call.grad_o), strided(call.o), call.lse, call.stats, rows, call.heads, call.queries, padded(call)};
  each(rows, kPrepareThreads / kPrepareLanes, kPrepareThreads, call.seed, [&] { prepare_backward<T, Dim>(prepare); });
  call.causal ? products<BackwardForm<T, Dim, true>>(call) : products<BackwardForm<T, Dim, false>>(call);
  const FinishCall finish = {call.sums, strided(call.dq), call.scale, rows * Dim / 4, call.heads, call.queries, padded(call)};
  each(finish.quads, kFinishThreads, kFinishThreads, call.seed, [&] { finish_backward<T, Dim>(finish); });
}

template <class T>
void run_dim(const BackwardArguments& call) {
  switch (call.dim) {
    case 64: return run<T, 64>(call);
    case 72: return run<T, 72>(call);
    case 80: return run<T, 80>(call);
    case 96: return run<T, 96>(call);
    case 128: return run<T, 128>(call);
    default: emulated::refuse("no form of head dim %d", call.dim);
  }
}

}  // namespace

extern "C" void attention_backward(const BackwardArguments* call) {
  call->half ? run_dim<Half>(*call) : run_dim<Bf16>(*call);
}
