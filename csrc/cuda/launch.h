// What the CUDA units share: launching with checks, grids over (sample, item), and converting 16-byte accesses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <string>
#include <type_traits>

#include "torch_api.h"
#include "cuda/cuda_stream.h"
#include "elementwise_checks.h"
#include "genengine/normal.h"

namespace genengine {

// ---- host: launching -------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
// The second number keeps ptxas from spilling a few bytes for the sake of more blocks per multiprocessor.
#define GENENGINE_BOUNDS __launch_bounds__(kThreads, 2)

constexpr size_t kSharedUnasked = 48 << 10;  // bytes that every GPU gives a block without being asked

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;
};

// A thread for each (item, sample): threadIdx.x over the items of a sample, threadIdx.y over samples where these are
// small. Kernels loop on samples (`first_sample`, `sample_stride`), for gridDim.y ends at 65535.
inline Grid grid_over(int64_t items, int64_t samples) {
  unsigned across = 1;
  while (across < kThreads && across < items) across *= 2;
  const unsigned down = kThreads / across;
  const int64_t columns = (items + across - 1) / across, rows = (samples + down - 1) / down;
  return {dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows < 65535 ? rows : 65535)), dim3(across, down)};
}

// A thread for each item, blockIdx.x and threadIdx.x alone.
inline Grid grid_over(int64_t items) {
  return {dim3(static_cast<unsigned>((items + kThreads - 1) / kThreads)), dim3(kThreads)};
}

// "8.0, 9.0": what this unit was compiled for.
inline std::string built_architectures() {
  std::string text;
#if defined(__CUDA_ARCH_LIST__)
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  for (const int arch : kArchitectures)
    text += (text.empty() ? "" : ", ") + std::to_string(arch / 100) + "." + std::to_string(arch / 10 % 10);
#endif
  return text;
}

// The device of one op call made current, its stream, and launches that say what went wrong.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& on)
      : op_(op), device_(on.get_device_index()), guard_(device_), stream_(current_stream(device_)) {}

  // A host tensor's address, or another GPU's, would be an illegal access far from its cause.
  void require_here(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, op_, ": ", name, " must be on CUDA device ", device_,
                    "; move it with .to(...)");
  }
  void require_here(const char* name, const OptionalTensor& tensor) const {
    if (tensor) require_here(name, *tensor);
  }

  // run<kernel>(grid, arguments...)
  template <auto Kernel, class... Arguments>
  void run(const Grid& grid, Arguments... arguments) const {
    static std::atomic<uint64_t> seen{0};  // devices on which this kernel was found to have code
    const uint64_t bit = uint64_t{1} << (device_ & 63);
    if (!(seen.load(std::memory_order_relaxed) & bit)) {
      require_code(reinterpret_cast<const void*>(Kernel));
      seen.fetch_or(bit, std::memory_order_relaxed);
    }
    if (grid.shared > kSharedUnasked) ask_for_shared(reinterpret_cast<const void*>(Kernel), grid.shared);
    launch(Kernel, grid, arguments...);
  }

 private:
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), const Grid& grid, std::type_identity_t<Parameters>... parameters) const {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid.blocks, grid.threads, addresses, grid.shared, stream_);
    if (error != cudaSuccess) cudaGetLastError();  // else the next check, perhaps PyTorch's, would report it again
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": the CUDA launch failed: ", cudaGetErrorString(error));
  }

  void ask_for_shared(const void* kernel, size_t bytes) const {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": CUDA device ", device_, " has too little shared memory: ", bytes,
                    " bytes a block are needed (", cudaGetErrorString(error), "); use backend=\"reference\"");
  }

  // Instead of "no kernel image is available" later on. May not stand under capture; the first, eager call did it then.
  void require_code(const void* kernel) const {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) return;
    cudaGetLastError();
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_);
    STD_TORCH_CHECK(false, op_, ": no code for CUDA device ", device_, " of compute capability ", major, ".", minor, " (",
                    cudaGetErrorString(error), "); this build holds ", built_architectures(),
                    ": rebuild with GENENGINE_CMAKE_ARGS=-DGENENGINE_CUDA_ARCHS=", major, minor, ", or use backend=\"triton\"");
  }

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// ---- host: dtypes and addresses --------------------------------------------------------------------------------------

// body(std::type_identity<T>{}) with the storage type.
template <class Body>
void with_type(Type type, Body body) {
  switch (type) {
    case Type::f32: return body(std::type_identity<float>{});
    case Type::f16: return body(std::type_identity<__half>{});
    case Type::bf16: return body(std::type_identity<__nv_bfloat16>{});
  }
}

// True if every sample of x starts on a 16-byte boundary.
inline bool aligned_samples(const Tensor& x) {
  const int64_t bytes = batch_stride(x) * static_cast<int64_t>(x.element_size());
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && (x.size(0) < 2 || bytes % 16 == 0);
}
inline bool aligned_samples(const OptionalTensor& x) { return !x || aligned_samples(*x); }

// The samples of a tensor: address and distance in elements.
struct Samples {
  void* base = nullptr;
  int64_t stride = 0;
  Samples() = default;
  explicit Samples(const Tensor& x, int64_t first = 0) : stride(batch_stride(x)) {
    base = static_cast<char*>(x.data_ptr()) + first * stride * static_cast<int64_t>(x.element_size());
  }
  template <class T>
  __device__ __forceinline__ T* at(int64_t b) const {
    return static_cast<T*>(base) + b * stride;
  }
};

// Noise given, drawn or none, read on the device alone.
struct Noise {
  Samples given;
  const int64_t *seed = nullptr, *ids = nullptr;
  int64_t seed_stride = 0, ids_stride = 0;
  Noise() = default;
  Noise(const Launcher& launcher, const char* op, const OptionalTensor& seeds, const OptionalTensor& sample_ids,
        const OptionalTensor& values, int64_t batch) {
    launcher.require_here("seed", seeds);
    launcher.require_here("sample_ids", sample_ids);
    launcher.require_here("noise", values);
    require_sample_ids(op, sample_ids, batch);
    if (values) given = Samples(*values);
    if (seeds) {
      require_seed(op, *seeds, batch);
      seed = seeds->const_data_ptr<int64_t>();
      seed_stride = seeds->numel() > 1 ? seeds->stride(0) : 0;
    }
    if (sample_ids) {
      ids = sample_ids->const_data_ptr<int64_t>();
      ids_stride = batch > 1 ? sample_ids->stride(0) : 1;
    }
  }
  bool drawn() const { return seed != nullptr && given.base == nullptr; }

  __device__ __forceinline__ uint32_t sample(int64_t b) const { return static_cast<uint32_t>(ids ? ids[b * ids_stride] : b); }
  __device__ __forceinline__ uint64_t key(int64_t b) const { return static_cast<uint64_t>(seed[b * seed_stride]); }
};

// ---- device: who does what -------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t item_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t first_sample() { return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t sample_stride() { return static_cast<int64_t>(gridDim.y) * blockDim.y; }

// ---- device: elements in float32 -------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
}

// V elements of T to or from float: 16-byte accesses if V > 1. Own: this kernel wrote them, so not by the read-only cache.
template <int V, bool Own = false, class T>
__device__ __forceinline__ void read(const T* from, float* to) {
  if constexpr (V == 1) {
    to[0] = widen(*from);
  } else {
    static_assert(V * sizeof(T) % 16 == 0);
    constexpr int kPacked = 16 / sizeof(T);
#pragma unroll
    for (int k = 0; k < V; k += kPacked) {
      const uint4* wide = reinterpret_cast<const uint4*>(from + k);
      const uint4 raw = Own ? *wide : __ldg(wide);
      const T* packed = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) to[k + i] = widen(packed[i]);
    }
  }
}

template <int V, class T>
__device__ __forceinline__ void write(T* to, const float* from) {
  if constexpr (V == 1) {
    *to = narrow<T>(from[0]);
  } else {
    constexpr int kPacked = 16 / sizeof(T);
#pragma unroll
    for (int k = 0; k < V; k += kPacked) {
      uint4 raw;
      T* packed = reinterpret_cast<T*>(&raw);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) packed[i] = narrow<T>(from[k + i]);
      *reinterpret_cast<uint4*>(to + k) = raw;
    }
  }
}

// N consecutive elements from a 16-byte boundary, in 16-byte accesses (8-byte: four 16-bit elements); item: of N.
template <int N>
struct Wide {
  static constexpr int kElements = N;
  int64_t first;

  __device__ explicit Wide(int64_t item) : first(item * N) {}
  __device__ uint32_t quad(int i) const { return static_cast<uint32_t>(first / 4 + i); }
  __device__ static constexpr int inside() { return N; }

  template <class T>
  using Chunk = std::conditional_t<N * sizeof(T) % 16 == 0, uint4, uint2>;

  // Fetched as stored, so that 16-bit operands wait for their use in half the registers. Not needed: zeros.
  template <class T>
  struct Raw {
    static constexpr int kChunks = N * sizeof(T) / sizeof(Chunk<T>);
    Chunk<T> chunk[kChunks];
  };
  template <class T>
  __device__ __forceinline__ Raw<T> fetch(const T* sample, bool needed = true) const {
    Raw<T> raw;
#pragma unroll
    for (int k = 0; k < Raw<T>::kChunks; ++k) {
      raw.chunk[k] = Chunk<T>{};
      if (needed) raw.chunk[k] = reinterpret_cast<const Chunk<T>*>(sample + first)[k];
    }
    return raw;
  }
  template <class T>
  __device__ __forceinline__ static void convert(const Raw<T>& raw, float (&values)[N]) {
    const T* elements = reinterpret_cast<const T*>(raw.chunk);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = widen(elements[i]);
  }
  template <class T>
  __device__ __forceinline__ void store(T* sample, const float (&values)[N]) const {
    Raw<T> raw;
    T* elements = reinterpret_cast<T*>(raw.chunk);
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = narrow<T>(values[i]);
#pragma unroll
    for (int k = 0; k < Raw<T>::kChunks; ++k)  // as intrinsics: plain stores on two branches get merged, and split by element
      __stwb(reinterpret_cast<Chunk<T>*>(sample + first) + k, raw.chunk[k]);
  }
};

// The up to four elements of one quad of noise, wherever they lie: unaligned or odd samples, and channels_last.
// item: below (per + 3) / 4, in an order of its own. A sample holds fewer than 2^32 elements (`require_countable`).
struct Scattered {
  static constexpr int kElements = 4;
  uint32_t offset[4], quad_index;
  int count;

  __device__ Scattered(int64_t item, int64_t per, const Layout& layout) : quad_index(static_cast<uint32_t>(item)) {
    const uint32_t channels = static_cast<uint32_t>(layout.channels), pixels = static_cast<uint32_t>(layout.pixels);
    if (channels > 1 && pixels % 4 == 0) {  // neighbouring threads take neighbouring channels: accesses coalesce
      const uint32_t channel = quad_index % channels, pixel_quad = quad_index / channels;
      quad_index = channel * (pixels / 4) + pixel_quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) offset[i] = (4 * pixel_quad + i) * channels + channel;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t element = 4 * quad_index + i;
        offset[i] = channels > 1 ? (element % pixels) * channels + element / pixels : element;
      }
    }
    const int64_t left = per - 4 * static_cast<int64_t>(quad_index);
    count = left < 4 ? static_cast<int>(left) : 4;
  }
  __device__ uint32_t quad(int) const { return quad_index; }
  __device__ int inside() const { return count; }  // elements that exist

  template <class T>
  struct Raw {
    T element[4];
  };
  template <class T>
  __device__ __forceinline__ Raw<T> fetch(const T* sample, bool needed = true) const {
    Raw<T> raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw.element[i] = narrow<T>(0.f);
      if (needed && i < count) raw.element[i] = sample[offset[i]];
    }
    return raw;
  }
  template <class T>
  __device__ __forceinline__ static void convert(const Raw<T>& raw, float (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = widen(raw.element[i]);
  }
  template <class T>
  __device__ __forceinline__ void store(T* sample, const float (&values)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) sample[offset[i]] = narrow<T>(values[i]);
  }
};

inline void require_countable(const char* op, int64_t per) {
  STD_TORCH_CHECK(per < int64_t{1} << 32, op, ": a sample that is not aligned and dense in C order must hold fewer than 2^32 ",
                  "elements, got ", per, "; pass .contiguous() tensors");
}

template <class T, class Access>
__device__ __forceinline__ void load(const Access& at, const T* sample, float (&values)[Access::kElements]) {
  Access::convert(at.fetch(sample), values);
}

template <bool Drawn, class Access>
__device__ __forceinline__ void load_noise(const Noise& noise, int64_t b, uint32_t step, uint32_t stream, const Access& at,
                                           float (&z)[Access::kElements]) {
  if constexpr (Drawn) {
    const uint32_t sample = noise.sample(b);
    const uint64_t key = noise.key(b);
#pragma unroll
    for (int i = 0; i < Access::kElements / 4; ++i) box_muller(philox(at.quad(i), sample, step, stream, key), z + 4 * i);
  } else {
    load(at, noise.given.template at<const float>(b), z);
  }
}

}  // namespace genengine
