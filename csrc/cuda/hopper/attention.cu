// attention on Hopper: checks, tensor maps and the choice of a form; the kernels are in attention_forward.h.
#include "cuda/hopper/attention_forward.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/launch.h"

// inspect: attention_forward_kernel needs=HGMMA,UTMALDG,UTMASTG,USETMAXREG

namespace genengine::hopper {

template <class Form>
__global__ void __launch_bounds__(Form::kThreads, 1) attention_forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) char memory[];
  attention_forward<Form>(call, memory);
}

namespace {

constexpr int64_t kL2 = 32 << 20;  // bytes of k and v that tiles worked on together may read over and over: of 50 or 60 MB

int multiprocessors(int32_t device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "attention: CUDA device ", device, " does not answer: ", cudaGetErrorString(error));
  return count;
}

// body(Dim as a constant) for the head dims that there are kernels for.
template <class Body>
void with_dim(const char* op, int64_t dim, Body body) {
  const auto take = [&](auto constant) { return dim == constant() && (body(constant), true); };
  const bool taken = take(std::integral_constant<int, 64>{}) || take(std::integral_constant<int, 72>{}) ||
                     take(std::integral_constant<int, 80>{}) || take(std::integral_constant<int, 96>{}) ||
                     take(std::integral_constant<int, 128>{});
  STD_TORCH_CHECK(taken, op, ": the CUDA kernel takes a head dim D of 64, 72, 80, 96 or 128, got ", dim, "; use backend=\"triton\"");
}

// body(T) for the dtypes that wgmma multiplies.
template <class Body>
void with_half(const char* op, const Tensor& q, Body body) {
  if (q.scalar_type() == ScalarType::Half) return body(std::type_identity<Half>{});
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16, op,
                  ": the CUDA kernel takes float16 or bfloat16; convert with .to(torch.bfloat16), or use backend=\"triton\"");
  body(std::type_identity<Bf16>{});
}

// x, or a copy that TMA can read.
Tensor mapped(const Tensor& x) {
  if (mappable(x)) return x;
  const Tensor dense = torch::stable::contiguous(x);
  return mappable(dense) ? dense : torch::stable::clone(dense);
}

void require_like(const char* op, const Launcher& launcher, const char* name, const Tensor& x, const Tensor& q) {
  launcher.require_here(name, x);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(2) == q.size(2) && x.size(3) == q.size(3), op, ": ", name,
                  " must be (B, M, H, D) with q's B, H and D");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), op, ": ", name, " must have q's dtype");
}

template <class Form>
void launch(const char* op, const Launcher& launcher, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
            const Tensor& lse, double scale) {
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), keys = k.size(1);
  const int64_t blocks = (queries + Form::kQueries - 1) / Form::kQueries, tiles = batch * heads * blocks;
  STD_TORCH_CHECK(tiles < INT32_MAX && queries < INT32_MAX - 1024 && keys < INT32_MAX - 1024, op, ": ", tiles,
                  " tiles of queries are too many for one launch; split the batch");
  ForwardCall call;
  call.q = tensor_map(op, "q", q, Form::kColumns, Form::kRows);
  call.k = tensor_map(op, "k", k, Form::kColumns, Form::kKeys);
  call.v = tensor_map(op, "v", v, Form::kColumns, Form::kKeys);
  call.o = tensor_map(op, "o", o, Form::kColumns, Form::kRows);
  call.lse = lse.mutable_data_ptr<float>();
  call.scale = static_cast<float>(scale * 1.4426950408889634);
  call.heads = static_cast<int>(heads);
  call.queries = static_cast<int>(queries);
  call.keys = static_cast<int>(keys);
  call.blocks = static_cast<int>(blocks);
  call.tiles = static_cast<int>(tiles);
  const int64_t fitting = Form::kCausal ? kL2 / (keys * Form::kDim * 4) : 1;  // otherwise a head's tiles follow one another
  call.section = static_cast<int>(fitting < 1 ? 1 : fitting > batch * heads ? batch * heads : fitting);
  const int64_t room = multiprocessors(q.get_device_index());
  Grid grid = {dim3(static_cast<unsigned>(tiles < room ? tiles : room)), dim3(Form::kThreads)};
  grid.shared = Form::kShared;
  launcher.run<attention_forward_kernel<Form>>(grid, call);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, bool causal, double scale) {
  const char* op = "attention";
  const Launcher launcher(op, q_in);
  STD_TORCH_CHECK(q_in.dim() == 4, op, ": q must be (B, N, H, D)");
  require_like(op, launcher, "k", k_in, q_in);
  require_like(op, launcher, "v", v_in, q_in);
  STD_TORCH_CHECK(v_in.size(1) == k_in.size(1), op, ": v must have as many tokens as k");
  STD_TORCH_CHECK(!causal || k_in.size(1) == q_in.size(1), op, ": causal needs as many keys as queries");
  const int64_t queries = q_in.size(1);
  Tensor o = torch::stable::new_empty(q_in, {q_in.size(0), queries, q_in.size(2), q_in.size(3)});
  Tensor lse = torch::stable::new_empty(q_in, {q_in.size(0), q_in.size(2), queries}, ScalarType::Float);
  if (o.numel() == 0) return {o, lse};
  STD_TORCH_CHECK(k_in.size(1) > 0, op, ": k must hold at least one key");
  const Tensor q = mapped(q_in), k = mapped(k_in), v = mapped(v_in);
  with_half(op, q, [&](auto type) {
    using T = typename decltype(type)::type;
    with_dim(op, q.size(3), [&](auto dim) {
      constexpr int kDim = dim();
      if (causal) return launch<Forward<T, kDim, true, false>>(op, launcher, q, k, v, o, lse, scale);
      if constexpr (has_few(kDim, false)) {
        using Large = Forward<T, kDim, false, false>;
        if (queries <= kFewQueries && queries > Large::kQueries)
          return launch<Forward<T, kDim, false, true>>(op, launcher, q, k, v, o, lse, scale);
      }
      launch<Forward<T, kDim, false, false>>(op, launcher, q, k, v, o, lse, scale);
    });
  });
  return {o, lse};
}

}  // namespace
}  // namespace genengine::hopper

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) { m.impl("attention", TORCH_BOX(&genengine::hopper::attention)); }
