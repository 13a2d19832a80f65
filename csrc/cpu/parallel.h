// torch's own thread pool, reached through its stable C interface: torch.set_num_threads is obeyed, and there is
// no second pool. Serial where torch does not offer it.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace fastft {

using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

inline TorchParallelFor torch_parallel_for() {
  static const TorchParallelFor function = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
    return torch ? reinterpret_cast<TorchParallelFor>(dlsym(torch, "torch_parallel_for")) : nullptr;
  }();
  return function;
}

// Calls work(begin, end) over pieces of [0, n), several at a time where n > grain. work must not throw.
template <typename Work>
void parallel_for(int64_t n, int64_t grain, const Work& work) {
  const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Work*>(context))(begin, end); };
  void* context = const_cast<Work*>(&work);
  if (n <= grain || torch_parallel_for() == nullptr) {
    work(0, n);
  } else if (torch_parallel_for()(0, n, grain, call, context) != 0) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

}  // namespace fastft
