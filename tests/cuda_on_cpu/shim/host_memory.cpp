#include "host_memory.h"

#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// From sanitizer/allocator_interface.h, which not every g++ is packaged with.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));

namespace {

// Address → size, in open addressing; what was freed leaves a tombstone. Mapped, not allocated: the hook below sees
// every free.
struct Known {
  const volatile void* memory;
  size_t bytes;
};
const void* const kTombstone = reinterpret_cast<const void*>(1);

Known* table;
size_t capacity, used;  // capacity is a power of two; used counts tombstones
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

bool is_live(const Known& k) {
  return k.memory != nullptr && k.memory != kTombstone;
}

Known* find(const volatile void* memory) {
  const uint64_t hash = (reinterpret_cast<uintptr_t>(memory) >> 4) * 0x9e3779b97f4a7c15u;
  size_t at = (hash >> 20) & (capacity - 1);
  while (table[at].memory != nullptr && table[at].memory != memory) at = (at + 1) & (capacity - 1);
  return &table[at];
}

void grow() {
  Known* const old = table;
  const size_t old_capacity = capacity;
  size_t live = 0;
  for (size_t i = 0; i < old_capacity; ++i) live += is_live(old[i]);
  for (capacity = 4096; capacity < 4 * live;) capacity *= 2;
  void* memory = mmap(nullptr, capacity * sizeof(Known), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "cuda_on_cpu: out of memory\n");
    std::abort();
  }
  table = static_cast<Known*>(memory);
  used = live;
  for (size_t i = 0; i < old_capacity; ++i)
    if (is_live(old[i])) *find(old[i].memory) = old[i];
  if (old != nullptr) munmap(old, old_capacity * sizeof(Known));
}

void forget(const volatile void* memory) {
  if (memory == nullptr) return;
  pthread_mutex_lock(&mutex);
  Known* known = find(memory);
  if (known->memory != nullptr) known->memory = kTombstone;
  pthread_mutex_unlock(&mutex);
}

template <typename Visit>
void for_each_live(const Visit& visit) {
  pthread_mutex_lock(&mutex);
  for (size_t i = 0; i < capacity; ++i)
    if (is_live(table[i])) visit(const_cast<const void*>(table[i].memory), table[i].bytes);
  pthread_mutex_unlock(&mutex);
}

}  // namespace

extern "C" void cuda_on_cpu_remember_host_memory(void* memory, size_t bytes) {
  pthread_mutex_lock(&mutex);
  const bool is_first = table == nullptr;
  if (2 * (used + 1) > capacity) grow();
  Known* known = find(memory);
  used += known->memory == nullptr;
  *known = {memory, bytes};
  pthread_mutex_unlock(&mutex);
  // Whoever frees it: containers hand memory to code of libstdc++, which frees with its own operator delete.
  if (is_first) __sanitizer_install_malloc_and_free_hooks([](const volatile void*, size_t) {}, forget);
}

namespace cuda_on_cpu {

void poison_host_memory() {
  for_each_live([](const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); });
}

void unpoison_host_memory() {
  for_each_live([](const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); });
}

}  // namespace cuda_on_cpu
