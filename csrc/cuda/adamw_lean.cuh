// The lean kernels of the CUDA step: one for each kind of weight and of moments, without and with masks. A block takes
// one chunk of one tensor, a thread 16 bytes of its widest array at a time. Run-time options are few: an anchor, and
// live rows.
#pragma once

#include "adamw_device.cuh"

namespace fastft::cuda {
namespace {

// How a weight is kept: its dtype, its low bits (an unsigned integer, or void), whether it is rounded stochastically.
template <typename StoredType, typename LowType = void, bool kRandom = false>
struct Weight {
  using Stored = StoredType;
  using Low = LowType;
  static constexpr bool kStochastic = kRandom;
  static constexpr int kLowBits = std::is_same_v<Low, uint16_t> ? 16 : std::is_same_v<Low, uint8_t> ? 8 : 0;
  // Anchors are kept as the weight is, or as this.
  using OtherAnchor = std::conditional_t<std::is_same_v<Stored, float>, bfloat16, float>;
};

// Moments in 8 bits, in blocks that a warp takes whole: eight elements a thread.
struct Codes {};

template <typename W, typename M>
constexpr bool kInBlocks = std::is_same_v<M, Codes>;

// A thread's elements are kRuns runs of kRun, each of consecutive elements, which lie kWarp * kRun apart: so that a
// warp's accesses leave no gaps. Those that share random bits lie together.
template <typename W, typename M>
constexpr int kWidest = sizeof(M) > sizeof(typename W::Stored) ? sizeof(M) : sizeof(typename W::Stored);
template <typename W, typename M>
constexpr int kRun = W::kStochastic ? static_cast<int>(kPerPhilox) : 16 / (kWidest<W, M> < 2 ? 2 : kWidest<W, M>);
template <typename W, typename M>
constexpr int kRuns = kInBlocks<W, M> ? kBlock8 / (kWarp * kRun<W, M>) : 1;

// The dtype of low bits; where a kind of weight has none, one that nothing is read into.
template <typename W>
using LowOf = std::conditional_t<W::kLowBits == 0, uint8_t, typename W::Low>;

// The numbers of a step that every element takes; in registers.
struct Numbers {
  AdamWScalars<float> scalars;
  float grad_factor;
  bool anchored;
};

__device__ __forceinline__ Numbers numbers_of(const Shared<float>& shared) {
  return {shared.scalars, shared.grad_factor, shared.entry.anchor != nullptr};
}

// N consecutive elements of one tensor: what is read of them, and written back.
template <typename W, int N, bool kMasked>
struct Weights {
  typename W::Stored p[N];
  LowOf<W> low[N];
  typename W::Stored g[N];
  static constexpr int kPart = N < 4 ? N : 4;
  float a[kPart];  // widened, so only for some of them at a time
  uint8_t live[N];
  PhiloxWords random;
  uint32_t random_one;  // in place of `random`, for one element

  __device__ __forceinline__ void load(const Shared<float>& shared, int64_t offset) {
    const DeviceEntry& e = shared.entry;
    read(e.param, offset, p);
    if constexpr (W::kLowBits != 0) read(e.low_bits, offset, low);
    if constexpr (kMasked) read(e.mask, offset, live);
    if (reinterpret_cast<uintptr_t>(shared.grad) % 16 == 0) {
      read(shared.grad, offset, g);
    } else {  // gradients in buckets may lie anywhere
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = global(static_cast<const typename W::Stored*>(shared.grad))[offset + i];
    }
    if constexpr (W::kStochastic) {
      if constexpr (N == kPerPhilox)
        random = rounding_words(e.rounding_key, shared.t, 0, index_of(e, offset) / kPerPhilox);
      else
        random_one = random_of(e, shared.t, 0, offset);
    }
  }

  // Must be called for each element in turn.
  __device__ __forceinline__ void load_anchor(int i, const DeviceEntry& e, const Numbers& numbers, int64_t offset) {
    if (i % kPart != 0 || !numbers.anchored) return;
    if (e.anchor_dtype == e.dtype)
      read_widened<typename W::Stored>(e.anchor, offset + i, a);
    else
      read_widened<typename W::OtherAnchor>(e.anchor, offset + i, a);
  }

  __device__ __forceinline__ bool is_live(int i) const { return !kMasked || live[i] != 0; }

  __device__ __forceinline__ float get(int i) const {
    if constexpr (W::kLowBits != 0)
      return join(p[i], low[i]);
    else
      return widen(p[i]);
  }

  __device__ __forceinline__ void set(int i, float x) {
    uint32_t bits = 0;
    if constexpr (W::kStochastic) bits = N == kPerPhilox ? rounding_bits(random, i) : random_one;
    if constexpr (W::kLowBits == 16)
      split(x, &p[i], &low[i]);
    else if constexpr (W::kLowBits == 8)
      split(x, W::kStochastic ? rounding_byte(bits) : nearest_rounding(x), &p[i], &low[i]);
    else if constexpr (W::kStochastic)
      narrow_stochastic(x, bits, &p[i]);
    else
      narrow(x, &p[i]);
  }

  // The step of element i, if it is live, with moments m and v.
  __device__ __forceinline__ void step(int i, float& m, float& v, const Numbers& numbers) {
    float x = get(i), unused = 0.0f;
    adamw_element(x, widen(g[i]), m, v, unused, numbers.anchored ? a[i % kPart] : 0.0f, 0.0f,
                  numbers.anchored ? AnchorForm::plain : AnchorForm::none, false, numbers.grad_factor, numbers.scalars);
    set(i, x);
  }

  // What they add to the sum of their unit, where there is one.
  __device__ __forceinline__ uint32_t terms(uint32_t position) const {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if constexpr (W::kLowBits != 0) sum += term_at(p[i], position + i);
    return sum;
  }

  __device__ __forceinline__ void store(const DeviceEntry& e, int64_t offset) const {
    write(e.param, offset, p);
    if constexpr (W::kLowBits != 0) write(e.low_bits, offset, low);
  }
};

// Σ weight_term() over N elements.
template <int N>
__device__ __forceinline__ uint32_t terms(const DeviceEntry& e, int64_t offset, uint32_t position) {
  bfloat16 p[N];
  read(e.param, offset, p);
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += term_at(p[i], position + i);
  return sum;
}

// N elements with moments of their own.
template <typename W, typename M, bool kMasked, int N>
__device__ __forceinline__ void step_run(const Shared<float>& shared, const Numbers& numbers, int64_t offset,
                                         uint32_t position, uint32_t& sum) {
  const DeviceEntry& e = shared.entry;
  asm volatile("" ::: "memory");  // addresses stay in shared memory: held in registers they would not fit
  Weights<W, N, kMasked> w;
  M m[N], v[N];
  w.load(shared, offset);
  read(e.exp_avg, offset, m);
  read(e.exp_avg_sq, offset, v);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    w.load_anchor(i, e, numbers, offset);
    if (!w.is_live(i)) continue;  // its bits stay as they were read
    float mi = widen(m[i]), vi = widen(v[i]);
    w.step(i, mi, vi, numbers);
    narrow(mi, &m[i]);
    narrow(vi, &v[i]);
  }
  sum += w.terms(position);
  w.store(e, offset);
  write(e.exp_avg, offset, m);
  write(e.exp_avg_sq, offset, v);
}

// A warp's block of moments in 8 bits.
template <typename W, bool kMasked>
__device__ __forceinline__ void step_block(const Shared<float>& shared, const BlockPlace& block, uint32_t position,
                                           uint32_t& sum) {
  constexpr int N = kRun<W, Codes>, kCount = kRuns<W, Codes>;
  asm volatile("" ::: "memory");  // as in step_run, and so do the scalars
  const DeviceEntry& e = shared.entry;
  const Numbers numbers = numbers_of(shared);
  const int first = static_cast<int>(threadIdx.x % kWarp) * N;
  const float scale1 = *global(e.exp_avg_scales + block.scale), scale2 = *global(e.exp_avg_sq_scales + block.scale);
  float m[kCount][N], v[kCount][N];
  // As integers, in which absolute values have the same order and NaN is the largest; with a 1 behind, so that 0 is
  // what a block without live elements has.
  uint32_t most1 = 0, most2 = 0;
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    const int at = first + r * kWarp * N;
    if (at >= block.length) continue;
    const int64_t offset = block.offset + at;
    Weights<W, N, kMasked> w;
    uint8_t code1[N], code2[N];
    w.load(shared, offset);
    read(e.exp_avg, offset, code1);
    read(e.exp_avg_sq, offset, code2);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      w.load_anchor(i, e, numbers, offset);
      m[r][i] = decode_first(code1[i], scale1);
      v[r][i] = decode_second(code2[i], scale2);
      if (!kMasked || w.live[i]) w.step(i, m[r][i], v[r][i], numbers);
      v[r][i] = square_root(v[r][i]);
      const uint32_t live = !kMasked || w.live[i] ? 0xffffffffu : 0u;
      const uint32_t u1 = (float_bits(m[r][i]) << 1 | 1u) & live, u2 = float_bits(v[r][i]) & 0x7fffffffu & live;
      most1 = u1 > most1 ? u1 : most1;
      most2 = u2 > most2 ? u2 : most2;
    }
    sum += w.terms(position + at);
    w.store(e, offset);
  }
  asm volatile("" ::: "memory");  // nor are addresses held until here
  most1 = warp_max(most1);
  most2 = warp_max(most2);
  if (most1 == 0) return;
  const Scale8 now1 = scale8(bits_float(most1 >> 1), kTop1), now2 = scale8(bits_float(most2), kTop2);
  if (first == 0) {
    *global(e.exp_avg_scales + block.scale) = now1.scale;
    *global(e.exp_avg_sq_scales + block.scale) = now2.scale;
  }
#pragma unroll
  for (int r = 0; r < kCount; ++r) {
    const int at = first + r * kWarp * N;
    if (at >= block.length) continue;
    uint8_t code1[N], code2[N], live[N];
    if constexpr (kMasked) {  // read again, since holding them takes registers that others need
      read(e.exp_avg, block.offset + at, code1);
      read(e.exp_avg_sq, block.offset + at, code2);
      read(e.mask, block.offset + at, live);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (kMasked && live[i] == 0) continue;
      const uint32_t dither = dither8(shared.t, static_cast<uint32_t>(at + i));
      code1[i] = static_cast<uint8_t>(encode_first(m[r][i], now1.inverse, dither));
      code2[i] = static_cast<uint8_t>(encode_second(v[r][i], now2.inverse, dither));
    }
    write(e.exp_avg, block.offset + at, code1);
    write(e.exp_avg_sq, block.offset + at, code2);
  }
}

// work(offset, position, N) over some of a chunk's items, a run of N elements at a time; position: counted in the
// chunk.
template <typename W, typename M, typename Work>
__device__ __forceinline__ void for_each_run(const Shared<float>& shared, uint32_t first, uint32_t last,
                                             const Work& work) {
  constexpr uint32_t N = kRun<W, M>;
  using Whole = std::integral_constant<int, N>;
  if constexpr (kInBlocks<W, M>) {
    for (uint32_t b = first + threadIdx.x / kWarp; b < last; b += kWarps) {
      const BlockPlace block = shared.blocks.place(b);
#pragma unroll
      for (int r = 0; r < kRuns<W, M>; ++r) {
        const int at = static_cast<int>((threadIdx.x % kWarp + r * kWarp) * N);
        if (at < block.length) work(block.offset + at, b * kBlock8 + at, Whole());
      }
    }
  } else {
    const Chunk& chunk = shared.chunk;
    uint32_t i = first + threadIdx.x * N;
    for (; i + N <= last; i += kThreads * N) work(chunk.place(i), i, Whole());
    i = last / N * N + threadIdx.x;
    if (i < last) work(chunk.place(i), i, std::integral_constant<int, 1>());
  }
}

// Steps some of a chunk's items. Returns this thread's part of the sum of their weights.
template <typename W, typename M, bool kMasked>
__device__ __forceinline__ uint32_t step_items(const Shared<float>& shared, uint32_t first, uint32_t last) {
  uint32_t sum = 0;
  if constexpr (kInBlocks<W, M>) {
    for (uint32_t b = first + threadIdx.x / kWarp; b < last; b += kWarps)
      step_block<W, kMasked>(shared, shared.blocks.place(b), b * kBlock8, sum);
  } else {
    const Numbers numbers = numbers_of(shared);
    for_each_run<W, M>(shared, first, last, [&](int64_t offset, uint32_t position, auto n) {
      step_run<W, M, kMasked, decltype(n)::value>(shared, numbers, offset, position, sum);
    });
  }
  return sum;
}

// Blocks to a multiprocessor: four hold a thread to 64 registers. Moments in 8 bits are held until the block's scale is
// known, random bits until they are used: three, or even two, still keep about as many loads in flight as memory can
// serve. On Blackwell ptxas takes a few registers more for everything.
template <typename W, typename M>
constexpr bool kHoldsMost = kInBlocks<W, M> && W::kStochastic;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename W, typename M>
constexpr int kLeanBlocks = kHoldsMost<W, M> || (kInBlocks<W, M> && W::kLowBits == 16) ? 2 : 3;
#else
template <typename W, typename M>
constexpr int kLeanBlocks = kHoldsMost<W, M> && W::kLowBits != 0 ? 2
                            : kInBlocks<W, M> || W::kStochastic  ? 3
                                                                 : 4;
#endif

template <typename W, typename M, bool kMasked>
__global__ void __launch_bounds__(kThreads, kLeanBlocks<W, M>) adamw_lean(const __grid_constant__ Args args) {
  __shared__ Shared<float> shared;
  if (!begin_step(args, chunk_of_block(args), args.chunk_entry[chunk_of_block(args)], shared)) return;
  const DeviceEntry& e = shared.entry;
  if constexpr (W::kLowBits != 0) {
    const auto terms_of = [&](const Unit& unit) {
      uint32_t sum = 0;
      for_each_run<W, M>(shared, unit.first, unit.last, [&](int64_t offset, uint32_t position, auto n) {
        sum += terms<decltype(n)::value>(e, offset, position);
      });
      return sum;
    };
    check_units(shared, terms_of, [&](const Unit& unit) {  // what a thread clears, it reads itself
      for_each_run<W, M>(shared, unit.first, unit.last, [&](int64_t offset, uint32_t, auto n) {
        const LowOf<W> none[decltype(n)::value] = {};
        write(e.low_bits, offset, none);
      });
    });
    for_each_unit(shared, [&](const Unit& unit) {
      const uint32_t sum = step_items<W, M, kMasked>(shared, unit.first, unit.last);
      add_to_unit(&shared.after[unit.number], sum);
    });
    keep_sums(shared);
  } else {
    step_items<W, M, kMasked>(shared, 0, kInBlocks<W, M> ? shared.blocks.count : shared.chunk.count);
  }
  count_step(args, args.chunk_entry[chunk_of_block(args)], e);
}

}  // namespace
}  // namespace fastft::cuda
