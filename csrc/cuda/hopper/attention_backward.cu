// attention's backward on Hopper: buffers, tensor maps and three launches; the kernels are in attention_backward.h.
#include "cuda/hopper/attention_backward.h"
#include "cuda/hopper/attention_host.h"

// inspect: attention_backward_kernel needs=HGMMA,UTMALDG,UTMASTG,USETMAXREG,UBLKRED registers=168
// inspect: attention_prepare_kernel streaming
// inspect: attention_finish_kernel streaming

namespace genengine::hopper {

template <class Form>
__global__ void __launch_bounds__(Form::kThreads, 1) attention_backward_kernel(const __grid_constant__ BackwardCall call) {
  extern __shared__ __align__(1024) char memory[];
  attention_backward<Form>(call, memory);
}

template <class T, int Dim>
__global__ void __launch_bounds__(kPrepareThreads) attention_prepare_kernel(const PrepareCall call) {
  prepare_backward<T, Dim>(call);
}

template <class T, int Dim>
__global__ void __launch_bounds__(kFinishThreads) attention_finish_kernel(const FinishCall call) {
  finish_backward<T, Dim>(call);
}

namespace {

Strided strided(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Grid blocks_of(const char* op, int64_t items, int per_block, int threads) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks < INT32_MAX, op, ": ", blocks, " blocks are too many for one launch; split the batch");
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads))};
}

// The operands of a call, and what its launches leave for one another.
struct Work {
  Tensor grad_o, q, k, v, o, lse, dq, dk, dv, stats, sums, turns;
  bool deterministic;
  double scale;
};

template <class T, int Dim>
void prepare(const char* op, const Launcher& launcher, const Work& w) {
  const int64_t rows = w.stats.numel() / 2, heads = w.q.size(0) * w.q.size(2);
  PrepareCall call{strided(w.grad_o), strided(w.o), w.lse.const_data_ptr<float>(), w.stats.mutable_data_ptr<float>(), rows};
  call.heads = static_cast<int>(w.q.size(2));
  call.queries = static_cast<int>(w.q.size(1));
  call.padded = static_cast<int>(rows / heads);
  launcher.run<attention_prepare_kernel<T, Dim>>(blocks_of(op, rows, kPrepareThreads / kPrepareLanes, kPrepareThreads), call);
}

template <class T, int Dim>
void finish(const char* op, const Launcher& launcher, const Work& w) {
  FinishCall call{w.sums.const_data_ptr<float>(), strided(w.dq), static_cast<float>(w.scale), w.sums.numel() / 4};
  call.heads = static_cast<int>(w.q.size(2));
  call.queries = static_cast<int>(w.q.size(1));
  call.padded = static_cast<int>(w.stats.numel() / 2 / (w.q.size(0) * w.q.size(2)));
  launcher.run<attention_finish_kernel<T, Dim>>(blocks_of(op, call.quads, kFinishThreads, kFinishThreads), call);
}

template <class Form>
void launch(const char* op, const Launcher& launcher, const Work& w) {
  const int64_t queries = w.q.size(1), keys = w.k.size(1);
  const int64_t blocks = (keys + Form::kKeys - 1) / Form::kKeys, tiles = w.q.size(0) * w.q.size(2) * blocks;
  require_countable_tiles(op, tiles, queries, keys);
  BackwardCall call;
  call.grad_o = tensor_map(op, "grad_o", w.grad_o, Form::kColumns, Form::kQueries);
  call.q = tensor_map(op, "q", w.q, Form::kColumns, Form::kQueries);
  call.k = tensor_map(op, "k", w.k, Form::kColumns, Form::kKeys);
  call.v = tensor_map(op, "v", w.v, Form::kColumns, Form::kKeys);
  call.dk = tensor_map(op, "dk", w.dk, Form::kColumns, Form::kRows);
  call.dv = tensor_map(op, "dv", w.dv, Form::kColumns, Form::kRows);
  call.stats = w.stats.const_data_ptr<float>();
  call.sums = w.sums.mutable_data_ptr<float>();
  call.turns = w.deterministic ? w.turns.mutable_data_ptr<int32_t>() : nullptr;
  call.scale = static_cast<float>(w.scale * kLog2E);
  call.natural_scale = static_cast<float>(w.scale);
  call.heads = static_cast<int>(w.q.size(2));
  call.queries = static_cast<int>(queries);
  call.keys = static_cast<int>(keys);
  call.tiles = static_cast<int>(tiles);
  call.blocks = static_cast<int>(blocks);
  // In turns, a tile waits for those with lower numbers. A block for each tile: then all it waits for has begun before it, and
  // gets done, however few of the blocks run at once. Blocks that go on to a next tile would wait for blocks not begun, where
  // other streams or processes have the other multiprocessors.
  const int64_t room = w.deterministic ? tiles : multiprocessors(op, w.q.get_device_index());
  Grid grid = {dim3(static_cast<unsigned>(tiles < room ? tiles : room)), dim3(Form::kThreads)};
  grid.shared = Form::kShared;
  launcher.run<attention_backward_kernel<Form>>(grid, call);
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                                             const Tensor& lse, bool causal, double scale, bool deterministic) {
  const char* op = "attention_backward";
  const Launcher launcher(op, q);
  require_inputs(op, launcher, q, k, v, causal);
  require_like(op, launcher, "grad_o", grad_o, q, q.size(1));
  require_like(op, launcher, "o", o, q, q.size(1));
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3), keys = k.size(1);
  launcher.require_here("lse", lse);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 3 && lse.numel() == batch * heads * queries, op,
                  ": lse must be float32 (", batch, ", ", heads, ", ", queries, ")");
  if (q.numel() == 0)
    return {torch::stable::new_zeros(q, {batch, queries, heads, dim}), torch::stable::new_zeros(q, {batch, keys, heads, dim}),
            torch::stable::new_zeros(q, {batch, keys, heads, dim})};
  const int64_t tiles = (queries + 63) / 64;
  Work w{mapped(grad_o), mapped(q), mapped(k), mapped(v), mapped(o), torch::stable::contiguous(lse)};
  w.dq = torch::stable::new_empty(q, {batch, queries, heads, dim});
  w.dk = torch::stable::new_empty(q, {batch, keys, heads, dim});
  w.dv = torch::stable::new_empty(q, {batch, keys, heads, dim});
  w.stats = torch::stable::new_empty(q, {batch, heads, tiles * 64, 2}, ScalarType::Float);
  w.sums = torch::stable::new_zeros(q, {batch, heads, tiles * 64, dim}, ScalarType::Float);
  w.turns = torch::stable::new_zeros(q, {batch, heads, deterministic ? tiles : 0}, ScalarType::Int);
  w.deterministic = deterministic;
  w.scale = scale;
  with_half(op, q, [&](auto type) {
    using T = typename decltype(type)::type;
    with_dim(op, dim, [&](auto constant) {
      constexpr int kDim = constant();
      prepare<T, kDim>(op, launcher, w);
      causal ? launch<BackwardForm<T, kDim, true>>(op, launcher, w) : launch<BackwardForm<T, kDim, false>>(op, launcher, w);
      finish<T, kDim>(op, launcher, w);
    });
  });
  return {w.dq, w.dk, w.dv};
}

}  // namespace
}  // namespace genengine::hopper

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("hopper_attention_backward", TORCH_BOX(&genengine::hopper::gradients));
}
