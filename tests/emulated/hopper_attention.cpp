// csrc/cuda/hopper/attention_forward.h on fibers, for tests/ops/test_hopper_attention.py.
#include "cuda/hopper/attention_forward.h"

using namespace genengine;
using namespace genengine::hopper;

// As the test fills it. Strides in elements, of heads, tokens and batch.
struct AttentionCall {
  char *q, *k, *v, *o;
  float* lse;
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];
  int batch, heads, queries, keys, dim, half, causal, few, section, blocks;
  float scale;
  uint64_t seed;
};

namespace {

template <class Form>
TensorMap map_of(char* base, const AttentionCall& call, int tokens, const int64_t (&stride)[3], int rows) {
  return {base,
          {Form::kDim, call.heads, tokens, call.batch},
          {2, 2 * stride[0], 2 * stride[1], 2 * stride[2]},
          {Form::kColumns, 1, rows, 1},
          2,
          Form::kLine};
}

template <class Form>
void run(const AttentionCall& call) {
  const int blocks = (call.queries + Form::kQueries - 1) / Form::kQueries;
  const ForwardCall forward = {map_of<Form>(call.q, call, call.queries, call.q_stride, Form::kRows),
                               map_of<Form>(call.k, call, call.keys, call.k_stride, Form::kKeys),
                               map_of<Form>(call.v, call, call.keys, call.v_stride, Form::kKeys),
                               map_of<Form>(call.o, call, call.queries, call.o_stride, Form::kRows),
                               call.lse,
                               call.scale * 1.44269504088896341f,
                               call.heads,
                               call.queries,
                               call.keys,
                               blocks * call.heads * call.batch,
                               blocks,
                               call.section};
  emulated::Grid::instance().run({Form::kThreads, call.blocks, Form::kShared, call.seed},
                                  [&](char* memory) { attention_forward<Form>(forward, memory); });
}

template <class T, int Dim>
void run(const AttentionCall& call) {
  if constexpr (has_few(Dim, false))
    if (call.few) return run<Forward<T, Dim, false, true>>(call);
  call.causal ? run<Forward<T, Dim, true, false>>(call) : run<Forward<T, Dim, false, false>>(call);
}

template <class T>
void run_dim(const AttentionCall& call) {
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

extern "C" void attention(const AttentionCall* call) { call->half ? run_dim<Half>(*call) : run_dim<Bf16>(*call); }
