// The one place that talks to the CUDA runtime: device guard, error checks, launches, and the reductions and
// vector accesses that kernels share. tests/cuda_on_cpu puts its own cuda_runtime.h in front of the include path
// and runs everything here on the host.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../math/rounding.h"
#include "../tensor.h"

namespace fastft::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Runs kernel(args) with kThreads threads in each of `blocks` blocks.
template <typename Args>
void launch(void (*kernel)(Args), const char* name, uint32_t blocks, void* stream, Args& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  void* parameters[] = {&args};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters), name);
}

// In words, as far as it holds any: bytes would be put together one by one.
template <int kBytes>
struct alignas(kBytes) Bytes {
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
  Word at[kBytes / sizeof(Word)];
};

// Tells the compiler that a pointer, though it was read from shared memory, leads to global memory: it then emits
// global loads and stores instead of generic ones, which must find out at run time.
template <typename T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// N elements in as few memory instructions as possible (16 bytes each, where there are so many).
template <int N, typename Stored>
__device__ __forceinline__ void read(const void* data, int64_t offset, Stored (&out)[N]) {
  constexpr int kPack = sizeof(out) < 16 ? sizeof(out) : 16;
  using Pack = Bytes<kPack>;
  const Pack* from = global(reinterpret_cast<const Pack*>(static_cast<const Stored*>(data) + offset));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(out) / kPack); ++i) {
    const Pack pack = from[i];
    memcpy(reinterpret_cast<char*>(out) + i * kPack, &pack, kPack);
  }
}

template <int N, typename Stored>
__device__ __forceinline__ void write(void* data, int64_t offset, const Stored (&values)[N]) {
  constexpr int kPack = sizeof(values) < 16 ? sizeof(values) : 16;
  using Pack = Bytes<kPack>;
  Pack* to = global(reinterpret_cast<Pack*>(static_cast<Stored*>(data) + offset));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(values) / kPack); ++i) {
    Pack pack;
    memcpy(&pack, reinterpret_cast<const char*>(values) + i * kPack, kPack);
    to[i] = pack;
  }
}

template <typename Stored, int N, typename T>
__device__ __forceinline__ void read_widened(const void* data, int64_t offset, T (&out)[N]) {
  Stored stored[N];
  read<N>(data, offset, stored);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = static_cast<T>(widen(stored[i]));
}

// The same for a dtype known only at run time; the branch is the same for the whole block. float64 is read only
// into doubles.
template <int N, typename T>
__device__ __forceinline__ void read_any(const void* data, DType dtype, int64_t offset, T (&out)[N]) {
  if (dtype == DType::bf16) return read_widened<bfloat16>(data, offset, out);
  if (dtype == DType::f16) return read_widened<float16>(data, offset, out);
  if constexpr (sizeof(T) == sizeof(double)) {
    if (dtype == DType::f64) return read_widened<double>(data, offset, out);
  }
  return read_widened<float>(data, offset, out);
}

// The sum over the block's threads, in thread 0. Every thread must call it.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warp_sums[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / kWarp; ++w) total += warp_sums[w];
  __syncthreads();
  return total;
}

// The sum over the warp's threads, in each of them. Every thread must call it.
__device__ __forceinline__ uint32_t warp_total(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
#endif
}

// The largest over the warp's threads, in each of them. Every thread must call it.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  return x;
#endif
}

}  // namespace fastft::cuda
