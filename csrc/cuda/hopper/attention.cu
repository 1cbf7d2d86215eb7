// attention on Hopper: tensor maps, the choice of a form and the launch; the kernel is in attention_forward.h.
#include "cuda/hopper/attention_forward.h"
#include "cuda/hopper/attention_host.h"

// inspect: attention_forward_kernel needs=HGMMA,UTMALDG,UTMASTG,USETMAXREG registers=96,128,168

namespace genengine::hopper {

template <class Form>
__global__ void __launch_bounds__(Form::kThreads, 1) attention_forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) char memory[];
  attention_forward<Form>(call, memory);
}

namespace {

constexpr int64_t kL2 = 32 << 20;  // bytes of k and v that tiles worked on together may read over and over: of 50 or 60 MB

template <class Form>
void launch(const char* op, const Launcher& launcher, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
            const Tensor& lse, double scale) {
  const int64_t queries = q.size(1), keys = k.size(1), heads = q.size(0) * q.size(2);
  const int64_t blocks = (queries + Form::kQueries - 1) / Form::kQueries, tiles = heads * blocks;
  require_countable_tiles(op, tiles, queries, keys);
  ForwardCall call;
  call.q = tensor_map(op, "q", q, Form::kColumns, Form::kRows);
  call.k = tensor_map(op, "k", k, Form::kColumns, Form::kKeys);
  call.v = tensor_map(op, "v", v, Form::kColumns, Form::kKeys);
  call.o = tensor_map(op, "o", o, Form::kColumns, Form::kRows);
  call.lse = lse.mutable_data_ptr<float>();
  call.scale = static_cast<float>(scale * kLog2E);
  call.heads = static_cast<int>(q.size(2));
  call.queries = static_cast<int>(queries);
  call.keys = static_cast<int>(keys);
  call.blocks = static_cast<int>(blocks);
  call.tiles = static_cast<int>(tiles);
  const int64_t fitting = Form::kCausal ? kL2 / (keys * Form::kDim * 4) : 1;  // otherwise a head's tiles follow one another
  call.section = static_cast<int>(fitting < 1 ? 1 : fitting > heads ? heads : fitting);
  const int64_t room = multiprocessors(op, q.get_device_index());
  Grid grid = {dim3(static_cast<unsigned>(tiles < room ? tiles : room)), dim3(Form::kThreads)};
  grid.shared = Form::kShared;
  launcher.run<attention_forward_kernel<Form>>(grid, call);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, bool causal, double scale) {
  const char* op = "attention";
  const Launcher launcher(op, q_in);
  require_inputs(op, launcher, q_in, k_in, v_in, causal);
  const int64_t queries = q_in.size(1);
  Tensor o = torch::stable::new_empty(q_in, {q_in.size(0), queries, q_in.size(2), q_in.size(3)});
  Tensor lse = torch::stable::new_empty(q_in, {q_in.size(0), q_in.size(2), queries}, ScalarType::Float);
  if (o.numel() == 0) return {o, lse};
  const Tensor q = mapped(q_in), k = mapped(k_in), v = mapped(v_in);
  with_half(op, q, [&](auto type) {
    using T = typename decltype(type)::type;
    with_dim(op, q.size(3), [&](auto dim) {
      constexpr int kDim = dim();
      if (causal) return launch<Forward<T, kDim, true, false>>(op, launcher, q, k, v, o, lse, scale);
      using Many = Forward<T, kDim, false, false>;
      if constexpr (has_few(kDim, false))
        if (queries <= kFewQueries && queries > Many::kQueries)
          return launch<Forward<T, kDim, false, true>>(op, launcher, q, k, v, o, lse, scale);
      launch<Many>(op, launcher, q, k, v, o, lse, scale);
    });
  });
  return {o, lse};
}

}  // namespace
}  // namespace genengine::hopper

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) { m.impl("attention", TORCH_BOX(&genengine::hopper::attention)); }
