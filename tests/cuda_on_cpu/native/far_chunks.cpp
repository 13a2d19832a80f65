// The kernels where element indices need more than 32 bits: one chunk of a tensor of 2^34 elements that is not there,
// but for that chunk. Base addresses are set back so that the chunk's elements are those that exist.
#include <cmath>
#include <cstdio>

#include "../../../csrc/cuda/adamw.cu"
#include "../../../csrc/cuda/adamw_generic.cu"
#include "../../../csrc/cuda/adamw_lean.cuh"

const fastft::cuda::LeanKernel* fastft::cuda::lean_kernel_for(const AdamWEntry&) {
  return nullptr;  // of the lean kernels, this program has those that it names
}

namespace {

using namespace fastft;
using namespace fastft::cuda;

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  ++failures;
}

// Where `real` is element `index` of an array.
template <typename T>
T* array_with(T* real, int64_t index) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(real) - static_cast<uintptr_t>(index) * sizeof(T));
}

constexpr int64_t kElements = 48;

// Memory of the device: not from operator new. Aligned to 16 bytes, and no element more than it says.
template <typename T>
T* device(int64_t count, T value) {
  T* data = static_cast<T*>(std::malloc(count * sizeof(T)));
  for (int64_t i = 0; i < count; ++i) data[i] = value;
  return data;
}

struct Tensor {
  float* param = device(kElements, 3.0f);
  float* grad = device(kElements, 0.5f);
  float* exp_avg = device(kElements, 0.0f);
  float* exp_avg_sq = device(kElements, 0.0f);
};

// Steps (and takes the norm of) the last chunk of the entry, whose elements from `first` on exist.
void run(Kernel step, DeviceEntry entry, Tensor& t, int64_t first, int64_t chunk, double expected_sum,
         const char* what) {
  const uint32_t index = 0;
  const double partial_start = -1.0;
  double* partial = device(1, partial_start);
  DeviceEntry* entries = device(1, DeviceEntry{});
  entry.param = array_with(t.param, first);
  entry.exp_avg = array_with(t.exp_avg, first);
  entry.exp_avg_sq = array_with(t.exp_avg_sq, first);
  entry.dtype = entry.state_dtype = entry.grad_dtype = DType::f32;
  entry.chunk_size = kChunk;
  *entries = entry;
  AdamWEntry host = {};
  host.grad = array_with(t.grad, first);
  host.bias1 = 0.1;
  host.bias2 = 0.001;

  Args args = {};
  args.entries = entries;
  args.chunk_entry = array_with(device(1, index), chunk);
  args.tickets = device(1, 0u);
  args.partial = array_with(partial, chunk);
  args.first_chunk = static_cast<uint32_t>(chunk);
  args.control.max_grad_norm = -1.0;
  AdamWOptions options = {};
  options.lr = 0.25;
  options.beta1 = 0.9;
  options.beta2 = 0.999;
  fill(args, {host}, 0, 1,
       [&](const AdamWEntry& e) { return StepOptions{options, e.bias1, e.bias2, nullptr, 1, DType::f32}; });
  launch(grad_sum_of_squares, "grad_sum_of_squares", 1, nullptr, args);
  expect(*partial == expected_sum, what);
  launch(step, "the step", 1, nullptr, args);
}

// 2^34 elements and 40 more, all live: the last chunk has the 40.
void whole_tensor(Kernel step) {
  const int64_t numel = (int64_t{1} << 34) + 40, chunk = numel / kChunk;
  Tensor t;
  DeviceEntry entry = {};
  entry.live_numel = numel;
  run(step, entry, t, chunk * kChunk, chunk, 40 * 0.25, "the sum over a far chunk");
  for (int64_t i = 0; i < kElements; ++i)
    expect(std::fabs(t.param[i] - (i < 40 ? 2.75f : 3.0f)) < 1e-3f, "the step of a far chunk");
}

// 2^29 live rows and one more, of 16 elements: 2^33 + 16 live elements, in a tensor of twice as many.
void rows(Kernel step) {
  const int64_t width = 16, live_rows = (int64_t{1} << 29) + 1, chunk = live_rows * width / kChunk;
  const int64_t last_row = 2 * live_rows + 5;
  Tensor t;
  DeviceEntry entry = {};
  entry.live_numel = live_rows * width;
  entry.row_size = width;
  entry.rows = array_with(device(1, last_row), live_rows - 1);
  run(step, entry, t, (last_row - 1) * width, chunk, width * 0.25, "the sum over a far row");
  for (int64_t i = 0; i < kElements; ++i)
    expect(std::fabs(t.param[i] - (i / width == 1 ? 2.75f : 3.0f)) < 1e-3f, "the step of a far row");
}

// On both sides of what 32 bits hold, in rows that are shorter than a chunk, longer, and longer than 32 bits count.
void places() {
  const int64_t limit = int64_t{1} << 32;
  for (const int64_t live : {limit - 17, limit - 1, limit, limit + 17, 5 * limit})
    for (const int64_t width : {int64_t{17}, int64_t{4096}, limit / 2 - 3, limit / 2 + 3, limit + 3}) {
      const int64_t i = live - 1;
      DeviceEntry entry = {};
      entry.live_numel = live;
      entry.row_size = width;
      entry.chunk_size = kChunk;
      entry.rows = array_with(device(1, int64_t{1} << 29), i / width);
      Chunk chunk;
      chunk.find(entry, static_cast<uint32_t>(i / kChunk));
      expect(chunk.count == i % kChunk + 1, "how many elements a far chunk has");
      expect(chunk.place(i % kChunk) == (int64_t{1} << 29) * width + i % width, "where a far element lies");
    }
}

// Blocks of moments in 8 bits, in rows of which the last block is short.
void blocks() {
  const int64_t limit = int64_t{1} << 32;
  for (const int64_t rows : {int64_t{1}, int64_t{3}, limit + 5})
    for (const int64_t width : {int64_t{64}, int64_t{700}, (limit + 5) * kBlock8 - 8}) {
      if (rows > 3 && width > 700) continue;
      DeviceEntry entry = {};
      entry.row_size = width;
      entry.live_numel = rows * width;
      const int64_t per_row = entry.blocks_per_row(), last = rows * per_row - 1;
      Blocks found;
      found.find(entry, static_cast<uint32_t>(last / 64));
      expect(found.count == last % 64 + 1, "how many blocks a far chunk has");
      const BlockPlace block = found.place(last % 64);
      expect(block.scale == last, "where a far block's scale lies");
      expect(block.offset == (rows - 1) * width + (per_row - 1) * kBlock8, "where a far block lies");
      expect(block.length == width - (per_row - 1) * kBlock8, "how long the last block of a row is");
    }
}

}  // namespace

int main() {
  places();
  blocks();
  for (const Kernel step : {adamw_lean<Weight<float>, float, false>, adamw_generic<float, false>}) {
    whole_tensor(step);
    rows(step);
  }
  if (failures == 0) std::puts("ok");
  return failures != 0;
}
