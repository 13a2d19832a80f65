// Runs kernels: see cuda_runtime.h.
#include <link.h>
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "cuda_runtime.h"
#include "host_memory.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

// What a device of compute capability 7.5 to 12.0 takes.
constexpr size_t kMaxParameterBytes = 32764;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;

constexpr size_t kMaxSharedBytes = 128 << 10;  // of all kernels together; what each may have, nvcc knows
constexpr unsigned kResident = 2;              // blocks that take turns
constexpr size_t kStackBytes = 160 << 10;      // a kernel's parameter is copied to each thread's stack

enum class State { ready, at_barrier, in_shuffle, finished };

struct Fiber {
  void* resume[5];  // for __builtin_longjmp
  void* fake_stack;
  char* stack;
  dim3 index;
  State state;
  Site site;
  uint64_t sent[2];  // by turns: a lane is never more than one shuffle ahead
  unsigned shuffles;
};

struct Block {
  Fiber* fibers;
  unsigned char* shared;
  unsigned linear;
  bool active;
};

// The order in which blocks begin and threads take turns.
enum class Order { forward, reverse, shuffled };

struct Launch {
  const void* kernel;
  Run run;
  alignas(64) unsigned char parameter[kMaxParameterBytes];
  unsigned threads, blocks;
  Order order;
};

// Everything here is memory of the shim's own, never from operator new: that is poisoned while kernels run.
Launch current_launch;
Block resident[kResident];
Block* current_block;
Block* shared_owner;
Fiber* current;
unsigned rounds, turns;
void* scheduler_resume[5];
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;

struct Counters {
  uint64_t launches, blocks, uploads, uploaded_bytes, memsets;
} counters;

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

[[noreturn]] void fail(const char* what, const Fiber* fiber = nullptr) {
  std::fprintf(stderr, "\ncuda_on_cpu: %s", what);
  if (fiber != nullptr) {
    const unsigned b = current_block->linear;
    std::fprintf(stderr, " (block %u of %u, thread %u of %u", b, current_launch.blocks,
                 static_cast<unsigned>(fiber - current_block->fibers), current_launch.threads);
    if (fiber->site.file != nullptr) std::fprintf(stderr, ", %s:%d", fiber->site.file, fiber->site.line);
    std::fprintf(stderr, ")");
  }
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::abort();
}

// -- shared memory ----------------------------------------------------------------------------------------------------

// The thread-local segment of this library: all __shared__ variables and nothing else.
struct Segment {
  unsigned char* data;
  size_t bytes;
};

Segment shared_segment() {
  __shared__ volatile char first;  // or the segment might not exist yet in this thread
  first = first;
  Segment segment = {};
  const auto visit = [](dl_phdr_info* info, size_t, void* out) {
    bool is_this = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const uintptr_t begin = info->dlpi_addr + header.p_vaddr, here = reinterpret_cast<uintptr_t>(&counters);
      if (header.p_type == PT_LOAD && begin <= here && here < begin + header.p_memsz) is_this = true;
      if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (is_this) *static_cast<Segment*>(out) = {static_cast<unsigned char*>(info->dlpi_tls_data), bytes};
    return static_cast<int>(is_this);
  };
  if (dl_iterate_phdr(visit, &segment) == 0 || segment.data == nullptr) fail("the shared variables were not found");
  if (segment.bytes > kMaxSharedBytes) fail("more than 128 KiB of __shared__ variables");
  return segment;
}

void make_shared_current(Block& block, const Segment& segment) {
  if (shared_owner == &block) return;
  if (shared_owner != nullptr) std::memcpy(shared_owner->shared, segment.data, segment.bytes);
  std::memcpy(segment.data, block.shared, segment.bytes);
  shared_owner = &block;
}

// -- fibers -----------------------------------------------------------------------------------------------------------

// Not swapcontext: its sanitizer interceptor forgets the redzones of the stack that it enters.
__attribute__((noinline)) void resume(void** to) {
  __builtin_longjmp(to, 1);
}

__attribute__((noinline)) void jump(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) resume(to);
}

void enter(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  const unsigned b = current_block->linear;
  blockIdx = dim3(b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y);
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
  jump(scheduler_resume, fiber.resume);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void leave() {
  Fiber& fiber = *current;
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  jump(fiber.resume, scheduler_resume);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

// A fiber serves one thread after the other, of all launches.
void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    leave();
    current_launch.run(current_launch.kernel, current_launch.parameter);
    current->state = State::finished;
  }
}

// In a function of its own, which jump can come back to.
__attribute__((noinline)) void begin(ucontext_t* context) {
  if (__builtin_setjmp(scheduler_resume) == 0) setcontext(context);
}

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("out of memory");
  return static_cast<char*>(memory);
}

// Makes the resident blocks; fibers beyond those that ever ran cost address space only.
void prepare() {
  if (resident[0].fibers != nullptr) return;
  constexpr size_t kGuard = 4096;
  for (Block& block : resident) {
    block.shared = reinterpret_cast<unsigned char*>(map(kMaxSharedBytes));
    block.fibers = reinterpret_cast<Fiber*>(map(kMaxThreads * sizeof(Fiber)));
    char* stacks = map(kMaxThreads * (kGuard + kStackBytes));
    for (unsigned i = 0; i < kMaxThreads; ++i, stacks += kGuard + kStackBytes) {
      mprotect(stacks, kGuard, PROT_NONE);
      block.fibers[i].stack = stacks + kGuard;
    }
  }
}

void start_fiber(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  current = &fiber;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
  begin(&context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// -- blocks -----------------------------------------------------------------------------------------------------------

// 0 … n-1 in the launch's order; `salt` varies the shuffle.
class Sequence {
 public:
  Sequence(unsigned n, Order order, unsigned salt) : n_(n), first_(0), stride_(1) {
    if (order == Order::reverse) {
      first_ = n - 1;
      stride_ = n - 1;
    } else if (order == Order::shuffled) {
      first_ = salt % n;
      stride_ = 1 + (salt * 2654435761u >> 8) % n;
      while (std::gcd(stride_, uint64_t{n}) != 1) ++stride_;
    }
  }
  unsigned operator[](unsigned i) const { return static_cast<unsigned>((first_ + i * stride_) % n_); }

 private:
  uint64_t n_, first_, stride_;
};

void start_block(Block& block, unsigned linear, const Segment& segment) {
  static const unsigned char garbage[] = {0xff, 0xcd, 0x55};
  block.linear = linear;
  block.active = true;
  if (shared_owner == &block) shared_owner = nullptr;
  std::memset(block.shared, garbage[counters.blocks % sizeof garbage], segment.bytes);
  for (unsigned i = 0; i < current_launch.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.state = State::ready;
    fiber.site = {};
    fiber.shuffles = 0;
    if (fiber.resume[0] == nullptr) start_fiber(fiber);
  }
  ++counters.blocks;
}

// Once no thread of the block is ready: lets those go on whose wait is over.
void release(Block& block) {
  const unsigned threads = current_launch.threads;
  bool any_in_shuffle = false;
  for (unsigned first = 0; first < threads; first += kWarp) {
    const unsigned end = first + kWarp < threads ? first + kWarp : threads;
    const Fiber* shuffling = nullptr;
    for (unsigned i = first; i < end; ++i)
      if (block.fibers[i].state == State::in_shuffle) shuffling = &block.fibers[i];
    if (shuffling == nullptr) continue;
    any_in_shuffle = true;
    if (end - first < kWarp) fail("a shuffle in a warp with fewer than 32 threads", shuffling);
    for (unsigned i = first; i < end; ++i) {
      const Fiber& fiber = block.fibers[i];
      if (fiber.state == State::finished) fail("a shuffle, and a thread of its warp has exited", shuffling);
      if (fiber.state != State::in_shuffle) fail("a shuffle, and a thread of its warp waits at a barrier", shuffling);
      if (!same(fiber.site, shuffling->site)) fail("the threads of a warp are in different shuffles", &fiber);
    }
    for (unsigned i = first; i < end; ++i) block.fibers[i].state = State::ready;
  }
  if (any_in_shuffle) return;
  const Fiber* waiting = nullptr;
  for (unsigned i = 0; i < threads; ++i)
    if (block.fibers[i].state == State::at_barrier) waiting = &block.fibers[i];
  if (waiting == nullptr) {
    block.active = false;
    return;
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.state == State::finished) fail("a thread exited while others wait at a barrier", waiting);
    if (!same(fiber.site, waiting->site)) fail("threads of a block wait at different barriers", waiting);
    fiber.state = State::ready;
  }
}

// Each thread that can go on does, until it waits, pauses or exits.
void run_round(Block& block, const Segment& segment) {
  current_block = &block;
  make_shared_current(block, segment);
  const unsigned threads = current_launch.threads;
  const Sequence order(threads, current_launch.order, ++rounds);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[order[i]];
    if (fiber.state == State::ready) enter(fiber);
  }
  for (unsigned i = 0; i < threads; ++i)
    if (block.fibers[i].state == State::ready) return;  // paused
  release(block);
}

// FASTFT_BLOCK_ORDER, or one after the other.
Order next_order() {
  static const char* const names[] = {"forward", "reverse", "shuffled"};
  const char* wanted = std::getenv("FASTFT_BLOCK_ORDER");
  if (wanted == nullptr || *wanted == 0) return static_cast<Order>(counters.launches % 3);
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(wanted, names[i]) == 0) return static_cast<Order>(i);
  fail("FASTFT_BLOCK_ORDER: expected forward, reverse or shuffled");
}

void run_blocks() {
  const Segment segment = shared_segment();
  const unsigned blocks = current_launch.blocks;
  const Sequence beginnings(blocks, current_launch.order, static_cast<unsigned>(counters.launches));
  shared_owner = nullptr;
  for (unsigned started = 0, finished = 0; finished < blocks;) {
    // Whose turn it is follows no pattern, so that a block may also finish while another one waits.
    Block& block = resident[(++turns * 2654435761u >> 16) % kResident];
    if (!block.active && started < blocks) start_block(block, beginnings[started++], segment);
    if (!block.active) continue;
    run_round(block, segment);
    finished += !block.active;
  }
}

bool fits(const cudaLaunchConfig_t& c) {
  const uint64_t threads = uint64_t{1} * c.blockDim.x * c.blockDim.y * c.blockDim.z;
  return threads >= 1 && threads <= kMaxThreads && c.blockDim.z <= 64 && c.gridDim.x >= 1 &&
         c.gridDim.x <= 0x7fffffffu && c.gridDim.y >= 1 && c.gridDim.y <= 65535 && c.gridDim.z >= 1 &&
         c.gridDim.z <= 65535 && uint64_t{1} * c.gridDim.x * c.gridDim.y * c.gridDim.z <= 0x7fffffffu &&
         c.dynamicSmemBytes == 0 && c.numAttrs == 0;
}

}  // namespace

// -- for device code --------------------------------------------------------------------------------------------------

void barrier(Site site) {
  current->state = State::at_barrier;
  current->site = site;
  leave();
}

void pause() {
  leave();
}

unsigned lane() {
  return static_cast<unsigned>(current - current_block->fibers) % kWarp;
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned lane, Site site) {
  Fiber* self = current;
  self->site = site;
  if (mask != 0xffffffffu) fail("a shuffle that is not by the whole warp", self);
  const unsigned turn = self->shuffles++ % 2;
  self->sent[turn] = bits;
  self->state = State::in_shuffle;
  leave();
  const Fiber* warp = self - static_cast<size_t>(self - current_block->fibers) % kWarp;
  return warp[lane].sent[turn];
}

// -- the runtime's functions ------------------------------------------------------------------------------------------

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void* parameter, size_t bytes, Run run) {
  if (!fits(config)) return cudaErrorInvalidConfiguration;
  if (bytes > kMaxParameterBytes) return cudaErrorInvalidValue;
  pthread_mutex_lock(&one_launch);
  prepare();
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  current_launch.kernel = kernel;
  current_launch.run = run;
  current_launch.threads = blockDim.x * blockDim.y * blockDim.z;
  current_launch.blocks = gridDim.x * gridDim.y * gridDim.z;
  current_launch.order = next_order();
  std::memcpy(current_launch.parameter, parameter, bytes);
  ++counters.launches;
  // The device sees the copy, and none of the memory of the host.
  __asan_poison_memory_region(parameter, bytes);
  poison_host_memory();
  run_blocks();
  unpoison_host_memory();
  __asan_unpoison_memory_region(parameter, bytes);
  pthread_mutex_unlock(&one_launch);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::counters;

extern "C" void cuda_on_cpu_counters(uint64_t* out) {
  std::memcpy(out, &counters, sizeof counters);
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidMemcpyDirection:
      return "invalid copy direction for memcpy";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyHostToDevice) return cudaErrorInvalidMemcpyDirection;
  std::memcpy(to, from, bytes);
  ++counters.uploads;
  counters.uploaded_bytes += bytes;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  ++counters.memsets;
  return cudaSuccess;
}
