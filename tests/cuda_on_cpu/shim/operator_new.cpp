// Linked into each library of csrc's code, with -Bsymbolic, so that its own allocations come here and nobody else's.
#include <cstdlib>
#include <new>

#include "host_memory.h"

void* operator new(size_t bytes) {
  void* memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  cuda_on_cpu_remember_host_memory(memory, bytes);
  return memory;
}

void* operator new[](size_t bytes) {
  return operator new(bytes);
}
