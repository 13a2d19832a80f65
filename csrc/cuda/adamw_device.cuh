// What the kernels of the CUDA step share: where a chunk's elements lie, the numbers of its step, and how steps are
// counted.
#pragma once

#include "adamw_kernels.cuh"

namespace fastft::cuda {
namespace {

constexpr uint32_t kWarps = kThreads / kWarp;

// The items of a chunk (elements; or blocks of moments in 8 bits) in rows: where the chunk begins, and how many a row
// has. A chunk is short, so that one division of 64 bits, when it begins, is enough.
struct Walk {
  int64_t row, size;
  uint64_t column;

  __device__ __forceinline__ void begin(int64_t first, int64_t row_items) {
    row = row_items > 0 ? first / row_items : 0;
    size = row_items;
    column = static_cast<uint64_t>(first - row * row_items);
  }
  // Row and column of item i of the chunk.
  __device__ __forceinline__ void locate(uint32_t i, int64_t* at_row, int64_t* at_column) const {
    const uint64_t c = column + i;
    if (size > 0x7fffffff) {  // at most one row ends within a chunk
      const bool next = c >= static_cast<uint64_t>(size);
      *at_row = row + next;
      *at_column = static_cast<int64_t>(c) - (next ? size : 0);
    } else {
      const uint32_t r = static_cast<uint32_t>(c) / static_cast<uint32_t>(size);
      *at_row = row + r;
      *at_column = static_cast<uint32_t>(c) - r * static_cast<uint32_t>(size);
    }
  }
};

// A chunk's live elements, for moments that are not in blocks.
struct Chunk {
  const int64_t* rows;
  int64_t begin;
  uint32_t count;
  Walk walk;

  // chunk: its number among those of the entry.
  __device__ __forceinline__ void find(const DeviceEntry& e, uint32_t chunk) {
    rows = e.rows;
    begin = static_cast<int64_t>(chunk) * e.chunk_size;
    const int64_t left = e.live_numel - begin;
    count = static_cast<uint32_t>(left < 0 ? 0 : left < e.chunk_size ? left : e.chunk_size);
    if (rows) walk.begin(begin, e.row_size);
  }
  // Where its element i lies.
  __device__ __forceinline__ int64_t place(uint32_t i) const {
    if (rows == nullptr) return begin + i;
    int64_t row, column;
    walk.locate(i, &row, &column);
    return *global(rows + row) * walk.size + column;
  }
};

// A block of moments in 8 bits.
struct BlockPlace {
  int64_t offset, scale;  // its first element; the index of its scales
  int32_t length;
};

// A chunk's blocks.
struct Blocks {
  const int64_t* rows;
  int64_t row_size;
  uint32_t count;
  Walk walk;

  __device__ __forceinline__ void find(const DeviceEntry& e, uint32_t chunk) {
    rows = e.rows;
    row_size = e.row_size;
    const int64_t per_row = e.blocks_per_row(), begin = static_cast<int64_t>(chunk) * kChunkBlocks;
    const int64_t all = row_size > 0 ? e.live_numel / row_size * per_row : 0, left = all - begin;
    count = static_cast<uint32_t>(left < 0 ? 0 : left < kChunkBlocks ? left : kChunkBlocks);
    walk.begin(begin, per_row);
  }
  __device__ __forceinline__ BlockPlace place(uint32_t block) const {
    int64_t row, column;
    walk.locate(block, &row, &column);
    if (rows) row = *global(rows + row);
    const int64_t left = row_size - column * kBlock8;
    return {row * row_size + column * kBlock8, row * walk.size + column,
            static_cast<int32_t>(left < kBlock8 ? left : kBlock8)};
  }
};

// Shared by all threads of a block.
template <typename T>
struct Shared {
  DeviceEntry entry;
  const void* grad;
  AdamWScalars<T> scalars;
  T grad_factor;
  uint32_t t;
  bool skip;
  Chunk chunk;
  Blocks blocks;                           // in place of `chunk`, with moments in 8 bits
  uint32_t* kept_sums;                     // from one step to the next, those of its units
  uint32_t before[kUnits], after[kUnits];  // the sums of its units
};

__device__ __forceinline__ double read_scalar(const void* data, DType dtype) {
  double x[1];
  read_any(data, dtype, 0, x);
  return x[0];
}

// The chunk of this block: backwards, so that a step begins with the gradients that the norm has read last, which are
// still in the L2 cache.
__device__ __forceinline__ uint32_t chunk_of_block(const Args& args) {
  return args.first_chunk + (gridDim.x - 1 - blockIdx.x);
}

// All but the entry, in one thread. Not inlined: its double-precision powers would otherwise take registers from the
// loop.
template <typename T>
__device__ __noinline__ void prepare(const Args& args, uint32_t chunk, uint32_t index, Shared<T>* out) {
  const DeviceEntry& e = out->entry;
  out->grad = *args.grad(index - args.first_entry);
  const AdamWControl& control = args.control;
  const double scale = control.grad_scale ? *control.grad_scale : 1.0;
  const double norm = control.sum_of_squares ? square_root(*control.sum_of_squares) / scale : 0.0;
  out->skip = adamw_skips(control.skip_nonfinite, norm, control.found_inf);
  if (out->skip && args.counts_skips && blockIdx.x == 0 && control.skipped_steps) ++*control.skipped_steps;
  const StepOptions& step = *args.options(*args.options_index(index - args.first_entry));
  AdamWOptions options = step.options;
  if (step.lr) options.lr = read_scalar(step.lr, step.lr_dtype);
  double bias1 = step.bias1, bias2 = step.bias2;
  out->t = step.t;
  if (e.step) {
    const double t = static_cast<double>(*e.step) + 1.0;
    bias1 = adamw_bias(options.beta1, t);
    bias2 = adamw_bias(options.beta2, t);
    out->t = static_cast<uint32_t>(t);
  }
  out->scalars = adamw_scalars<T>(options, bias1, bias2, e.anchoring);
  out->grad_factor = static_cast<T>(adamw_grad_factor(scale, norm, control.max_grad_norm, options.maximize));
  if (e.weight_sums) out->kept_sums = e.weight_sums + static_cast<uint64_t>(chunk - e.first_chunk) * kUnits;
  if (e.in_blocks())
    out->blocks.find(e, chunk - e.first_chunk);
  else
    out->chunk.find(e, chunk - e.first_chunk);
}

// Fills it in. Every thread of the block must call it; false where the step is skipped.
template <typename T>
__device__ __forceinline__ bool begin_step(const Args& args, uint32_t chunk, uint32_t index, Shared<T>& shared) {
  constexpr uint32_t kWords = sizeof(DeviceEntry) / sizeof(uint64_t);
  static_assert(sizeof(DeviceEntry) % sizeof(uint64_t) == 0 && kWords <= kThreads, "a word for each thread");
  if (threadIdx.x < kWords)
    reinterpret_cast<uint64_t*>(&shared.entry)[threadIdx.x] =
        reinterpret_cast<const uint64_t*>(args.entries + index)[threadIdx.x];
  if (threadIdx.x < kUnits) shared.before[threadIdx.x] = shared.after[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) prepare(args, chunk, index, &shared);
  __syncthreads();
  return !shared.skip;
}

// A tensor's last block counts the step, where the device counts: by then every block of it has read the old count.
__device__ __forceinline__ void count_step(const Args& args, uint32_t index, const DeviceEntry& e) {
  if (e.step && threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&args.tickets[1 + index], 1u) == e.chunks - 1) {
      args.tickets[1 + index] = 0;
      *e.step += 1.0f;
    }
  }
}

// -- low bits

// A chunk's items (blocks, with moments in 8 bits; else elements) from `first` to `last`: those of one of its units.
struct Unit {
  uint32_t number, first, last;
};

// work(unit) for each of the chunk's units, the same for all threads.
template <typename T, typename Work>
__device__ __forceinline__ void for_each_unit(const Shared<T>& shared, const Work& work) {
#pragma unroll 1
  for (uint32_t number = 0;; ++number) {
    asm volatile("" ::: "memory");  // what is read of `shared` is not held in registers from unit to unit
    const bool in_blocks = shared.entry.in_blocks();
    const uint32_t count = in_blocks ? shared.blocks.count : shared.chunk.count, size = in_blocks ? kUnitBlocks : kUnit;
    const uint32_t first = number * size;
    if (first >= count) break;
    work(Unit{number, first, first + size < count ? first + size : count});
  }
}

// Every thread of the warp must call it.
__device__ __forceinline__ void add_to_unit(uint32_t* sum, uint32_t term) {
  term = warp_total(term);
  if (threadIdx.x % kWarp == 0) atomicAdd(sum, term);
}

// clear(unit) for those of the chunk's units that somebody else has written since their sums were kept. terms(unit):
// this thread's part of the sum now. Every thread of the block must call it.
template <typename T, typename Terms, typename Clear>
__device__ __forceinline__ void check_units(Shared<T>& shared, const Terms& terms, const Clear& clear) {
  for_each_unit(shared, [&](const Unit& unit) { add_to_unit(&shared.before[unit.number], terms(unit)); });
  __syncthreads();
  for_each_unit(shared, [&](const Unit& unit) {
    const uint32_t known = *global(shared.kept_sums + unit.number);
    if (known != 0 && known != (shared.before[unit.number] | 1u)) clear(unit);
  });
}

// Keeps the sums that all threads of the block have added up.
template <typename T>
__device__ __forceinline__ void keep_sums(const Shared<T>& shared) {
  __syncthreads();
  for_each_unit(shared, [&](const Unit& unit) {
    if (threadIdx.x == unit.number) *global(shared.kept_sums + unit.number) = shared.after[unit.number] | 1u;
  });
}

// weight_term() of an element of the chunk by its place there.
__device__ __forceinline__ uint32_t term_at(bfloat16 weight, uint32_t position) {
  return weight_term(weight, position % static_cast<uint32_t>(kUnit));
}

// -- stochastic rounding

// Of the element at `offset`, in the whole tensor; a tensor that is whole needs no division.
__device__ __forceinline__ uint64_t index_of(const DeviceEntry& e, int64_t offset) {
  return static_cast<uint64_t>(offset < e.index.row ? e.index.first + offset : e.index.of(offset));
}

// The sixteen random bits of the element at `offset`.
__device__ __forceinline__ uint32_t random_of(const DeviceEntry& e, uint32_t t, uint32_t pass, int64_t offset) {
  const uint64_t i = index_of(e, offset);
  const PhiloxWords words = rounding_words(e.rounding_key, t, pass, i / kPerPhilox);
  const uint32_t k = static_cast<uint32_t>(i % kPerPhilox);
  // Chosen, not indexed: an array with an index lies in memory.
  const uint32_t word = k < 4 ? (k < 2 ? words.at[0] : words.at[1]) : (k < 6 ? words.at[2] : words.at[3]);
  return word >> (k % 2 * 16) & 0xffffu;
}

}  // namespace
}  // namespace fastft::cuda
