// The kernels of the CUDA step that take whatever the lean ones (adamw_lean.cu) do not, an element at a time; and those
// that all tensors share: the norm, and selective projection.
#include "adamw_device.cuh"

namespace fastft::cuda {
namespace {

// -- the norm

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
  constexpr uint32_t N = 8;
  const uint32_t number = args.first_chunk + blockIdx.x;
  const uint32_t index = args.chunk_entry[number];
  const DeviceEntry& e = args.entries[index];
  __shared__ Chunk chunk;
  if (threadIdx.x == 0) chunk.find(e, number - e.first_chunk);
  __syncthreads();
  SumOfSquares work{*args.grad(index - args.first_entry), e.mask, e.grad_dtype, 0.0};
  const uint32_t count = chunk.count;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(work.grad) | reinterpret_cast<uintptr_t>(work.mask);
  const bool vectorised = addresses % 16 == 0 && (e.rows == nullptr || e.row_size % N == 0);
  uint32_t done = 0;
  if (vectorised) {
    for (uint32_t i = threadIdx.x * N; i + N <= count; i += kThreads * N) work.run<N>(chunk.place(i));
    done = count / N * N;
  }
  for (uint32_t i = done + threadIdx.x; i < count; i += kThreads) work.run<1>(chunk.place(i));
  const double sum = block_sum(work.sum);

  __shared__ bool last;
  if (threadIdx.x == 0) {
    args.partial[number] = sum;
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

// -- one element

template <typename T>
__device__ __forceinline__ T read_one(const void* data, DType dtype, int64_t offset) {
  T x[1];
  read_any(data, dtype, offset, x);
  return x[0];
}

template <typename Stored, typename T>
__device__ __forceinline__ void write_narrowed(void* data, int64_t offset, T x) {
  Stored stored[1];
  narrow(x, &stored[0]);
  write(data, offset, stored);
}

// Rounds to nearest.
template <typename T>
__device__ __forceinline__ void write_one(void* data, DType dtype, int64_t offset, T x) {
  if constexpr (sizeof(T) == sizeof(double)) {
    write_narrowed<double>(data, offset, x);
  } else {
    if (dtype == DType::bf16) return write_narrowed<bfloat16>(data, offset, x);
    if (dtype == DType::f16) return write_narrowed<float16>(data, offset, x);
    write_narrowed<float>(data, offset, x);
  }
}

template <typename Low>
__device__ __forceinline__ Low& low_of(const DeviceEntry& e, int64_t offset) {
  return *global(static_cast<Low*>(e.low_bits) + offset);
}
__device__ __forceinline__ bfloat16& bfloat16_of(const DeviceEntry& e, int64_t offset) {
  return *global(static_cast<bfloat16*>(e.param) + offset);
}

// The parameter's element, with its low bits.
template <typename T>
__device__ __forceinline__ T read_weight(const DeviceEntry& e, int64_t offset) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (e.low_width == 16) return join(bfloat16_of(e, offset), low_of<uint16_t>(e, offset));
    if (e.low_width == 8) return join(bfloat16_of(e, offset), low_of<uint8_t>(e, offset));
  }
  return read_one<T>(e.param, e.dtype, offset);
}

// pass: as in rounding_words().
template <typename T>
__device__ __forceinline__ void write_weight(const DeviceEntry& e, uint32_t t, uint32_t pass, int64_t offset, T x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (e.low_width == 16) return split(x, &bfloat16_of(e, offset), &low_of<uint16_t>(e, offset));
    const uint32_t random = e.stochastic ? random_of(e, t, pass, offset) : 0;
    if (e.low_width == 8)
      return split(x, e.stochastic ? rounding_byte(random) : nearest_rounding(x), &bfloat16_of(e, offset),
                   &low_of<uint8_t>(e, offset));
    if (e.stochastic && e.dtype == DType::bf16) return narrow_stochastic(x, random, &bfloat16_of(e, offset));
    if (e.stochastic && e.dtype == DType::f16)
      return narrow_stochastic(x, random, global(static_cast<float16*>(e.param) + offset));
  }
  write_one(e.param, e.dtype, offset, x);
}

// -- tiles

// What a warp takes at a time: a block of moments in 8 bits, or as many elements in a row of live ones, of which each
// lane has every 32nd.
constexpr uint32_t kTile = kBlock8, kLanes = kTile / kWarp;

struct Tile {
  BlockPlace block;  // with moments in 8 bits
  uint32_t first, count;

  // Whether the lane's k-th element exists, and where it lies.
  template <typename T>
  __device__ __forceinline__ bool find(const Shared<T>& shared, uint32_t k, int64_t* offset) const {
    const uint32_t i = k * kWarp + threadIdx.x % kWarp;
    if (i >= count) return false;
    *offset = shared.entry.in_blocks() ? block.offset + i : shared.chunk.place(first + i);
    return true;
  }
  // Whether it exists and is live.
  template <typename T>
  __device__ __forceinline__ bool find_live(const Shared<T>& shared, uint32_t k, int64_t* offset) const {
    return find(shared, k, offset) && (shared.entry.mask == nullptr || *global(shared.entry.mask + *offset) != 0);
  }
  // Of that element, in the chunk.
  __device__ __forceinline__ uint32_t position(uint32_t k) const { return first + k * kWarp + threadIdx.x % kWarp; }
};

template <typename T>
__device__ __forceinline__ uint32_t tiles(const Shared<T>& shared) {
  return shared.entry.in_blocks() ? shared.blocks.count : (shared.chunk.count + kTile - 1) / kTile;
}

template <typename T>
__device__ __forceinline__ Tile tile(const Shared<T>& shared, uint32_t number) {
  Tile t = {};
  t.first = number * kTile;
  if (shared.entry.in_blocks()) {
    t.block = shared.blocks.place(number);
    t.count = static_cast<uint32_t>(t.block.length);
  } else {
    const uint32_t left = shared.chunk.count - t.first;
    t.count = left < kTile ? left : kTile;
  }
  return t;
}

// work(offset, position) for each of this thread's elements of a unit, live or not; position: counted in the chunk.
template <typename T, typename Work>
__device__ __forceinline__ void for_each_element(const Shared<T>& shared, const Unit& unit, const Work& work) {
  constexpr uint32_t kTiles = kUnit / kTile;
  const uint32_t end = (unit.number + 1) * kTiles, all = tiles(shared);
  for (uint32_t number = unit.number * kTiles + threadIdx.x / kWarp; number < (end < all ? end : all);
       number += kWarps) {
    const Tile t = tile(shared, number);
#pragma unroll 1
    for (uint32_t k = 0; k < kLanes; ++k) {
      int64_t offset;
      if (t.find(shared, k, &offset)) work(offset, t.position(k));
    }
  }
}

// This thread's part of the sum of a unit's weights.
template <typename T>
__device__ __forceinline__ uint32_t terms(const Shared<T>& shared, const Unit& unit) {
  uint32_t sum = 0;
  for_each_element(shared, unit, [&](int64_t offset, uint32_t position) {
    sum += term_at(bfloat16_of(shared.entry, offset), position);
  });
  return sum;
}

// Each thread reads what itself has written. Every thread of the block must call it.
template <typename T>
__device__ __forceinline__ void remember_units(Shared<T>& shared) {
  for_each_unit(shared, [&](const Unit& unit) { add_to_unit(&shared.after[unit.number], terms(shared, unit)); });
  keep_sums(shared);
}

// -- the step

// The largest moments of a block in 8 bits, as integers, in which absolute values have the same order and NaN is the
// largest. `first` has a 1 behind, so that 0 is what a block without live elements has.
struct Largest {
  uint32_t first, second;

  __device__ __forceinline__ void add(float m, float root) {
    const uint32_t u1 = float_bits(m) << 1 | 1u, u2 = float_bits(root) & 0x7fffffffu;
    first = u1 > first ? u1 : first;
    second = u2 > second ? u2 : second;
  }
};

// For tensors that are projected selectively; or for all others.
template <typename T, bool kSelective>
__device__ __forceinline__ void step_tile(const Shared<T>& shared, const Tile& t, SelectiveSums& sums) {
  const DeviceEntry& e = shared.entry;
  const bool amsgrad = e.max_exp_avg_sq != nullptr, in_blocks = sizeof(T) == sizeof(float) && e.in_blocks();
  const AnchorForm form = kSelective     ? AnchorForm::selective
                          : !e.anchor    ? AnchorForm::none
                          : e.importance ? AnchorForm::weighted
                                         : AnchorForm::plain;
  float scale1 = 0.0f, scale2 = 0.0f;
  if (in_blocks) {
    scale1 = *global(e.exp_avg_scales + t.block.scale);
    scale2 = *global(e.exp_avg_sq_scales + t.block.scale);
  }
  // Moments in 8 bits need the largest of the block first: a first pass finds it and writes nothing.
  Largest largest = {};
  Scale8 now1 = {}, now2 = {};
#pragma unroll 1
  for (int pass = in_blocks ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
    for (uint32_t k = 0; k < kLanes; ++k) {
      asm volatile("" ::: "memory");  // the entry stays in shared memory: held in registers it would not fit
      int64_t offset;
      if (!t.find_live(shared, k, &offset)) continue;
      T p = read_weight<T>(e, offset), m, v, vmax = T(0);
      const T g = read_one<T>(shared.grad, e.grad_dtype, offset);
      const T a = e.anchor ? read_one<T>(e.anchor, e.anchor_dtype, offset) : T(0);
      const T f = form == AnchorForm::weighted ? read_one<T>(e.importance, e.importance_dtype, offset) : T(0);
      uint8_t *code1 = static_cast<uint8_t*>(e.exp_avg) + offset, *code2 = static_cast<uint8_t*>(e.exp_avg_sq) + offset;
      if (in_blocks) {
        m = decode_first(*global(code1), scale1);
        v = decode_second(*global(code2), scale2);
      } else {
        m = read_one<T>(e.exp_avg, e.state_dtype, offset);
        v = read_one<T>(e.exp_avg_sq, e.state_dtype, offset);
        if (amsgrad) vmax = read_one<T>(e.max_exp_avg_sq, e.state_dtype, offset);
      }
      if constexpr (kSelective) {
        const double delta = static_cast<double>(p) - static_cast<double>(a);
        sums.uphill = madd(static_cast<double>(g), delta, sums.uphill);
        sums.before = madd(delta, delta, sums.before);
      }
      adamw_element(p, g, m, v, vmax, a, f, form, amsgrad, shared.grad_factor, shared.scalars);
      if (in_blocks && pass == 0) {
        largest.add(static_cast<float>(m), static_cast<float>(square_root(v)));
        continue;
      }
      write_weight(e, shared.t, 0, offset, p);
      if constexpr (kSelective) {
        const double delta = static_cast<double>(read_weight<T>(e, offset)) - static_cast<double>(a);
        sums.after = madd(delta, delta, sums.after);
      }
      if (in_blocks) {
        const uint32_t dither = dither8(shared.t, k * kWarp + threadIdx.x % kWarp);
        *global(code1) = static_cast<uint8_t>(encode_first(static_cast<float>(m), now1.inverse, dither));
        *global(code2) = static_cast<uint8_t>(encode_second(static_cast<float>(square_root(v)), now2.inverse, dither));
      } else {
        write_one(e.exp_avg, e.state_dtype, offset, m);
        write_one(e.exp_avg_sq, e.state_dtype, offset, v);
        if (amsgrad) write_one(e.max_exp_avg_sq, e.state_dtype, offset, vmax);
      }
    }
    if (in_blocks && pass == 0) {
      largest = {warp_max(largest.first), warp_max(largest.second)};
      if (largest.first == 0) return;
      now1 = scale8(bits_float(largest.first >> 1), kTop1);
      now2 = scale8(bits_float(largest.second), kTop2);
    }
  }
  if (in_blocks && threadIdx.x % kWarp == 0) {
    *global(e.exp_avg_scales + t.block.scale) = now1.scale;
    *global(e.exp_avg_sq_scales + t.block.scale) = now2.scale;
  }
}

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
    args.pulls[index] = selective_pull(total, args.options(*args.options_index(index - args.first_entry))->options);
    args.tickets[1 + index] = 0;
    if (e.step) *e.step += 1.0f;
  }
}

template <typename T, bool kSelective>
__global__ void __launch_bounds__(kThreads, 3) adamw_generic(const __grid_constant__ Args args) {
  const uint32_t chunk = chunk_of_block(args);
  const uint32_t index = args.chunk_entry[chunk];
  __shared__ Shared<T> shared;
  const bool goes_on = begin_step(args, chunk, index, shared);
  const DeviceEntry& e = shared.entry;
  if (!goes_on) {
    if (kSelective && threadIdx.x == 0 && chunk == e.first_chunk) args.pulls[index] = 0.0;
    return;
  }
  const bool has_low = sizeof(T) == sizeof(float) && e.low_width != 0;
  if (has_low)
    check_units(
        shared, [&](const Unit& unit) { return terms(shared, unit); },
        [&](const Unit& unit) {  // what a thread clears, it reads itself
          for_each_element(shared, unit, [&](int64_t offset, uint32_t) {
            if (e.low_width == 16)
              low_of<uint16_t>(e, offset) = 0;
            else
              low_of<uint8_t>(e, offset) = 0;
          });
        });
  SelectiveSums sums = {};
  for (uint32_t number = threadIdx.x / kWarp, n = tiles(shared); number < n; number += kWarps)
    step_tile<T, kSelective>(shared, tile(shared, number), sums);
  if (has_low) remember_units(shared);
  if constexpr (kSelective)
    finish_sums(args, chunk, index, e, sums);
  else
    count_step(args, index, e);
}

// Moves stepped tensors to their anchor, as far as the step found that they must go.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) selective_project(const __grid_constant__ Args args) {
  const uint32_t chunk = args.first_chunk + blockIdx.x;
  const uint32_t index = args.chunk_entry[chunk];
  if (args.pulls[index] == 0.0) return;
  const T pull = static_cast<T>(args.pulls[index]);
  __shared__ Shared<T> shared;
  begin_step(args, chunk, index, shared);
  const DeviceEntry& e = shared.entry;
  // The step that found the pull has counted itself already, where the device counts.
  const uint32_t t = e.step ? shared.t - 1 : shared.t;
  for (uint32_t number = threadIdx.x / kWarp, n = tiles(shared); number < n; number += kWarps) {
    const Tile at = tile(shared, number);
#pragma unroll 1
    for (uint32_t k = 0; k < kLanes; ++k) {
      asm volatile("" ::: "memory");  // as in step_tile
      int64_t offset;
      if (!at.find_live(shared, k, &offset)) continue;
      const T a = read_one<T>(e.anchor, e.anchor_dtype, offset);
      write_weight(e, t, 1, offset, selective_element(read_weight<T>(e, offset), a, pull));
    }
  }
  if (sizeof(T) == sizeof(float) && e.low_width != 0) remember_units(shared);
}

}  // namespace

const Kernel kSumOfSquares = grad_sum_of_squares;

const GenericKernels kGeneric[2] = {
    {adamw_generic<float, false>, adamw_generic<float, true>, selective_project<float>},
    {adamw_generic<double, false>, adamw_generic<double, true>, selective_project<double>},
};

}  // namespace fastft::cuda
