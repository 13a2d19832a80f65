// Drives the CUDA step: puts the table of entries on the device, and launches each kernel that some tensor needs once
// for all of them.
#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

#include "adamw.h"
#include "adamw_kernels.cuh"

namespace fastft::cuda {
namespace {

constexpr uint64_t kBytesPerEntry = sizeof(void*) + sizeof(uint16_t);

uint32_t chunks_of(const AdamWEntry& e) {
  int64_t items = e.live_numel(), per_chunk = kChunk;
  if (e.state_dtype == DType::u8) {
    items = e.block_row > 0 ? items / e.block_row * e.blocks_per_row() : 0;
    per_chunk = kChunkBlocks;
  }
  return static_cast<uint32_t>(std::max<int64_t>(1, (items + per_chunk - 1) / per_chunk));
}

// Of a chunk whose size is not kChunk: what sums over gradients take for one, 16 bytes at a time.
int64_t chunk_size_of(const AdamWEntry& e) {
  if (e.state_dtype != DType::u8) return kChunk;
  const int64_t chunks = chunks_of(e);
  return ((e.live_numel() + chunks - 1) / chunks + 7) / 8 * 8;
}

int64_t aligned16(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// Where the parts of the workspace begin, for n entries of `chunks` chunks in all.
struct Layout {
  int64_t entries = 0, chunk_entry, image_end, tickets, partial, pulls, end;
  Layout(int64_t n, int64_t chunks) {
    chunk_entry = aligned16(n * sizeof(DeviceEntry));
    image_end = aligned16(chunk_entry + chunks * sizeof(uint32_t));
    tickets = image_end;
    partial = aligned16(tickets + (1 + n) * sizeof(uint32_t));
    pulls = partial + 3 * chunks * sizeof(double);
    end = pulls + n * sizeof(double);
  }
};

bool is_selective(const AdamWEntry& e) {
  return form_of(e.anchoring) == AnchorForm::selective;
}

bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Whether eight elements that share random bits in the whole tensor lie together, at a multiple of 8, in this part.
bool shares_random_bits(const AdamWEntry& e) {
  const ElementIndex& index = e.index;
  return index.first % kPerPhilox == 0 &&
         (index.row >= e.numel || (index.row % kPerPhilox == 0 && index.stride % kPerPhilox == 0));
}

// The lean kernel that can step the entry, or null. Gradients need not be aligned.
const LeanKernel* lean_kernel(const AdamWEntry& e) {
  if (e.grad_dtype != e.dtype || e.max_exp_avg_sq || e.importance || is_selective(e)) return nullptr;
  for (const void* array : {e.param, e.exp_avg, e.exp_avg_sq, e.low_bits})
    if (!is_aligned(array)) return nullptr;
  if (!is_aligned(e.anchor) || !is_aligned(e.mask)) return nullptr;
  const DType other = e.dtype == DType::f32 ? DType::bf16 : DType::f32;
  if (e.anchor && e.anchor_dtype != e.dtype && e.anchor_dtype != other) return nullptr;
  if (e.rows && e.row_size % 8 != 0) return nullptr;
  if (e.state_dtype == DType::u8 && e.block_row % 8 != 0) return nullptr;
  if (e.stochastic && !shares_random_bits(e)) return nullptr;
  return lean_kernel_for(e);
}

// What steps an entry: entries that agree in it are stepped by one launch.
struct Launch {
  Kernel step, project;
  const char* name;
};

Launch launch_of(const AdamWEntry& e) {
  if (const LeanKernel* lean = lean_kernel(e)) return {lean->steps[e.mask != nullptr], nullptr, lean->name};
  const GenericKernels& generic = kGeneric[e.dtype == DType::f64];
  if (is_selective(e)) return {generic.selective_step, generic.project, "adamw_generic, selective"};
  return {generic.step, nullptr, "adamw_generic"};
}

}  // namespace

int64_t AdamWTable::workspace_bytes(const std::vector<AdamWEntry>& entries) {
  int64_t chunks = 0;
  for (const AdamWEntry& e : entries) chunks += chunks_of(e);
  return Layout(static_cast<int64_t>(entries.size()), chunks).end;
}

void AdamWTable::set_entries(const std::vector<AdamWEntry>& entries, void* stream) {
  // By the kernel that steps them, in the order in which kernels are first met.
  std::vector<Kernel> kernels;
  std::vector<std::vector<const AdamWEntry*>> by_kernel;
  for (const AdamWEntry& e : entries) {
    const Kernel step = launch_of(e).step;
    const size_t at = std::find(kernels.begin(), kernels.end(), step) - kernels.begin();
    if (at == kernels.size()) {
      kernels.push_back(step);
      by_kernel.emplace_back();
    }
    by_kernel[at].push_back(&e);
  }
  entries_.clear();
  entries_.reserve(entries.size());
  for (const auto& group : by_kernel)
    for (const AdamWEntry* e : group) entries_.push_back(*e);
  first_chunk_.assign(1, 0);
  for (const AdamWEntry& e : entries_) first_chunk_.push_back(first_chunk_.back() + chunks_of(e));

  const Layout layout(static_cast<int64_t>(entries_.size()), first_chunk_.back());
  if (layout.end > bytes_) throw std::runtime_error("the workspace is smaller than the step's table");
  std::vector<char> image(layout.image_end, 0);  // zeroed, padding too: it is compared byte by byte
  uint32_t* chunk_entry = reinterpret_cast<uint32_t*>(image.data() + layout.chunk_entry);
  for (size_t i = 0; i < entries_.size(); ++i) {
    const AdamWEntry& e = entries_[i];
    DeviceEntry& d = reinterpret_cast<DeviceEntry*>(image.data())[i];
    d.param = e.param;
    d.exp_avg = e.exp_avg;
    d.exp_avg_sq = e.exp_avg_sq;
    d.max_exp_avg_sq = e.max_exp_avg_sq;
    d.low_bits = e.low_bits;
    d.exp_avg_scales = e.exp_avg_scales;
    d.exp_avg_sq_scales = e.exp_avg_sq_scales;
    d.weight_sums = e.weight_sums;
    d.anchor = e.anchor;
    d.importance = e.importance;
    d.mask = e.mask;
    d.rows = e.rows;
    d.step = e.device_step;
    d.live_numel = e.live_numel();
    d.row_size = e.state_dtype == DType::u8 ? e.block_row : e.row_size;
    d.rounding_key = e.rounding_key;
    d.index = e.index;
    d.first_chunk = first_chunk_[i];
    d.chunks = first_chunk_[i + 1] - first_chunk_[i];
    d.chunk_size = static_cast<uint32_t>(chunk_size_of(e));
    d.dtype = e.dtype;
    d.state_dtype = e.state_dtype;
    d.grad_dtype = e.grad_dtype;
    d.anchor_dtype = e.anchor_dtype;
    d.importance_dtype = e.importance_dtype;
    d.anchoring = e.anchoring;
    d.stochastic = e.stochastic;
    d.low_width = e.low_width;
    std::fill(chunk_entry + first_chunk_[i], chunk_entry + first_chunk_[i + 1], static_cast<uint32_t>(i));
  }
  if (image == image_) return;
  const DeviceGuard guard(device_);
  image_ = std::move(image);
  char* base = static_cast<char*>(workspace_);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(base, image_.data(), image_.size(), cudaMemcpyHostToDevice, s), "uploading the step's table");
  check(cudaMemsetAsync(base + layout.tickets, 0, layout.partial - layout.tickets, s), "clearing the tickets");
}

namespace {

// Fills args with entries from `first` on, as many (before `stop`) as fit; returns how many.
template <typename OptionsOf>
uint32_t fill(Args& args, const std::vector<AdamWEntry>& entries, uint32_t first, uint32_t stop,
              const OptionsOf& options_of) {
  std::map<std::tuple<int32_t, double, double, double>, uint16_t> known;
  std::vector<StepOptions> found;
  std::vector<uint16_t> index;
  uint32_t count = 0;
  for (; first + count < stop; ++count) {
    const AdamWEntry& e = entries[first + count];
    const auto key = std::make_tuple(e.group, e.t, e.bias1, e.bias2);
    const bool is_new = known.find(key) == known.end();
    if ((found.size() + is_new) * sizeof(StepOptions) + (count + 1) * kBytesPerEntry > sizeof args.space) break;
    if (is_new) {
      known[key] = static_cast<uint16_t>(found.size());
      found.push_back(options_of(e));
    }
    index.push_back(known[key]);
  }
  args.first_entry = first;
  args.count = count;
  args.options_count = static_cast<uint32_t>(found.size());
  unsigned char* at = args.space;
  if (!found.empty()) std::memcpy(at, found.data(), found.size() * sizeof(StepOptions));
  at += found.size() * sizeof(StepOptions);
  for (uint32_t i = 0; i < count; ++i, at += sizeof(void*)) std::memcpy(at, &entries[first + i].grad, sizeof(void*));
  std::memcpy(at, index.data(), index.size() * sizeof(uint16_t));
  return count;
}

// The parameters that all kernels share: where the parts of the workspace lie.
Args args_in(void* workspace, const Layout& layout) {
  char* base = static_cast<char*>(workspace);
  Args args = {};
  args.entries = reinterpret_cast<const DeviceEntry*>(base);
  args.chunk_entry = reinterpret_cast<const uint32_t*>(base + layout.chunk_entry);
  args.tickets = reinterpret_cast<uint32_t*>(base + layout.tickets);
  args.partial = reinterpret_cast<double*>(base + layout.partial);
  args.pulls = reinterpret_cast<double*>(base + layout.pulls);
  return args;
}

}  // namespace

void AdamWTable::sum_of_squares(double* out, void* stream) {
  const DeviceGuard guard(device_);
  const Layout layout(static_cast<int64_t>(entries_.size()), first_chunk_.back());
  const uint32_t n = static_cast<uint32_t>(entries_.size());
  Args args = args_in(workspace_, layout);
  args.out = out;
  args.total_chunks = first_chunk_.back();
  if (n == 0) check(cudaMemsetAsync(out, 0, sizeof *out, static_cast<cudaStream_t>(stream)), "clearing the norm");
  for (uint32_t first = 0; first < n;) {
    const uint32_t count = fill(args, entries_, first, n, [](const AdamWEntry&) { return StepOptions{}; });
    args.first_chunk = first_chunk_[first];
    args.finishes = first + count == n;
    launch(kSumOfSquares, "grad_sum_of_squares", first_chunk_[first + count] - args.first_chunk, stream, args);
    ++launches_;
    first += count;
  }
}

void AdamWTable::adamw(const std::vector<AdamWGroup>& groups, const AdamWControl& control, void* stream) {
  const DeviceGuard guard(device_);
  const Layout layout(static_cast<int64_t>(entries_.size()), first_chunk_.back());
  const uint32_t n = static_cast<uint32_t>(entries_.size());
  Args args = args_in(workspace_, layout);
  args.control = control;
  const auto options_of = [&](const AdamWEntry& e) {
    const AdamWGroup& g = groups[e.group];
    return StepOptions{g.options, e.bias1, e.bias2, g.lr, static_cast<uint32_t>(e.t), g.lr_dtype};
  };
  for (uint32_t first = 0; first < n;) {
    const Launch kernels = launch_of(entries_[first]);
    uint32_t stop = first;
    while (stop < n && launch_of(entries_[stop]).step == kernels.step) ++stop;
    const uint32_t count = fill(args, entries_, first, stop, options_of);
    args.first_chunk = first_chunk_[first];
    args.counts_skips = first == 0;
    const uint32_t blocks = first_chunk_[first + count] - args.first_chunk;
    launch(kernels.step, kernels.name, blocks, stream, args);
    ++launches_;
    if (kernels.project) {
      launch(kernels.project, "selective_project", blocks, stream, args);
      ++launches_;
    }
    first += count;
  }
}

std::string unavailable_reason() {
  int driver = 0, count = 0;  // versions are 1000 · major + 10 · minor
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is installed";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver knows CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", and the code in this build needs CUDA " + std::to_string(CUDART_VERSION / 1000);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? "" : "no CUDA device";
}

}  // namespace fastft::cuda
