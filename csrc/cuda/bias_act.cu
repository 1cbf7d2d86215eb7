// bias_act and its backwards on CUDA, x (outer, C, inner) as a matrix with one bias per column (inner = 1) or per row. A team
// of threads takes V columns each, 16 bytes, and goes down a chunk of rows, or along a segment of one row: its biases are
// loaded once, and its sums of dx stay in registers. Accumulates in float32, without fused multiply-add but in the
// activations; sums in a fixed order, no atomics.
#include "cuda/channel_sums.h"
#include "genengine/bias_act.h"

#include <limits>

namespace genengine {

constexpr int kDown = 16, kAlong = 4;  // steps of a team: rows, or pieces of one row

struct BiasActArguments {
  const void *grad, *x, *grad_dx;
  void *out, *d_grad;  // y, dx or d_x; null: not wanted
  float* partial;      // null: not wanted
  ChannelVector bias, grad_dbias;
  int64_t rows, columns, channels, tiles, tasks;  // tiles: of columns; tasks: chunks of rows (or rows) times tiles
  bool by_row;
  Activation activation;
  BiasActOptions options;
};

// Where one thread's elements lie: `count` groups of V from `first` on, `step` apart.
template <int V>
struct Walk {
  int64_t first, step, channel;
  int count;
  __device__ Walk(const BiasActArguments& a, int64_t task) {
    const int64_t major = task / a.tiles, tile = task - major * a.tiles, across = static_cast<int64_t>(blockDim.x) * V;
    if (a.by_row) {
      const int64_t column = tile * across * kAlong + static_cast<int64_t>(threadIdx.x) * V;
      const int64_t left = (a.columns - column + across - 1) / across;
      first = major * a.columns + column;
      step = across;
      channel = major % a.channels;
      count = column >= a.columns ? 0 : static_cast<int>(left < kAlong ? left : kAlong);
    } else {
      const int64_t row = major * kDown, left = a.rows - row;
      channel = tile * across + static_cast<int64_t>(threadIdx.x) * V;
      first = row * a.columns + channel;
      step = a.columns;
      count = channel >= a.columns ? 0 : static_cast<int>(left < kDown ? left : kDown);
    }
  }
};

template <int V>
__device__ __forceinline__ void load_biases(const ChannelVector& vector, const BiasActArguments& a, const Walk<V>& walk,
                                            float (&values)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = walk.count == 0 ? 0.f : vector.at(a.by_row ? walk.channel : walk.channel + i);
}

template <class T, int V>
__device__ __forceinline__ void forward_task(const BiasActArguments& a) {
  const int64_t task = team_index();
  if (task >= a.tasks) return;
  const Walk<V> walk(a, task);
  float bias[V];
  load_biases<V>(a.bias, a, walk, bias);
  for (int k = 0; k < walk.count; ++k) {
    const int64_t at = walk.first + k * walk.step;
    float u[V];
    read<V>(static_cast<const T*>(a.x) + at, u);
    with_activation(a.activation, [&](auto tag) {
      constexpr bool kRounded = std::is_same_v<T, __nv_bfloat16>;
#pragma unroll
      for (int i = 0; i < V; ++i) u[i] = bias_act_value<decltype(tag)::kActivation, kRounded>(u[i] + bias[i], a.options);
    });
    write<V>(static_cast<T*>(a.out) + at, u);
  }
}

// u becomes the slope, and where wanted `curvature` the second derivative.
template <bool Second, int V>
__device__ __forceinline__ void differentiate(const BiasActArguments& a, float (&u)[V], float (&curvature)[V]) {
  const bool clamped = a.options.clamp == a.options.clamp;
  with_activation(a.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::kActivation;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float slope = bias_act_slope<A, false>(u[i], a.options);
      if constexpr (Second) {
        const float bend = bias_act_curvature<A, false>(u[i], a.options);
        curvature[i] = clamped ? bias_act_passed<A>(bend, u[i], a.options) : bend;
      }
      u[i] = clamped ? bias_act_passed<A>(slope, u[i], a.options) : slope;
    }
  });
}

template <class T, bool Second, int V>
__device__ __forceinline__ void backward_task(const BiasActArguments& a, float (&slots)[kThreads / 32]) {
  const int64_t task = team_index();
  if (task >= a.tasks) return;  // a whole team; those of more than a warp have a block to themselves
  const Walk<V> walk(a, task);
  float bias[V], sums[V] = {};
  load_biases<V>(a.bias, a, walk, bias);
  for (int k = 0; k < walk.count; ++k) {
    const int64_t at = walk.first + k * walk.step;
    float u[V], v[V], dx[V];
    read<V>(static_cast<const T*>(a.x) + at, u);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] += bias[i];
    differentiate<Second>(a, u, dx);
    if constexpr (Second) {
      float other[V];
      load_biases<V>(a.grad_dbias, a, walk, other);
      read<V>(static_cast<const T*>(a.grad_dx) + at, v);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        v[i] += other[i];
        dx[i] *= v[i];
        u[i] *= v[i];
      }
      write<V>(static_cast<T*>(a.d_grad) + at, u);
      if (a.out == nullptr) continue;
    }
    read<V>(static_cast<const T*>(a.grad) + at, v);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dx[i] = Second ? dx[i] * v[i] : u[i] * v[i];
      sums[i] += dx[i];
    }
    write<V>(static_cast<T*>(a.out) + at, dx);
  }
  if (a.partial == nullptr) return;
  if (!a.by_row) {
    if (walk.count > 0) write<V>(a.partial + task / a.tiles * a.columns + walk.channel, sums);
    return;
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += sums[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (blockDim.x > 32) {
    if (threadIdx.x % 32 == 0) slots[threadIdx.y * (blockDim.x / 32) + threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += slots[threadIdx.y * (blockDim.x / 32) + w];
  }
  if (threadIdx.x == 0) a.partial[task] = sum;
}

template <class T>
__global__ void GENENGINE_BOUNDS bias_act_vectorised(const __grid_constant__ BiasActArguments a) {
  forward_task<T, 16 / sizeof(T)>(a);
}

template <class T>
__global__ void GENENGINE_BOUNDS bias_act_single(const __grid_constant__ BiasActArguments a) {
  forward_task<T, 1>(a);
}

template <class T, bool Second>
__global__ void GENENGINE_BOUNDS bias_act_backward_vectorised(const __grid_constant__ BiasActArguments a) {
  __shared__ float slots[kThreads / 32];
  backward_task<T, Second, 16 / sizeof(T)>(a, slots);
}

template <class T, bool Second>
__global__ void GENENGINE_BOUNDS bias_act_backward_single(const __grid_constant__ BiasActArguments a) {
  __shared__ float slots[kThreads / 32];
  backward_task<T, Second, 1>(a, slots);
}

namespace {

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// The matrix, its tiles, and the launch.
struct Call {
  const char* op;
  const Launcher& launcher;
  BiasActArguments a{};
  int64_t outer;
  bool wide = false;
  Grid grid;

  Call(const char* name, const Launcher& on, const Tensor& x, const OptionalTensor& bias, const std::string& activation,
       double alpha, double gain, std::optional<double> clamp)
      : op(name), launcher(on), outer(x.size(0)) {
    a.activation = activation_of(op, activation);
    a.options = {static_cast<float>(alpha), static_cast<float>(gain),
                 clamp ? static_cast<float>(*clamp) : std::numeric_limits<float>::quiet_NaN()};
    a.bias = ChannelVector(bias);
    a.x = x.const_data_ptr();
    a.by_row = x.size(2) > 1 || !bias;
    a.channels = bias ? x.size(1) : 1;
    a.columns = !bias ? x.numel() : a.by_row ? x.size(2) : x.size(1);
    a.rows = x.numel() / a.columns;
  }

  void divide(const Tensor& x) {
    const int64_t v = 16 / static_cast<int64_t>(x.element_size());
    wide = a.columns % v == 0 && aligned(a.x) && aligned(a.grad) && aligned(a.grad_dx) && aligned(a.out) && aligned(a.d_grad);
    const int64_t items = wide ? a.columns / v : a.columns;
    // a team of more than a warp must have its block to itself: it meets at a barrier
    const int64_t along = (items + kAlong - 1) / kAlong;
    const int across = a.by_row ? (along <= 32 ? 32 : kThreads) : threads_across(items);
    a.tiles = (items + across * (a.by_row ? kAlong : 1) - 1) / (across * (a.by_row ? kAlong : 1));
    a.tasks = a.tiles * (a.by_row ? a.rows : (a.rows + kDown - 1) / kDown);
    grid = team_grid(op, a.tasks, across);
  }
  Tensor partial(const Tensor& x) const {
    return torch::stable::new_empty(x, {a.by_row ? a.tasks : a.tasks / a.tiles * a.columns}, ScalarType::Float);
  }
  Tensor sums(const Tensor& bias, const Tensor& partial) const {
    return a.by_row ? channel_sums(launcher, bias, partial, outer, a.tiles)
                    : channel_sums(launcher, bias, partial, a.tasks / a.tiles, 1);
  }
};

Tensor checked(const char* op, const Launcher& launcher, const char* name, const Tensor& tensor, const Tensor& x) {
  launcher.require_here(name, tensor);
  require_like(op, name, tensor, x);
  return torch::stable::contiguous(tensor);
}

void check_bias(const char* op, const Launcher& launcher, const char* name, const OptionalTensor& bias, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must be (outer, C, inner)");
  launcher.require_here(name, bias);
  require_bias(op, name, bias, x, x.size(1));
}

Tensor like_x(const Tensor& x) { return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}); }

Tensor bias_act(const Tensor& x_in, const OptionalTensor& bias, std::string activation, double alpha, double gain,
                std::optional<double> clamp) {
  const char* op = "bias_act";
  const Launcher launcher(op, x_in);
  check_bias(op, launcher, "bias", bias, x_in);
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor y = like_x(x);
  if (x.numel() == 0) return y;
  Call call(op, launcher, x, bias, activation, alpha, gain, clamp);
  call.a.out = y.mutable_data_ptr();
  call.divide(x);
  with_type(type_of(op, "x", x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.wide ? launcher.run<bias_act_vectorised<T>>(call.grid, call.a) : launcher.run<bias_act_single<T>>(call.grid, call.a);
  });
  return y;
}

template <bool Second>
Tensor run_backward(Call& call, const Tensor& x, const OptionalTensor& bias) {
  call.divide(x);
  const bool summed = bias.has_value() && call.a.out != nullptr;
  const Tensor partial = summed ? call.partial(x) : torch::stable::new_empty(x, {0}, ScalarType::Float);
  call.a.partial = summed ? partial.mutable_data_ptr<float>() : nullptr;
  if (call.wide && summed && !aligned(call.a.partial)) STD_TORCH_CHECK(false, call.op, ": unaligned allocation");
  with_type(type_of(call.op, "x", x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    call.wide ? call.launcher.template run<bias_act_backward_vectorised<T, Second>>(call.grid, call.a)
              : call.launcher.template run<bias_act_backward_single<T, Second>>(call.grid, call.a);
  });
  return summed ? call.sums(*bias, partial) : torch::stable::new_empty(x, {0});
}

Tensor no_sums(const OptionalTensor& bias, const Tensor& x) {
  return bias ? torch::stable::new_zeros(*bias, {bias->size(0)}) : torch::stable::new_empty(x, {0});
}

std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias,
                                             std::string activation, double alpha, double gain, std::optional<double> clamp) {
  const char* op = "bias_act_backward";
  const Launcher launcher(op, x_in);
  check_bias(op, launcher, "bias", bias, x_in);
  const Tensor grad = checked(op, launcher, "grad", grad_in, x_in), x = torch::stable::contiguous(x_in);
  Tensor dx = like_x(x);
  if (x.numel() == 0) return {dx, no_sums(bias, x)};
  Call call(op, launcher, x, bias, activation, alpha, gain, clamp);
  call.a.grad = grad.const_data_ptr();
  call.a.out = dx.mutable_data_ptr();
  return {dx, run_backward<false>(call, x, bias)};
}

std::tuple<Tensor, Tensor, Tensor> bias_act_backward_backward(const Tensor& grad_dx_in, const OptionalTensor& grad_dbias,
                                                              const Tensor& grad_in, const Tensor& x_in,
                                                              const OptionalTensor& bias, std::string activation, double alpha,
                                                              double gain, std::optional<double> clamp) {
  const char* op = "bias_act_backward_backward";
  const Launcher launcher(op, x_in);
  check_bias(op, launcher, "bias", bias, x_in);
  check_bias(op, launcher, "grad_dbias", grad_dbias, x_in);
  STD_TORCH_CHECK(!grad_dbias || bias, op, ": grad_dbias without bias");
  const Tensor grad_dx = checked(op, launcher, "grad_dx", grad_dx_in, x_in), x = torch::stable::contiguous(x_in);
  const Tensor grad = checked(op, launcher, "grad", grad_in, x_in), none = torch::stable::new_empty(x, {0});
  const bool curved = is_curved(activation_of(op, activation));
  const Tensor d_grad = like_x(x), d_x = curved ? like_x(x) : none;
  if (x.numel() == 0) return {d_grad, d_x, curved ? no_sums(bias, x) : none};
  Call call(op, launcher, x, bias, activation, alpha, gain, clamp);
  call.a.grad = grad.const_data_ptr();
  call.a.grad_dx = grad_dx.const_data_ptr();
  call.a.grad_dbias = ChannelVector(grad_dbias);
  call.a.d_grad = d_grad.mutable_data_ptr();
  call.a.out = curved ? d_x.mutable_data_ptr() : nullptr;
  return {d_grad, d_x, run_backward<true>(call, x, bias)};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&genengine::bias_act));
  m.impl("bias_act_backward", TORCH_BOX(&genengine::bias_act_backward));
  m.impl("bias_act_backward_backward", TORCH_BOX(&genengine::bias_act_backward_backward));
}
