// Kernels that are wrong, each in one way: the shim, or a sanitizer through it, must say so. `misuse NAME` runs one.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "../../../csrc/cuda/launch.cuh"

namespace {

using namespace fastft::cuda;

constexpr uint32_t kBlocks = 7;

// `data` and `out` are the device's: from malloc, which the shim does not take for the host's.
struct Args {
  const float* data;
  double* out;
  uint32_t* tickets;
  uint32_t distance;
};

__global__ void correct(const __grid_constant__ Args args) {
  __shared__ double total;
  const double sum = block_sum(args.data[threadIdx.x]);
  if (threadIdx.x == 0) total = sum;
  __syncthreads();
  if (threadIdx.x == kThreads - 1) args.out[blockIdx.x] = total;
}

__global__ void exits_before_barrier(const __grid_constant__ Args) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void waits_at_two_barriers(const __grid_constant__ Args) {
  if (threadIdx.x < 128)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffles_half_a_warp(const __grid_constant__ Args args) {
  if (threadIdx.x % kWarp < 16) args.out[0] = __shfl_down_sync(0xffffffffu, 1.0, 8);
  __syncthreads();
}

__global__ void shuffles_after_exit(const __grid_constant__ Args args) {
  if (threadIdx.x == 40) return;
  args.out[0] = __shfl_down_sync(0xffffffffu, 1.0, 8);
}

__global__ void shuffles_with_a_partial_mask(const __grid_constant__ Args args) {
  args.out[0] = __shfl_down_sync(0x0000ffffu, 1.0, 8);
}

__global__ void shuffles_in_two_places(const __grid_constant__ Args args) {
  if (threadIdx.x % 2 == 0)
    args.out[0] = __shfl_down_sync(0xffffffffu, 1.0, 8);
  else
    args.out[1] = __shfl_down_sync(0xffffffffu, 1.0, 8);
}

__global__ void reads_shared_memory_unwritten(const __grid_constant__ Args args) {
  __shared__ bool flag;
  if (args.distance == 0) flag = true;
  if (flag) args.out[0] = 1.0;
}

__global__ void lacks_a_barrier(const __grid_constant__ Args args) {
  __shared__ double value;
  if (threadIdx.x == 0) value = 5.0;
  if (threadIdx.x == kThreads - 1) args.out[blockIdx.x] = value;
}

// The last block to draw a ticket relies on what the others write only after they drew theirs.
__global__ void draws_its_ticket_too_early(const __grid_constant__ Args args) {
  if (threadIdx.x != 0) return;
  const bool last = atomicAdd(args.tickets, 1u) == gridDim.x - 1;
  args.out[1 + blockIdx.x] = 5.0;
  if (!last) return;
  double sum = 0.0;
  for (uint32_t i = 0; i < gridDim.x; ++i) sum += args.out[1 + i];
  args.out[0] = sum / gridDim.x;
  *args.tickets = 0;
}

__global__ void reads_what_is_given(const __grid_constant__ Args args) {
  if (threadIdx.x == 0) args.out[0] = args.data[args.distance];
}

__global__ void reads_four_floats(const __grid_constant__ Args args) {
  float x[4];
  read(args.data, args.distance, x);
  args.out[0] = x[0];
}

__global__ void overruns_an_array_of_its_own(const __grid_constant__ Args args) {
  float x[4] = {};
  float* at = x;
  __syncthreads();
  asm volatile("" : "+r"(at)::"memory");
  at[args.distance] = 1.0f;
}

struct Large {
  unsigned char bytes[32768];
};
__global__ void takes_too_much(const __grid_constant__ Large) {}

template <typename Args>
void launch_with(void (*kernel)(Args), dim3 grid, dim3 block, Args& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  void* parameters[] = {&args};
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters), "launch_with");
}

template <typename T>
T* device(size_t count) {
  return static_cast<T*>(std::calloc(count, sizeof(T)));
}

int run(const std::string& name) {
  static const std::map<std::string, void (*)(Args)> kernels = {
      {"correct", correct},
      {"exits before barrier", exits_before_barrier},
      {"waits at two barriers", waits_at_two_barriers},
      {"shuffles half a warp", shuffles_half_a_warp},
      {"shuffles after exit", shuffles_after_exit},
      {"shuffles with a partial mask", shuffles_with_a_partial_mask},
      {"shuffles in two places", shuffles_in_two_places},
      {"reads shared memory unwritten", reads_shared_memory_unwritten},
      {"lacks a barrier", lacks_a_barrier},
      {"draws its ticket too early", draws_its_ticket_too_early},
      {"reads past the end", reads_what_is_given},
      {"reads a host vector", reads_what_is_given},
      {"reads its host parameter", reads_what_is_given},
      {"reads misaligned", reads_four_floats},
      {"overruns an array of its own", overruns_an_array_of_its_own},
      {"launches no block", correct},
      {"launches half a warp", correct},
      {"launches too many threads", correct},
  };
  Args args = {};
  args.data = device<float>(kThreads);
  args.out = device<double>(1 + kBlocks);
  args.tickets = device<uint32_t>(1);
  args.distance = 4;
  for (int i = 0; i < kThreads; ++i) const_cast<float*>(args.data)[i] = static_cast<float>(i);
  const std::vector<float> host(kThreads, 1.0f);
  if (name == "takes too much") {
    Large large = {};
    launch(takes_too_much, "takes_too_much", 1, nullptr, large);
    return 0;
  }
  const auto kernel = kernels.at(name);
  if (name == "reads past the end") args.distance = kThreads;
  if (name == "reads misaligned") args.distance = 1;
  if (name == "reads a host vector") args.data = host.data();
  if (name == "reads its host parameter") args.data = reinterpret_cast<const float*>(&args);
  if (name == "launches no block") launch_with(kernel, 0, kThreads, args);
  if (name == "launches half a warp") launch_with(kernel, 1, 16, args);
  if (name == "launches too many threads") launch_with(kernel, 1, 1025, args);
  // Long enough for every order of blocks and threads to have been taken.
  for (int repeat = 0; repeat < 12; ++repeat) {
    for (uint32_t i = 0; i <= kBlocks; ++i) args.out[i] = 0.0;
    launch(kernel, name.c_str(), kBlocks, nullptr, args);
    const double expected = name == "correct" ? kThreads * (kThreads - 1) / 2 : 5.0;
    const bool by_block = name == "correct" || name == "lacks a barrier";
    for (uint32_t i = 0; i < (by_block ? kBlocks : 1); ++i)
      if (args.out[i] != expected) {
        std::fprintf(stderr, "a wrong result: %g\n", args.out[i]);
        return 1;
      }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
