// Compiled once per instruction set, FASTFT_KERNELS naming the result.
#include "dropout_kernels.h"

#include "../math/dropout.h"
#include "../math/norm.h"
#include "blocks.h"
#include "philox_groups.h"

namespace fastft::cpu {
namespace {

template <typename T>
inline DropoutScalars<T> scalars_of(const DropoutRandom& r) {
  return r.state ? dropout_scalars<T>(r.p, r.state[0], r.state[1]) : dropout_scalars<T>(r.p, r.seed, r.offset);
}

// The words of up to kBlock consecutive elements.
class Words {
 public:
  // A pointer to the words of elements [begin, begin + n), n <= kBlock.
  template <typename T>
  const uint32_t* fill(const DropoutScalars<T>& s, int64_t begin, int64_t n) {
    if (s.all) {
      for (int64_t i = 0; i < n; ++i) words_[i] = 0;  // 0 is kept
      return words_;
    }
    const int64_t first = begin / 4, groups = (begin + n - 1) / 4 - first + 1;
    philox_groups(s.seed, s.block, static_cast<uint64_t>(first), groups, words_);
    return words_ + begin % 4;
  }

 private:
  alignas(64) uint32_t words_[4 * (kBlock / 4 + 1 + kExtraGroups)];
};

// Prefetches elements [at, at + n), so that they arrive while the words are computed.
inline void prefetch(const void* data, DType dtype, int64_t at, int64_t n) {
  if (data == nullptr) return;
  const char* bytes = static_cast<const char*>(data) + at * item_size(dtype);
  for (int64_t i = 0; i < n * item_size(dtype); i += 64) __builtin_prefetch(bytes + i);
}

// y = dropout(x) (+ residual); x, y and residual may be one array.
template <typename T>
inline void drop(const DropoutScalars<T>& s, const uint32_t* words, const T* x, const T* residual, T* y, int64_t n) {
  const DropoutScalars<T> local = s;
  if (residual) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i)
      y[i] = residual[i] + dropout_element(x[i], dropout_keeps(local, words[i]), local.scale);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = dropout_element(x[i], dropout_keeps(local, words[i]), local.scale);
  }
}

template <typename T>
void bias_dropout_add_as(const BiasDropoutAdd& call, int64_t begin, int64_t end) {
  const DropoutScalars<T> s = scalars_of<T>(call.random);
  Words random;
  alignas(64) T x_[kBlock], b_[kBlock], m_[kBlock], r_[kBlock], y_[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = smaller(kBlock, end - at);
    prefetch(call.x, call.x_dtype, at, n);
    prefetch(call.residual, call.residual_dtype, at, n);
    const uint32_t* words = random.fill(s, at, n);
    const T* x = load(call.x, call.x_dtype, at, n, x_);
    if (call.bias) {
      for (int64_t i = 0; i < n;) {  // a row at a time
        const int64_t column = (at + i) % call.columns;
        const int64_t length = smaller(n - i, call.columns - column);
        const T* bias = load(call.bias, call.bias_dtype, column, length, b_ + i);
        for (int64_t j = 0; j < length; ++j) b_[i + j] = bias[j];
        i += length;
      }
      for (int64_t i = 0; i < n; ++i) x_[i] = x[i] + b_[i];
      x = x_;
    }
    if (const T* minus = load(call.minus, call.residual_dtype, at, n, m_)) {
      for (int64_t i = 0; i < n; ++i) x_[i] = x[i] - minus[i];
      x = x_;
    }
    const T* residual = load(call.residual, call.residual_dtype, at, n, r_);
    T* y = target(call.y, call.dtype, at, y_);
    drop(s, words, x, residual, y, n);
    store(y, call.y, call.dtype, at, n);
  }
}

template <typename T>
void bias_dropout_add_backward_as(const BiasDropoutAddBackward& call, int64_t begin, int64_t end, void* partial) {
  const DropoutScalars<T> s = scalars_of<T>(call.random);
  Words random;
  T* sums = static_cast<T*>(partial);
  for (int64_t c = 0; c < call.columns; ++c) sums[c] = T(0);
  alignas(64) T g_[kBlock], x_[kBlock];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < call.columns; column += kBlock) {
      const int64_t n = smaller(kBlock, call.columns - column), at = row * call.columns + column;
      prefetch(call.dy, call.dtype, at, n);
      const uint32_t* words = random.fill(s, at, n);
      const T* dy = load(call.dy, call.dtype, at, n, g_);
      T* dx = target(call.dx, call.x_dtype, at, x_);
      drop(s, words, dy, static_cast<const T*>(nullptr), dx, n);
      for (int64_t i = 0; i < n; ++i) sums[column + i] += dx[i];
      store(dx, call.dx, call.x_dtype, at, n);
    }
}

// Σ f(i) over [0, n) in independent lanes, so that the additions need not wait for each other.
template <typename T, typename F>
inline T lane_sum(int64_t n, const F& f) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += f(i + j);
  for (; i < n; ++i) sums[i % kLanes] += f(i);
  T total = T(0);
  for (T sum : sums) total += sum;
  return total;
}

// The weight as T, or `absent` in every column if there is none; in `buffer` where it is not stored as T.
template <typename T>
inline const T* load_or_fill(const void* weight, DType dtype, int64_t columns, T absent, T* buffer) {
  if (weight) return load(weight, dtype, 0, columns, buffer);
  for (int64_t c = 0; c < columns; ++c) buffer[c] = absent;
  return buffer;
}

template <typename T>
void dropout_add_norm_as(const DropoutAddNorm& call, int64_t begin, int64_t end, void* scratch) {
  const DropoutScalars<T> s = scalars_of<T>(call.random);
  const int64_t n = call.columns;
  T* const sum = static_cast<T*>(scratch);
  const T* weight = load_or_fill(call.weight, call.weight_dtype, n, T(1), sum + n);
  const T* bias = load_or_fill(call.bias, call.weight_dtype, n, T(0), sum + 2 * n);
  Words random;
  alignas(64) T x_[kBlock], r_[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * n;
    for (int64_t column = 0; column < n; column += kBlock) {
      const int64_t length = smaller(kBlock, n - column), at = start + column;
      prefetch(call.x, call.x_dtype, at, length);
      prefetch(call.residual, call.residual_dtype, at, length);
      const uint32_t* words = random.fill(s, at, length);
      const T* x = load(call.x, call.x_dtype, at, length, x_);
      const T* residual = load(call.residual, call.residual_dtype, at, length, r_);
      drop(s, words, x, residual, sum + column, length);
    }
    // The statistics are those of the sum as it is stored, which is what the backward pass will see.
    put(sum, call.sum, call.dtype, start, n);
    load_into(call.sum, call.dtype, start, n, sum);
    const T mean = call.mean ? lane_sum<T>(n, [&](int64_t i) { return sum[i]; }) / static_cast<T>(n) : T(0);
    const T squares = lane_sum<T>(n, [&](int64_t i) { return (sum[i] - mean) * (sum[i] - mean); });
    const T rstd = norm_rstd(squares, static_cast<T>(n), static_cast<T>(call.eps));
    if (call.mean) static_cast<T*>(call.mean)[row] = mean;
    static_cast<T*>(call.rstd)[row] = rstd;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) sum[i] = norm_element(sum[i], mean, rstd, weight[i], bias[i]);
    put(sum, call.y, call.dtype, start, n);
  }
}

template <typename T>
void dropout_add_norm_backward_as(const DropoutAddNormBackward& call, int64_t begin, int64_t end, void* partial,
                                  void* scratch) {
  const DropoutScalars<T> s = scalars_of<T>(call.random);
  const int64_t n = call.columns;
  T *const dweight = static_cast<T*>(partial), *const dbias = dweight + n;
  for (int64_t c = 0; c < 2 * n; ++c) dweight[c] = T(0);
  T *const h = static_cast<T*>(scratch), *const g = h + n;
  const T* weight = load_or_fill(call.weight, call.weight_dtype, n, T(1), h + 2 * n);
  Words random;
  alignas(64) T d_[kBlock], x_[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * n;
    const T mean = call.mean ? static_cast<const T*>(call.mean)[row] : T(0);
    const T rstd = static_cast<const T*>(call.rstd)[row];
    load_into(call.sum, call.dtype, start, n, h);
    load_into(call.dy, call.dtype, start, n, g);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      h[i] = norm_hat(h[i], mean, rstd);
      dweight[i] += g[i] * h[i];
      dbias[i] += g[i];
      g[i] *= weight[i];
    }
    const T mean_g = call.mean ? lane_sum<T>(n, [&](int64_t i) { return g[i]; }) / static_cast<T>(n) : T(0);
    const T mean_gh = lane_sum<T>(n, [&](int64_t i) { return g[i] * h[i]; }) / static_cast<T>(n);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) g[i] = norm_backward(g[i], h[i], mean_g, mean_gh, rstd);
    for (int64_t column = 0; column < n; column += kBlock) {
      const int64_t length = smaller(kBlock, n - column), at = start + column;
      T* ds = g + column;
      if (const T* dsum = load(call.dsum, call.dtype, at, length, d_))
        for (int64_t i = 0; i < length; ++i) ds[i] += dsum[i];
      put(ds, call.dresidual, call.residual_dtype, at, length);
      if (row + 1 < end) {
        prefetch(call.sum, call.dtype, at + n, length);
        prefetch(call.dy, call.dtype, at + n, length);
      }
      const uint32_t* words = random.fill(s, at, length);
      T* dx = target(call.dx, call.x_dtype, at, x_);
      drop(s, words, ds, static_cast<const T*>(nullptr), dx, length);
      store(dx, call.dx, call.x_dtype, at, length);
    }
  }
}

// function_as<float> or function_as<double>, by the dtype of the call.
#define FASTFT_BY_DTYPE(function, call, ...) \
  (call.dtype == DType::f64 ? function##_as<double>(call, __VA_ARGS__) : function##_as<float>(call, __VA_ARGS__))

void bias_dropout_add(const BiasDropoutAdd& call, int64_t begin, int64_t end) {
  FASTFT_BY_DTYPE(bias_dropout_add, call, begin, end);
}

void bias_dropout_add_backward(const BiasDropoutAddBackward& call, int64_t begin, int64_t end, void* partial) {
  FASTFT_BY_DTYPE(bias_dropout_add_backward, call, begin, end, partial);
}

void dropout_add_norm(const DropoutAddNorm& call, int64_t begin, int64_t end, void* scratch) {
  FASTFT_BY_DTYPE(dropout_add_norm, call, begin, end, scratch);
}

void dropout_add_norm_backward(const DropoutAddNormBackward& call, int64_t begin, int64_t end, void* partial,
                               void* scratch) {
  FASTFT_BY_DTYPE(dropout_add_norm_backward, call, begin, end, partial, scratch);
}

#undef FASTFT_BY_DTYPE

}  // namespace

extern const DropoutKernels FASTFT_KERNELS = {bias_dropout_add, bias_dropout_add_backward, dropout_add_norm,
                                              dropout_add_norm_backward};

}  // namespace fastft::cpu
