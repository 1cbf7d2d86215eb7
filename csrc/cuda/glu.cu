// glu and its backward on CUDA. A team of threads takes V columns each, 16 bytes of gate and of value, and goes down a chunk of
// rows; its biases and the sums of their gradient stay in registers. Accumulates in float32; sums in a fixed order, no atomics.
#include "cuda/channel_sums.h"
#include "genengine/glu.h"

namespace genengine {

constexpr int kRowsDown = 16;  // rows of a task

struct GluRows {  // (B, N, ...), innermost stride 1
  const void* base = nullptr;
  int64_t batch = 0, token = 0;
  template <class T>
  __device__ __forceinline__ const T* at(int64_t row, int64_t tokens) const {
    const int64_t b = row / tokens;
    return static_cast<const T*>(base) + b * batch + (row - b * tokens) * token;
  }
};

struct GluArguments {
  GluRows x, grad;
  ChannelVector bias;
  void* out;       // y (B, N, D) or dx (B, N, 2 D), dense
  float* partial;  // (chunks, 2 D), null: not wanted
  int64_t rows, tokens, dim, gate, value, tiles, tasks;
  Activation activation;
};

template <class Body>
__device__ __forceinline__ void with_gate(Activation activation, Body body) {
  if (activation == Activation::gelu) return body(Tag<Activation::gelu>{});
  if (activation == Activation::gelu_tanh) return body(Tag<Activation::gelu_tanh>{});
  body(Tag<Activation::silu>{});
}

template <class T, bool Backward, int V>
__device__ __forceinline__ void glu_task(const GluArguments& a) {
  const int64_t task = team_index();
  if (task >= a.tasks) return;
  const int64_t chunk = task / a.tiles, column = ((task - chunk * a.tiles) * blockDim.x + threadIdx.x) * V;
  if (column >= a.dim) return;
  const int64_t first = chunk * kRowsDown, last = first + kRowsDown < a.rows ? first + kRowsDown : a.rows;
  const int64_t gate_at = a.gate + column, value_at = a.value + column;
  float gate_bias[V], value_bias[V], gate_sums[V] = {}, value_sums[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    gate_bias[i] = a.bias.at(gate_at + i);
    value_bias[i] = a.bias.at(value_at + i);
  }
  for (int64_t row = first; row < last; ++row) {
    const T* x = a.x.at<T>(row, a.tokens);
    float gate[V], value[V], grad[V];
    read<V>(x + gate_at, gate);
    read<V>(x + value_at, value);
    if constexpr (Backward) read<V>(a.grad.at<T>(row, a.tokens) + column, grad);
    with_gate(a.activation, [&](auto tag) {
      constexpr Activation A = decltype(tag)::kActivation;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float g = gate[i] + gate_bias[i], v = value[i] + value_bias[i];
        if constexpr (Backward) {
          gate[i] = grad[i] * glu_gate_slope<A>(g, v);
          value[i] = grad[i] * activate<A>(g, 0.f);
        } else {
          value[i] = glu_value<A, std::is_same_v<T, __nv_bfloat16>>(g, v);
        }
      }
    });
    if constexpr (Backward) {
      T* dx = static_cast<T*>(a.out) + row * 2 * a.dim;
      write<V>(dx + gate_at, gate);
      write<V>(dx + value_at, value);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        gate_sums[i] += gate[i];
        value_sums[i] += value[i];
      }
    } else {
      write<V>(static_cast<T*>(a.out) + row * a.dim + column, value);
    }
  }
  if (Backward && a.partial != nullptr) {
    write<V>(a.partial + chunk * 2 * a.dim + gate_at, gate_sums);
    write<V>(a.partial + chunk * 2 * a.dim + value_at, value_sums);
  }
}

template <class T, bool Backward>
__global__ void GENENGINE_BOUNDS glu_vectorised(const __grid_constant__ GluArguments a) {
  glu_task<T, Backward, 16 / sizeof(T)>(a);
}

template <class T, bool Backward>
__global__ void GENENGINE_BOUNDS glu_single(const __grid_constant__ GluArguments a) {
  glu_task<T, Backward, 1>(a);
}

namespace {

// One call's checks; it also notes whether 16-byte accesses are possible.
struct Call {
  const char* op;
  const Launcher& launcher;
  GluArguments a{};
  bool wide;

  Call(const char* name, const Launcher& on, const Tensor& x, const OptionalTensor& bias, const std::string& activation,
       bool gate_first)
      : op(name), launcher(on) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, op, ": x must be (B, N, 2 D)");
    launcher.require_here("bias", bias);
    require_bias(op, "bias", bias, x, x.size(2));
    a.tokens = x.size(1);
    a.rows = x.size(0) * a.tokens;
    a.dim = x.size(2) / 2;
    a.gate = gate_first ? 0 : a.dim;
    a.value = a.dim - a.gate;
    a.activation = activation_of(op, activation);
    STD_TORCH_CHECK(a.activation == Activation::gelu || a.activation == Activation::gelu_tanh || a.activation == Activation::silu,
                    op, ": activation must be gelu, gelu_tanh or silu, got ", activation);
    a.bias = ChannelVector(bias);
    wide = a.dim % (16 / static_cast<int64_t>(x.element_size())) == 0;
  }
  // Rows are read through their strides; only an innermost stride other than 1 costs a copy.
  Tensor rows(const Tensor& t, GluRows& view) {
    Tensor unit = t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
    const int64_t size = static_cast<int64_t>(unit.element_size());
    wide = wide && reinterpret_cast<uintptr_t>(unit.data_ptr()) % 16 == 0 && unit.stride(0) * size % 16 == 0 &&
           unit.stride(1) * size % 16 == 0;
    view = {unit.const_data_ptr(), unit.stride(0), unit.stride(1)};
    return unit;
  }
  template <bool Backward>
  void run(Type type, const Tensor& out) {
    a.out = out.mutable_data_ptr();
    with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const int64_t items = wide ? a.dim / (16 / static_cast<int64_t>(sizeof(T))) : a.dim;
      const int across = threads_across(items);
      a.tiles = (items + across - 1) / across;
      a.tasks = a.tiles * ((a.rows + kRowsDown - 1) / kRowsDown);
      const Grid grid = team_grid(op, a.tasks, across);
      wide ? launcher.template run<glu_vectorised<T, Backward>>(grid, a) : launcher.template run<glu_single<T, Backward>>(grid, a);
    });
  }
};

Tensor glu(const Tensor& x_in, const OptionalTensor& bias, std::string activation, bool gate_first) {
  const Launcher launcher("glu", x_in);
  Call call("glu", launcher, x_in, bias, activation, gate_first);
  Tensor y = torch::stable::new_empty(x_in, {x_in.size(0), x_in.size(1), call.a.dim});
  if (y.numel() == 0) return y;
  const Tensor x = call.rows(x_in, call.a.x);
  call.run<false>(type_of("glu", "x", x), y);
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias,
                                        std::string activation, bool gate_first) {
  const char* op = "glu_backward";
  const Launcher launcher(op, x_in);
  Call call(op, launcher, x_in, bias, activation, gate_first);
  launcher.require_here("grad", grad_in);
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == x_in.size(0) && grad_in.size(1) == x_in.size(1) &&
                      grad_in.size(2) == call.a.dim && grad_in.scalar_type() == x_in.scalar_type(),
                  op, ": grad must be (B, N, D) in x's dtype");
  Tensor dx = torch::stable::new_empty(x_in, {x_in.size(0), x_in.size(1), x_in.size(2)});
  if (dx.numel() == 0)
    return {dx, bias ? torch::stable::new_zeros(*bias, {bias->size(0)}) : torch::stable::new_empty(x_in, {0})};
  const Tensor x = call.rows(x_in, call.a.x), grad = call.rows(grad_in, call.a.grad);
  const int64_t chunks = (call.a.rows + kRowsDown - 1) / kRowsDown;
  const Tensor partial = torch::stable::new_empty(x, {bias ? chunks * 2 * call.a.dim : 0}, ScalarType::Float);
  call.a.partial = bias ? partial.mutable_data_ptr<float>() : nullptr;
  call.run<true>(type_of(op, "x", x), dx);
  return {dx, bias ? channel_sums(launcher, *bias, partial, chunks, 1) : torch::stable::new_empty(x, {0})};
}

}  // namespace
}  // namespace genengine

STABLE_TORCH_LIBRARY_IMPL(genengine, CUDA, m) {
  m.impl("glu", TORCH_BOX(&genengine::glu));
  m.impl("glu_backward", TORCH_BOX(&genengine::glu_backward));
}
