// The AdamW step on CUDA. All tensors of a dtype combination are one launch: a block takes one chunk of one tensor,
// found through a map that lies on the device.
#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

#include "adamw.h"
#include "launch.cuh"

namespace fastft::cuda {
namespace {

constexpr int64_t kChunk = 16384;  // live elements per block

// An entry as the kernels read it.
struct DeviceEntry {
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const void* anchor;
  const uint8_t* mask;
  const int64_t* rows;
  float* step;
  int64_t live_numel, row_size;
  uint32_t first_chunk, chunks;
  DType grad_dtype, anchor_dtype;
  bool vectorised;  // every array is 16-byte aligned, and so is every row
  Anchoring anchoring;
  DType importance_dtype;
  const void* importance;
};

// What tensors of one group and step count share.
struct Row {
  AdamWOptions options;
  double bias1, bias2;
  const void* lr;
  DType lr_dtype;
};

// Kernel parameters; at most 32,764 bytes. `space` holds the rows, then per tensor the gradient's address and the
// index of its row.
struct Args {
  const DeviceEntry* entries;
  const uint32_t* chunk_entry;
  uint32_t* tickets;
  double* partial;  // three to a chunk
  double* pulls;    // of each entry, in selective projection
  double* out;
  AdamWControl control;
  uint32_t first_entry, count, first_chunk, row_count, total_chunks;
  bool counts_skips, finishes;
  alignas(8) unsigned char space[32000];

  FASTFT_HD const Row* row(uint32_t i) const { return reinterpret_cast<const Row*>(space) + i; }
  FASTFT_HD const void* const* grad(uint32_t i) const {
    return reinterpret_cast<const void* const*>(space + row_count * sizeof(Row)) + i;
  }
  FASTFT_HD const uint16_t* row_index(uint32_t i) const {
    return reinterpret_cast<const uint16_t*>(space + row_count * sizeof(Row) + count * sizeof(void*)) + i;
  }
};
static_assert(sizeof(Args) <= 32764, "kernel parameters");

constexpr uint64_t kBytesPerEntry = sizeof(void*) + sizeof(uint16_t);

// Where live element i lies.
__device__ __forceinline__ int64_t place(const DeviceEntry& e, int64_t i) {
  if (e.rows == nullptr) return i;
  int64_t row;
  if (e.live_numel <= 0xffffffffll)
    row = static_cast<uint32_t>(i) / static_cast<uint32_t>(e.row_size);
  else
    row = i / e.row_size;
  return *global(e.rows + row) * e.row_size + (i - row * e.row_size);
}

// work.template run<N>(offset) over the live elements [begin, end) of a block's chunk, N at a time where possible.
template <int N, typename Work>
__device__ __forceinline__ void for_each_live(const DeviceEntry& e, int64_t begin, int64_t end, Work& work) {
  if (e.vectorised) {
    int64_t i = begin + static_cast<int64_t>(threadIdx.x) * N;
    for (; i + N <= end; i += kThreads * N) work.template run<N>(place(e, i));
    for (; i < end; ++i) work.template run<1>(place(e, i));
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) work.template run<1>(place(e, i));
  }
}

struct SumOfSquares {
  const void* grad;
  const uint8_t* mask;
  DType dtype;
  double sum;

  template <int N>
  __device__ __forceinline__ void run(int64_t offset) {
    double g[N];
    uint8_t live[N];
    read_any(grad, dtype, offset, g);
    if (mask) read(mask, offset, live);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (mask == nullptr || live[i]) sum = madd(g[i], g[i], sum);
  }
};

// partial[chunk] = Σ grad² of the chunk; the last block to finish adds the partial sums up, always in the same order.
__global__ void __launch_bounds__(kThreads) grad_sum_of_squares(const __grid_constant__ Args args) {
  const uint32_t chunk = args.first_chunk + blockIdx.x;
  const uint32_t index = args.chunk_entry[chunk];
  const DeviceEntry& e = args.entries[index];
  const int64_t begin = static_cast<int64_t>(chunk - e.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < e.live_numel ? begin + kChunk : e.live_numel;
  SumOfSquares work{*args.grad(index - args.first_entry), e.mask, e.grad_dtype, 0.0};
  for_each_live<8>(e, begin, end, work);
  const double sum = block_sum(work.sum);

  __shared__ bool last;
  if (threadIdx.x == 0) {
    args.partial[chunk] = sum;
    __threadfence();
    last = args.finishes && atomicAdd(args.tickets, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double total = 0.0;
  const volatile double* partial = args.partial;
  for (uint32_t i = threadIdx.x; i < args.total_chunks; i += kThreads) total += partial[i];
  total = block_sum(total);
  if (threadIdx.x == 0) {
    *args.out = total;
    *args.tickets = 0;
  }
}

// What all threads of a block share.
template <typename T>
struct Shared {
  DeviceEntry entry;
  const void* grad;
  AdamWScalars<T> scalars;
  T grad_factor;
  bool skip;
};

// For tensors anchored as kMost says: selectively; or by pulling, no more elaborately than that, or not at all.
template <typename Param, typename State, Anchoring kMost>
struct Update {
  using T = compute_t<Param>;
  const Shared<T>& shared;
  SelectiveSums sums;

  template <int N>
  __device__ __forceinline__ void run(int64_t offset) {
    // 16 bytes of the parameter, then the moments 16 bytes at a time, then gradient, anchor and importance, whose
    // dtype is known only now, four elements at a time: so few values are held at once that nothing spills.
    constexpr int kStatePart = N * sizeof(State) <= 16 ? N : 16 / sizeof(State);
    constexpr int kPart = sizeof(T) == sizeof(double) ? 1 : kStatePart < 4 ? kStatePart : 4;
    const DeviceEntry& e = shared.entry;
    const bool amsgrad = e.max_exp_avg_sq != nullptr;
    constexpr bool kSelective = kMost == Anchoring::selective;
    const bool anchored = e.anchor != nullptr;
    const bool weighted = kMost == Anchoring::weighted && e.anchoring == Anchoring::weighted;
    const Anchoring anchoring = kSelective ? Anchoring::selective
                                : weighted ? Anchoring::weighted
                                : anchored ? Anchoring::plain
                                           : Anchoring::none;
    Param p[N];
    read(e.param, offset, p);
#pragma unroll
    for (int first = 0; first < N; first += kStatePart) {
      State m[kStatePart], v[kStatePart];
      read(e.exp_avg, offset + first, m);
      read(e.exp_avg_sq, offset + first, v);
#pragma unroll
      for (int part = 0; part < kStatePart; part += kPart) {
        T g[kPart], a[kPart], f[kPart];
        State x[kPart];
        uint8_t live[kPart];
        if (amsgrad) read(e.max_exp_avg_sq, offset + first + part, x);
        if (e.mask) read(e.mask, offset + first + part, live);
        read_any(shared.grad, e.grad_dtype, offset + first + part, g);
        if (anchored) read_any(e.anchor, e.anchor_dtype, offset + first + part, a);
        if (weighted) read_any(e.importance, e.importance_dtype, offset + first + part, f);
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          asm volatile("" ::: "memory");  // scalars stay in shared memory: held in registers they would not fit
          const int k = part + j, i = first + k;
          if (e.mask && !live[j]) continue;  // its bits stay as they were read
          if constexpr (kSelective) {
            const double delta = static_cast<double>(widen(p[i])) - static_cast<double>(a[j]);
            sums.uphill = madd(static_cast<double>(g[j]), delta, sums.uphill);
            sums.before = madd(delta, delta, sums.before);
          }
          T pi = widen(p[i]), mi = widen(m[k]), vi = widen(v[k]), xi = amsgrad ? widen(x[j]) : T(0);
          adamw_element(pi, g[j], mi, vi, xi, anchored ? a[j] : T(0), weighted ? f[j] : T(0), anchoring, amsgrad,
                        shared.grad_factor, shared.scalars);
          narrow(pi, &p[i]);
          if constexpr (kSelective) {
            const double delta = static_cast<double>(widen(p[i])) - static_cast<double>(a[j]);
            sums.after = madd(delta, delta, sums.after);
          }
          narrow(mi, &m[k]);
          narrow(vi, &v[k]);
          if (amsgrad) narrow(xi, &x[j]);
        }
        if (amsgrad) write(e.max_exp_avg_sq, offset + first + part, x);
      }
      write(e.exp_avg, offset + first, m);
      write(e.exp_avg_sq, offset + first, v);
    }
    write(e.param, offset, p);
  }
};

__device__ __forceinline__ double read_scalar(const void* data, DType dtype) {
  double x[1];
  read_any(data, dtype, 0, x);
  return x[0];
}

// Fills it in, in one thread. Not inlined: its double-precision powers would otherwise take registers from the loop.
template <typename T>
__device__ __noinline__ void prepare(const Args& args, uint32_t index, Shared<T>* out) {
  const DeviceEntry& e = args.entries[index];
  out->entry = e;
  out->grad = *args.grad(index - args.first_entry);
  const AdamWControl& control = args.control;
  const double scale = control.grad_scale ? *control.grad_scale : 1.0;
  const double norm = control.sum_of_squares ? square_root(*control.sum_of_squares) / scale : 0.0;
  out->skip = adamw_skips(control.skip_nonfinite, norm, control.found_inf);
  if (out->skip && args.counts_skips && blockIdx.x == 0 && control.skipped_steps) ++*control.skipped_steps;
  const Row& row = *args.row(*args.row_index(index - args.first_entry));
  AdamWOptions options = row.options;
  if (row.lr) options.lr = read_scalar(row.lr, row.lr_dtype);
  double bias1 = row.bias1, bias2 = row.bias2;
  if (e.step) {
    const double t = static_cast<double>(*e.step) + 1.0;
    bias1 = adamw_bias(options.beta1, t);
    bias2 = adamw_bias(options.beta2, t);
  }
  out->scalars = adamw_scalars<T>(options, bias1, bias2, e.anchoring);
  out->grad_factor = static_cast<T>(adamw_grad_factor(scale, norm, control.max_grad_norm, options.maximize));
}

// Blocks to a multiprocessor: four hold a thread to 64 registers; what ptxas makes for Blackwell needs a few more, and
// three still keep more loads in flight than its memory can serve at once. So do an importance in double and the sums
// of selective projection.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename Param, Anchoring kMost>
constexpr int kBlocks = 3;
#else
template <typename Param, Anchoring kMost>
constexpr int kBlocks =
    kMost == Anchoring::selective || (kMost == Anchoring::weighted && sizeof(Param) == sizeof(double)) ? 3 : 4;
#endif

// Adds up what all blocks of a tensor have found, always in the same order, in the last of them to finish; that one
// also counts the step, which by then every block has read.
__device__ __forceinline__ void finish_sums(const Args& args, uint32_t chunk, uint32_t index, const DeviceEntry& e,
                                            const SelectiveSums& of_thread) {
  const SelectiveSums sums = {block_sum(of_thread.uphill), block_sum(of_thread.before), block_sum(of_thread.after)};
  __shared__ bool last;
  if (threadIdx.x == 0) {
    double* partial = args.partial + 3 * static_cast<uint64_t>(chunk);
    partial[0] = sums.uphill;
    partial[1] = sums.before;
    partial[2] = sums.after;
    __threadfence();
    last = atomicAdd(&args.tickets[1 + index], 1u) == e.chunks - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  SelectiveSums total = {};
  const volatile double* partial = args.partial + 3 * static_cast<uint64_t>(e.first_chunk);
  for (uint32_t i = threadIdx.x; i < e.chunks; i += kThreads) {
    total.uphill += partial[3 * static_cast<uint64_t>(i)];
    total.before += partial[3 * static_cast<uint64_t>(i) + 1];
    total.after += partial[3 * static_cast<uint64_t>(i) + 2];
  }
  total = {block_sum(total.uphill), block_sum(total.before), block_sum(total.after)};
  if (threadIdx.x == 0) {
    args.pulls[index] = selective_pull(total, args.row(*args.row_index(index - args.first_entry))->options);
    args.tickets[1 + index] = 0;
    if (e.step) *e.step += 1.0f;
  }
}

template <typename Param, typename State, Anchoring kMost>
__global__ void __launch_bounds__(kThreads, kBlocks<Param, kMost>) adamw_step(const __grid_constant__ Args args) {
  using T = compute_t<Param>;
  const uint32_t chunk = args.first_chunk + blockIdx.x;
  const uint32_t index = args.chunk_entry[chunk];

  __shared__ Shared<T> shared;
  if (threadIdx.x == 0) prepare(args, index, &shared);
  __syncthreads();
  const DeviceEntry& e = shared.entry;
  if (shared.skip) {
    if (kMost == Anchoring::selective && threadIdx.x == 0 && chunk == e.first_chunk) args.pulls[index] = 0.0;
    return;
  }

  constexpr int kVector = 16 / sizeof(Param);
  const int64_t begin = static_cast<int64_t>(chunk - e.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < e.live_numel ? begin + kChunk : e.live_numel;
  Update<Param, State, kMost> work{shared, {}};
  for_each_live<kVector>(e, begin, end, work);
  if constexpr (kMost == Anchoring::selective) return finish_sums(args, chunk, index, e, work.sums);

  // The tensor's last block counts the step: by then every block of it has read the old count.
  if (e.step && threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&args.tickets[1 + index], 1u) == e.chunks - 1) {
      args.tickets[1 + index] = 0;
      *e.step += 1.0f;
    }
  }
}

template <typename Param>
struct Projection {
  using T = compute_t<Param>;
  const DeviceEntry& e;
  T pull;

  template <int N>
  __device__ __forceinline__ void run(int64_t offset) {
    Param p[N];
    T a[N];
    uint8_t live[N];
    read(e.param, offset, p);
    read_any(e.anchor, e.anchor_dtype, offset, a);
    if (e.mask) read(e.mask, offset, live);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (e.mask == nullptr || live[i]) narrow(selective_element(static_cast<T>(widen(p[i])), a[i], pull), &p[i]);
    write(e.param, offset, p);
  }
};

// Moves stepped tensors to their anchor, as far as the step found that they must go.
template <typename Param>
__global__ void __launch_bounds__(kThreads) selective_project(const __grid_constant__ Args args) {
  const uint32_t chunk = args.first_chunk + blockIdx.x;
  const uint32_t index = args.chunk_entry[chunk];
  const double pull = args.pulls[index];
  if (pull == 0.0) return;
  const DeviceEntry& e = args.entries[index];
  const int64_t begin = static_cast<int64_t>(chunk - e.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < e.live_numel ? begin + kChunk : e.live_numel;
  Projection<Param> work{e, static_cast<compute_t<Param>>(pull)};
  for_each_live<16 / sizeof(Param)>(e, begin, end, work);
}

using Kernel = void (*)(Args);

template <typename Param, typename State>
constexpr Kernel kSteps[] = {
    adamw_step<Param, State, Anchoring::plain>,
    adamw_step<Param, State, Anchoring::weighted>,
    adamw_step<Param, State, Anchoring::selective>,
};

struct Combination {
  DType param, state;
  const Kernel* steps;  // for plain, weighted and selective anchors
  Kernel project;
  const char* name;
};

const Combination kCombinations[] = {
    {DType::f32, DType::f32, kSteps<float, float>, selective_project<float>, "adamw_step<float, float>"},
    {DType::bf16, DType::bf16, kSteps<bfloat16, bfloat16>, selective_project<bfloat16>,
     "adamw_step<bfloat16, bfloat16>"},
    {DType::bf16, DType::f32, kSteps<bfloat16, float>, selective_project<bfloat16>, "adamw_step<bfloat16, float>"},
    {DType::f16, DType::f16, kSteps<float16, float16>, selective_project<float16>, "adamw_step<float16, float16>"},
    {DType::f16, DType::f32, kSteps<float16, float>, selective_project<float16>, "adamw_step<float16, float>"},
    {DType::f64, DType::f64, kSteps<double, double>, selective_project<double>, "adamw_step<double, double>"},
};

const Combination& combination_of(const AdamWEntry& e) {
  for (const Combination& c : kCombinations)
    if (c.param == e.dtype && c.state == e.state_dtype) return c;
  throw std::runtime_error(std::string("no kernel for parameters of ") + name(e.dtype) + " with state of " +
                           name(e.state_dtype));
}

uint32_t chunks_of(const AdamWEntry& e) {
  return static_cast<uint32_t>(std::max<int64_t>(1, (e.live_numel() + kChunk - 1) / kChunk));
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
  return e.anchoring == Anchoring::selective;
}

// Entries that agree in this are stepped by one launch.
auto launch_of(const AdamWEntry& e) {
  return std::make_tuple(e.dtype, e.state_dtype, is_selective(e));
}

bool is_vectorised(const AdamWEntry& e) {
  const void* arrays[] = {e.param, e.grad, e.exp_avg, e.exp_avg_sq, e.max_exp_avg_sq, e.anchor, e.importance, e.mask};
  for (const void* a : arrays)
    if (reinterpret_cast<uintptr_t>(a) % 16 != 0) return false;
  return e.rows == nullptr || e.row_size % 8 == 0;
}

}  // namespace

int64_t AdamWTable::workspace_bytes(const std::vector<AdamWEntry>& entries) {
  int64_t chunks = 0;
  for (const AdamWEntry& e : entries) chunks += chunks_of(e);
  return Layout(static_cast<int64_t>(entries.size()), chunks).end;
}

void AdamWTable::set_entries(const std::vector<AdamWEntry>& entries, void* stream) {
  entries_ = entries;
  std::stable_sort(entries_.begin(), entries_.end(),
                   [](const AdamWEntry& a, const AdamWEntry& b) { return launch_of(a) < launch_of(b); });
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
    d.anchor = e.anchor;
    d.importance = e.importance;
    d.mask = e.mask;
    d.rows = e.rows;
    d.step = e.device_step;
    d.live_numel = e.live_numel();
    d.row_size = e.row_size;
    d.first_chunk = first_chunk_[i];
    d.chunks = first_chunk_[i + 1] - first_chunk_[i];
    d.grad_dtype = e.grad_dtype;
    d.anchor_dtype = e.anchor_dtype;
    d.importance_dtype = e.importance_dtype;
    d.anchoring = e.anchoring;
    d.vectorised = is_vectorised(e);
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
template <typename RowOf>
uint32_t fill(Args& args, const std::vector<AdamWEntry>& entries, uint32_t first, uint32_t stop, const RowOf& row_of) {
  std::map<std::tuple<int32_t, double, double>, uint16_t> known;
  std::vector<Row> rows;
  std::vector<uint16_t> index;
  uint32_t count = 0;
  for (; first + count < stop; ++count) {
    const AdamWEntry& e = entries[first + count];
    const auto key = std::make_tuple(e.group, e.bias1, e.bias2);
    const bool is_new = known.find(key) == known.end();
    if ((rows.size() + is_new) * sizeof(Row) + (count + 1) * kBytesPerEntry > sizeof args.space) break;
    if (is_new) {
      known[key] = static_cast<uint16_t>(rows.size());
      rows.push_back(row_of(e));
    }
    index.push_back(known[key]);
  }
  args.first_entry = first;
  args.count = count;
  args.row_count = static_cast<uint32_t>(rows.size());
  unsigned char* at = args.space;
  if (!rows.empty()) std::memcpy(at, rows.data(), rows.size() * sizeof(Row));
  at += rows.size() * sizeof(Row);
  for (uint32_t i = 0; i < count; ++i, at += sizeof(void*)) std::memcpy(at, &entries[first + i].grad, sizeof(void*));
  std::memcpy(at, index.data(), index.size() * sizeof(uint16_t));
  return count;
}

// What all kernels are told of the table's workspace.
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
    const uint32_t count = fill(args, entries_, first, n, [](const AdamWEntry&) { return Row{}; });
    args.first_chunk = first_chunk_[first];
    args.finishes = first + count == n;
    launch(grad_sum_of_squares, "grad_sum_of_squares", first_chunk_[first + count] - args.first_chunk, stream, args);
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
  const auto row_of = [&](const AdamWEntry& e) {
    const AdamWGroup& g = groups[e.group];
    return Row{g.options, e.bias1, e.bias2, g.lr, g.lr_dtype};
  };
  for (uint32_t first = 0; first < n;) {
    const Combination& combination = combination_of(entries_[first]);
    Anchoring most = Anchoring::plain;
    uint32_t stop = first;
    for (; stop < n && launch_of(entries_[stop]) == launch_of(entries_[first]); ++stop)
      most = std::max(most, entries_[stop].anchoring);
    const uint32_t count = fill(args, entries_, first, stop, row_of);
    args.first_chunk = first_chunk_[first];
    args.counts_skips = first == 0;
    const uint32_t blocks = first_chunk_[first + count] - args.first_chunk;
    const Kernel step = combination.steps[static_cast<int>(most) - static_cast<int>(Anchoring::plain)];
    launch(step, combination.name, blocks, stream, args);
    ++launches_;
    if (most == Anchoring::selective) {
      launch(combination.project, "selective_project", blocks, stream, args);
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
