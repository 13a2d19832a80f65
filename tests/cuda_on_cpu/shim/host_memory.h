// Memory that csrc's host code allocates, so that a kernel that reads it is found out. A device could not; here
// tensors and std::vectors lie side by side on one heap.
#pragma once

#include <cstddef>

extern "C" void cuda_on_cpu_remember_host_memory(void* memory, size_t bytes);

namespace cuda_on_cpu {

void poison_host_memory();
void unpoison_host_memory();

}  // namespace cuda_on_cpu
