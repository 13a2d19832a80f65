// Dropout on CUDA: alone, with bias and residual (a thread takes 16 bytes), with a norm behind it (a warp takes a row),
// and the sums over rows that their gradients need (a block takes a tile of columns and a part of the rows).
#include <algorithm>

#include "../math/dropout.h"
#include "../math/norm.h"
#include "dropout.h"
#include "launch.cuh"

namespace fastft::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMostParts = 64;

// Elements that a thread takes at a time: 16 bytes, and whole groups of four, which share one call of the generator.
template <typename Stored>
constexpr int kTake = sizeof(Stored) == 2 ? 8 : 4;

// How many blocks a multiprocessor has registers for, with no value moved to memory. (One fewer for
// dropout_add_norm_backward in 16 bits.)
template <typename Stored>
constexpr int kBlocks = sizeof(Stored) == 8 ? 2 : 4;

// A call, and what all its elements share.
template <typename Call, typename T>
struct Args {
  Call call;
  DropoutScalars<T> scalars;
  bool wide;      // every tensor, and every row of it, is 16-byte aligned
  int64_t parts;  // row sums: into how many parts the rows are cut
  void* partial;  // row sums: [sum][part][column]

  __device__ __forceinline__ DropoutScalars<T> random() const {
    DropoutScalars<T> s = scalars;
    if (call.random.state) {
      s.seed = static_cast<uint64_t>(call.random.state[0]);
      s.block = static_cast<uint64_t>(call.random.state[1]) / 4;
    }
    return s;
  }
};

// keep[j]: whether element i + j is kept.
template <int N, typename T>
__device__ __forceinline__ void keeps(const DropoutScalars<T>& s, int64_t i, bool (&keep)[N]) {
  if (s.all) {
#pragma unroll
    for (int j = 0; j < N; ++j) keep[j] = true;
    return;
  }
  const uint64_t group = static_cast<uint64_t>(i) / 4;
  const int shift = static_cast<int>(i % 4);
  if (shift == 0) {
#pragma unroll
    for (int g = 0; g < N / 4; ++g) {
      const PhiloxWords w = dropout_words(s, group + g);
#pragma unroll
      for (int j = 0; j < 4; ++j) keep[4 * g + j] = dropout_keeps(s, w.at[j]);
    }
    return;
  }
  // Rows of odd sizes: the elements lie across one more group.
  uint32_t kept = 0;
  for (int g = 0; g <= N / 4; ++g) {
    const PhiloxWords w = dropout_words(s, group + g);
#pragma unroll
    for (int j = 0; j < 4; ++j) kept |= static_cast<uint32_t>(dropout_keeps(s, w.at[j])) << (4 * g + j);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) keep[j] = kept >> (shift + j) & 1u;
}

// Elements [i, i + count) of N: at once if wide and whole, else one by one; what is not there becomes 0.
template <int N, typename T>
__device__ __forceinline__ void read_some(const void* data, DType dtype, int64_t i, int64_t count, bool wide,
                                          T (&out)[N]) {
  if (wide && count >= N) return read_any(data, dtype, i, out);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    T one[1] = {T(0)};
    if (j < count) read_any(data, dtype, i + j, one);
    out[j] = one[0];
  }
}

template <typename Stored, int N, typename T>
__device__ __forceinline__ void write_some(void* data, int64_t i, int64_t count, bool wide, const T (&values)[N]) {
  Stored stored[N];
#pragma unroll
  for (int j = 0; j < N; ++j) narrow(values[j], &stored[j]);
  if (wide && count >= N) return write(data, i, stored);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Stored one[1] = {stored[j]};
    if (j < count) write(data, i + j, one);
  }
}

// The same for a dtype known only at run time.
template <int N>
__device__ __forceinline__ void write_some_any(void* data, DType dtype, int64_t i, int64_t count, bool wide,
                                               const float (&values)[N]) {
  if (dtype == DType::bf16) return write_some<bfloat16>(data, i, count, wide, values);
  if (dtype == DType::f16) return write_some<float16>(data, i, count, wide, values);
  write_some<float>(data, i, count, wide, values);
}

template <int N>
__device__ __forceinline__ void write_some_any(void* data, DType, int64_t i, int64_t count, bool wide,
                                               const double (&values)[N]) {
  write_some<double>(data, i, count, wide, values);
}

template <typename Stored>
__global__ void __launch_bounds__(kThreads)
    bias_dropout_add_kernel(const __grid_constant__ Args<BiasDropoutAdd, compute_t<Stored>> args) {
  using T = compute_t<Stored>;
  constexpr int N = kTake<Stored>;
  const BiasDropoutAdd& call = args.call;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  const int64_t count = call.numel - i;
  if (count <= 0) return;
  const DropoutScalars<T> s = args.random();
  T x[N], other[N];
  bool keep[N];
  read_some(call.x, call.x_dtype, i, count, args.wide, x);
  if (call.bias) {
    int64_t column = i % call.columns;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < count) {
        T bias[1];
        read_any(call.bias, call.bias_dtype, column, bias);
        x[j] += bias[0];
      }
      column = column + 1 == call.columns ? 0 : column + 1;
    }
  }
  if (call.minus) {
    read_some(call.minus, call.residual_dtype, i, count, args.wide, other);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] -= other[j];
  }
  keeps(s, i, keep);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = dropout_element(x[j], keep[j], s.scale);
  if (call.residual) {
    read_some(call.residual, call.residual_dtype, i, count, args.wide, other);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = other[j] + x[j];
  }
  write_some<Stored>(call.y, i, count, args.wide, x);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// work(first column, how many) over a row's columns that are this lane's.
template <int N, typename Work>
__device__ __forceinline__ void for_lane(int64_t columns, const Work& work) {
  for (int64_t c = static_cast<int64_t>(threadIdx.x % kWarp) * N; c < columns; c += kWarp * N) work(c, columns - c);
}

// A lane reads again what it has written itself, so nothing needs to be waited for.
template <typename Stored>
__global__ void __launch_bounds__(kThreads, kBlocks<Stored>)
    dropout_add_norm_kernel(const __grid_constant__ Args<DropoutAddNorm, compute_t<Stored>> args) {
  using T = compute_t<Stored>;
  constexpr int N = kTake<Stored>;
  const DropoutAddNorm& call = args.call;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= call.rows) return;  // a whole warp
  const int64_t start = row * call.columns;
  const DropoutScalars<T> s = args.random();
  const T n = static_cast<T>(call.columns);

  T total = T(0);
  for_lane<N>(call.columns, [&](int64_t c, int64_t count) {
    T x[N], residual[N];
    bool keep[N];
    read_some(call.x, call.x_dtype, start + c, count, args.wide, x);
    read_some(call.residual, call.residual_dtype, start + c, count, args.wide, residual);
    keeps(s, start + c, keep);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Stored rounded;  // the statistics are those of the sum as it is stored
      narrow(residual[j] + dropout_element(x[j], keep[j], s.scale), &rounded);
      x[j] = widen(rounded);
      if (j < count) total += x[j];
    }
    write_some<Stored>(call.sum, start + c, count, args.wide, x);
  });
  const T mean = call.mean ? warp_sum(total) / n : T(0);

  T squares = T(0);
  for_lane<N>(call.columns, [&](int64_t c, int64_t count) {
    T x[N];
    read_some(call.sum, call.dtype, start + c, count, args.wide, x);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) squares += (x[j] - mean) * (x[j] - mean);
  });
  const T rstd = norm_rstd(warp_sum(squares), n, static_cast<T>(call.eps));
  if (threadIdx.x % kWarp == 0) {
    if (call.mean) static_cast<T*>(call.mean)[row] = mean;
    static_cast<T*>(call.rstd)[row] = rstd;
  }

  for_lane<N>(call.columns, [&](int64_t c, int64_t count) {
    T x[N], weight[N], bias[N];
    read_some(call.sum, call.dtype, start + c, count, args.wide, x);
    if (call.weight) read_some(call.weight, call.weight_dtype, c, count, args.wide, weight);
    if (call.bias) read_some(call.bias, call.weight_dtype, c, count, args.wide, bias);
#pragma unroll
    for (int j = 0; j < N; ++j)
      x[j] = norm_element(x[j], mean, rstd, call.weight ? weight[j] : T(1), call.bias ? bias[j] : T(0));
    write_some<Stored>(call.y, start + c, count, args.wide, x);
  });
}

template <typename Stored>
__global__ void __launch_bounds__(kThreads, kBlocks<Stored> - (sizeof(Stored) == 2))
    dropout_add_norm_backward_kernel(const __grid_constant__ Args<DropoutAddNormBackward, compute_t<Stored>> args) {
  using T = compute_t<Stored>;
  constexpr int N = kTake<Stored>;
  const DropoutAddNormBackward& call = args.call;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= call.rows) return;  // a whole warp
  const int64_t start = row * call.columns;
  const DropoutScalars<T> s = args.random();
  const T mean = call.mean ? static_cast<const T*>(call.mean)[row] : T(0);
  const T rstd = static_cast<const T*>(call.rstd)[row];

  // g = dy·weight and h of this lane's columns.
  const auto read_gh = [&](int64_t c, int64_t count, T(&g)[N], T(&h)[N]) {
    read_some(call.dy, call.dtype, start + c, count, args.wide, g);
    read_some(call.sum, call.dtype, start + c, count, args.wide, h);
    T weight[N];
    if (call.weight) read_some(call.weight, call.weight_dtype, c, count, args.wide, weight);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      h[j] = norm_hat(h[j], mean, rstd);
      if (call.weight) g[j] *= weight[j];
    }
  };

  T sum_g = T(0), sum_gh = T(0);
  for_lane<N>(call.columns, [&](int64_t c, int64_t count) {
    T g[N], h[N];
    read_gh(c, count, g, h);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum_g += g[j];  // beyond the row's end g is 0
      sum_gh += g[j] * h[j];
    }
  });
  const T n = static_cast<T>(call.columns);
  const T mean_g = call.mean ? warp_sum(sum_g) / n : T(0);
  const T mean_gh = warp_sum(sum_gh) / n;

  for_lane<N>(call.columns, [&](int64_t c, int64_t count) {
    T g[N], h[N], dsum[N];
    bool keep[N];
    read_gh(c, count, g, h);
    if (call.dsum) read_some(call.dsum, call.dtype, start + c, count, args.wide, dsum);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[j] = norm_backward(g[j], h[j], mean_g, mean_gh, rstd);
      if (call.dsum) g[j] += dsum[j];
    }
    write_some_any(call.dresidual, call.residual_dtype, start + c, count, args.wide, g);
    keeps(s, start + c, keep);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = dropout_element(g[j], keep[j], s.scale);
    write_some_any(call.dx, call.x_dtype, start + c, count, args.wide, g);
  });
}

// Sums over rows: lanes take four columns each, warps every eighth row of a part of the rows.
constexpr int kTile = kWarp * 4;

int64_t tiles_of(int64_t columns) {
  return (columns + kTile - 1) / kTile;
}

int64_t parts_of(int64_t rows) {
  return std::clamp<int64_t>(rows / (4 * kWarps), 1, kMostParts);
}

// Calls row_work(row, column, count, sums) over this thread's rows, then adds the warps' sums up in order.
template <int kSums, typename T, typename RowWork>
__device__ __forceinline__ void sum_rows(int64_t rows, int64_t columns, int64_t parts, T* partial,
                                         const RowWork& row_work) {
  const int64_t tiles = (columns + kTile - 1) / kTile;
  const int64_t part = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = first + lane * 4, count = columns - column;
  T sums[kSums][4] = {};
  if (count > 0)
    for (int64_t row = rows * part / parts + warp; row < rows * (part + 1) / parts; row += kWarps)
      row_work(row, column, count, sums);
  __shared__ T shared[kWarps][kTile];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j) shared[warp][lane * 4 + j] = sums[k][j];
    __syncthreads();
    if (threadIdx.x < kTile && first + threadIdx.x < columns) {
      T total = T(0);
      for (int w = 0; w < kWarps; ++w) total += shared[w][threadIdx.x];
      partial[(k * parts + part) * columns + first + threadIdx.x] = total;
    }
  }
}

template <typename Stored>
__global__ void __launch_bounds__(kThreads, kBlocks<Stored>)
    bias_dropout_add_backward_kernel(const __grid_constant__ Args<BiasDropoutAddBackward, compute_t<Stored>> args) {
  using T = compute_t<Stored>;
  const BiasDropoutAddBackward& call = args.call;
  const DropoutScalars<T> s = args.random();
  sum_rows<1>(call.rows, call.columns, args.parts, static_cast<T*>(args.partial),
              [&](int64_t row, int64_t column, int64_t count, T(&sums)[1][4]) {
                const int64_t i = row * call.columns + column;
                T g[4];
                bool keep[4];
                read_some(call.dy, call.dtype, i, count, args.wide, g);
                keeps(s, i, keep);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  g[j] = dropout_element(g[j], keep[j], s.scale);
                  sums[0][j] += g[j];
                }
                write_some_any(call.dx, call.x_dtype, i, count, args.wide, g);
              });
}

template <typename Stored>
__global__ void __launch_bounds__(kThreads, kBlocks<Stored>) dropout_add_norm_weight_backward_kernel(
    const __grid_constant__ Args<DropoutAddNormBackward, compute_t<Stored>> args) {
  using T = compute_t<Stored>;
  const DropoutAddNormBackward& call = args.call;
  sum_rows<2>(call.rows, call.columns, args.parts, static_cast<T*>(args.partial),
              [&](int64_t row, int64_t column, int64_t count, T(&sums)[2][4]) {
                const int64_t i = row * call.columns + column;
                const T mean = call.mean ? static_cast<const T*>(call.mean)[row] : T(0);
                const T rstd = static_cast<const T*>(call.rstd)[row];
                T g[4], x[4];
                read_some(call.dy, call.dtype, i, count, args.wide, g);
                read_some(call.sum, call.dtype, i, count, args.wide, x);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  sums[0][j] += g[j] * norm_hat(x[j], mean, rstd);
                  sums[1][j] += g[j];
                }
              });
}

// out[c] = Σ_part partial[part][c], in order.
template <typename T>
struct PartSums {
  const T* partial;
  int64_t parts, columns;
  void* out;
  DType dtype;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) part_sums_kernel(const __grid_constant__ PartSums<T> args) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= args.columns) return;
  T total = T(0);
  for (int64_t p = 0; p < args.parts; ++p) total += args.partial[p * args.columns + c];
  const T values[1] = {total};
  write_some_any(args.out, args.dtype, c, 1, false, values);
}

bool aligned(std::initializer_list<const void*> arrays) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [](const void* a) { return reinterpret_cast<uintptr_t>(a) % 16 == 0; });
}

uint32_t blocks_of(int64_t items, int64_t per_block) {
  return static_cast<uint32_t>((items + per_block - 1) / per_block);
}

template <typename T, typename Call>
Args<Call, T> args_of(const Call& call, bool wide) {
  Args<Call, T> args = {};
  args.call = call;
  args.scalars = dropout_scalars<T>(call.random.p, call.random.seed, call.random.offset);
  args.wide = wide;
  return args;
}

// run(Stored()) with the type that a dtype stands for.
template <typename Run>
void by_dtype(DType dtype, const Run& run) {
  if (dtype == DType::f64) return run(double());
  if (dtype == DType::bf16) return run(bfloat16());
  if (dtype == DType::f16) return run(float16());
  run(float());
}

template <typename T>
void launch_part_sums(const T* partial, int64_t parts, int64_t columns, void* out, DType dtype, void* stream) {
  if (out == nullptr) return;
  PartSums<T> sums = {partial, parts, columns, out, dtype};
  launch(part_sums_kernel<T>, "part_sums", blocks_of(columns, kThreads), stream, sums);
}

}  // namespace

int64_t row_sums_bytes(int64_t rows, int64_t columns, DType dtype, int64_t sums) {
  const int64_t width = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return sums * parts_of(rows) * columns * width;
}

void bias_dropout_add(const BiasDropoutAdd& call, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  const bool wide = aligned({call.x, call.minus, call.residual, call.y});
  by_dtype(call.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    auto args = args_of<compute_t<Stored>>(call, wide);
    launch(bias_dropout_add_kernel<Stored>, "bias_dropout_add", blocks_of(call.numel, kThreads * kTake<Stored>), stream,
           args);
  });
}

void bias_dropout_add_backward(const BiasDropoutAddBackward& call, void* workspace, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  const bool wide = aligned({call.dy, call.dx}) && call.columns % 8 == 0;
  by_dtype(call.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using T = compute_t<Stored>;
    auto args = args_of<T>(call, wide);
    args.parts = parts_of(call.rows);
    args.partial = workspace;
    launch(bias_dropout_add_backward_kernel<Stored>, "bias_dropout_add_backward",
           static_cast<uint32_t>(tiles_of(call.columns) * args.parts), stream, args);
    launch_part_sums(static_cast<const T*>(workspace), args.parts, call.columns, call.dbias, call.bias_dtype, stream);
  });
}

void dropout_add_norm(const DropoutAddNorm& call, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  const bool wide = aligned({call.x, call.residual, call.y, call.sum, call.weight, call.bias}) && call.columns % 8 == 0;
  by_dtype(call.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    auto args = args_of<compute_t<Stored>>(call, wide);
    launch(dropout_add_norm_kernel<Stored>, "dropout_add_norm", blocks_of(call.rows, kWarps), stream, args);
  });
}

void dropout_add_norm_backward(const DropoutAddNormBackward& call, void* workspace, int32_t device, void* stream) {
  const DeviceGuard guard(device);
  const bool wide =
      aligned({call.dy, call.dsum, call.sum, call.weight, call.dx, call.dresidual}) && call.columns % 8 == 0;
  by_dtype(call.dtype, [&](auto stored) {
    using Stored = decltype(stored);
    using T = compute_t<Stored>;
    auto args = args_of<T>(call, wide);
    if (call.rows > 0)
      launch(dropout_add_norm_backward_kernel<Stored>, "dropout_add_norm_backward", blocks_of(call.rows, kWarps),
             stream, args);
    if (call.dweight == nullptr && call.dbias == nullptr) return;
    args.parts = parts_of(call.rows);
    args.partial = workspace;
    launch(dropout_add_norm_weight_backward_kernel<Stored>, "dropout_add_norm_weight_backward",
           static_cast<uint32_t>(tiles_of(call.columns) * args.parts), stream, args);
    const T* sums = static_cast<const T*>(workspace);
    launch_part_sums(sums, args.parts, call.columns, call.dweight, call.weight_dtype, stream);
    launch_part_sums(sums + args.parts * call.columns, args.parts, call.columns, call.dbias, call.weight_dtype, stream);
  });
}

}  // namespace fastft::cuda
