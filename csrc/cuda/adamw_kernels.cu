// The kernels of the CUDA step: a block takes one chunk of one tensor, found through a map that lies on the device.
#include "adamw_kernels.cuh"

namespace fastft::cuda {
namespace {

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

// Shared by all threads of a block.
template <typename T>
struct Shared {
  DeviceEntry entry;
  const void* grad;
  AdamWScalars<T> scalars;
  T grad_factor;
  bool skip;
};

// For tensors anchored as kMost says: selectively; or by pulling, no more elaborately than that, or not at all.
template <typename Param, typename State, AnchorForm kMost>
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
    constexpr bool kSelective = kMost == AnchorForm::selective;
    const bool anchored = e.anchor != nullptr;
    const bool weighted = kMost == AnchorForm::weighted && e.importance != nullptr;
    const AnchorForm form = kSelective ? AnchorForm::selective
                            : weighted ? AnchorForm::weighted
                            : anchored ? AnchorForm::plain
                                       : AnchorForm::none;
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
          adamw_element(pi, g[j], mi, vi, xi, anchored ? a[j] : T(0), weighted ? f[j] : T(0), form, amsgrad,
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
  const StepOptions& step = *args.options(*args.options_index(index - args.first_entry));
  AdamWOptions options = step.options;
  if (step.lr) options.lr = read_scalar(step.lr, step.lr_dtype);
  double bias1 = step.bias1, bias2 = step.bias2;
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
template <typename Param, AnchorForm kMost>
constexpr int kBlocks = 3;
#else
template <typename Param, AnchorForm kMost>
constexpr int kBlocks =
    kMost == AnchorForm::selective || (kMost == AnchorForm::weighted && sizeof(Param) == sizeof(double)) ? 3 : 4;
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
    args.pulls[index] = selective_pull(total, args.options(*args.options_index(index - args.first_entry))->options);
    args.tickets[1 + index] = 0;
    if (e.step) *e.step += 1.0f;
  }
}

template <typename Param, typename State, AnchorForm kMost>
__global__ void __launch_bounds__(kThreads, kBlocks<Param, kMost>) adamw_step(const __grid_constant__ Args args) {
  using T = compute_t<Param>;
  const uint32_t chunk = args.first_chunk + blockIdx.x;
  const uint32_t index = args.chunk_entry[chunk];

  __shared__ Shared<T> shared;
  if (threadIdx.x == 0) prepare(args, index, &shared);
  __syncthreads();
  const DeviceEntry& e = shared.entry;
  if (shared.skip) {
    if (kMost == AnchorForm::selective && threadIdx.x == 0 && chunk == e.first_chunk) args.pulls[index] = 0.0;
    return;
  }

  constexpr int kVector = 16 / sizeof(Param);
  const int64_t begin = static_cast<int64_t>(chunk - e.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < e.live_numel ? begin + kChunk : e.live_numel;
  Update<Param, State, kMost> work{shared, {}};
  for_each_live<kVector>(e, begin, end, work);
  if constexpr (kMost == AnchorForm::selective) return finish_sums(args, chunk, index, e, work.sums);

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

template <typename Param, typename State>
constexpr Kernel kSteps[] = {
    adamw_step<Param, State, AnchorForm::plain>,
    adamw_step<Param, State, AnchorForm::weighted>,
    adamw_step<Param, State, AnchorForm::selective>,
};

const AdamWKernels kCombinations[] = {
    {DType::f32, DType::f32, kSteps<float, float>, selective_project<float>, "adamw_step<float, float>"},
    {DType::bf16, DType::bf16, kSteps<bfloat16, bfloat16>, selective_project<bfloat16>,
     "adamw_step<bfloat16, bfloat16>"},
    {DType::bf16, DType::f32, kSteps<bfloat16, float>, selective_project<bfloat16>, "adamw_step<bfloat16, float>"},
    {DType::f16, DType::f16, kSteps<float16, float16>, selective_project<float16>, "adamw_step<float16, float16>"},
    {DType::f16, DType::f32, kSteps<float16, float>, selective_project<float16>, "adamw_step<float16, float>"},
    {DType::f64, DType::f64, kSteps<double, double>, selective_project<double>, "adamw_step<double, double>"},
};

}  // namespace

const Kernel kSumOfSquares = grad_sum_of_squares;

const AdamWKernels& kernels_for(DType param, DType state) {
  for (const AdamWKernels& k : kCombinations)
    if (k.param == param && k.state == state) return k;
  throw std::runtime_error(std::string("no kernel for parameters of ") + name(param) + " with state of " + name(state));
}

}  // namespace fastft::cuda
