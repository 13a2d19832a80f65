// The part of CUDA that csrc/cuda uses, for a host compiler. Put in front of the include path, it lets g++ compile the
// kernels; runtime.cpp runs them. A thread is a fiber, a block is a set of fibers that take turns, and whatever the
// hardware would leave undefined (a barrier that not all threads reach, a shuffle with lanes missing) ends the process
// with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
// One set for all blocks, in a segment that runtime.cpp can find: it fills it with garbage when a block begins and
// exchanges it when another block continues.
#define __shared__ static thread_local

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);

namespace cuda_on_cpu {

struct Site {
  const char* file;
  int line;
};

using Run = void (*)(const void* kernel, const void* parameter);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void* parameter, size_t bytes, Run run);

void barrier(Site site);
// Lets the other threads and blocks go on: what they do may come between any two accesses to memory that is shared
// with other blocks.
void pause();
// What `lane` of this warp passes in the same call.
uint64_t exchange(unsigned mask, uint64_t bits, unsigned lane, Site site);
unsigned lane();

template <typename Parameter>
cudaError_t launch_as(const cudaLaunchConfig_t* config, const void* kernel, void** parameters) {
  static_assert(std::is_trivially_copyable_v<Parameter>, "a kernel parameter is copied byte by byte");
  const Run run = [](const void* kernel, const void* parameter) {
    reinterpret_cast<void (*)(Parameter)>(const_cast<void*>(kernel))(*static_cast<const Parameter*>(parameter));
  };
  return launch(*config, kernel, parameters[0], sizeof(Parameter), run);
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, from, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle_down(unsigned mask, T value, unsigned distance, Site site) {
  return shuffle(mask, value, lane() + distance < 32 ? lane() + distance : lane(), site);
}

template <typename T>
T shuffle_xor(unsigned mask, T value, unsigned distance, Site site) {
  return shuffle(mask, value, lane() ^ distance, site);
}

}  // namespace cuda_on_cpu

// The size of a kernel's parameter is something nvcc records. Here it comes from the type that launch.cuh, where this
// is expanded, calls Args.
#define cudaLaunchKernelExC(config, kernel, parameters) ::cuda_on_cpu::launch_as<Args>(config, kernel, parameters)

#define __syncthreads() ::cuda_on_cpu::barrier({__FILE__, __LINE__})
#define __shfl_down_sync(mask, value, distance) ::cuda_on_cpu::shuffle_down(mask, value, distance, {__FILE__, __LINE__})
#define __shfl_xor_sync(mask, value, distance) ::cuda_on_cpu::shuffle_xor(mask, value, distance, {__FILE__, __LINE__})

inline void __threadfence() {
  ::cuda_on_cpu::pause();
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  ::cuda_on_cpu::pause();
  return before;
}
