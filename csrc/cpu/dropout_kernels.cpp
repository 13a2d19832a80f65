// Compiled once per instruction set, FASTFT_KERNELS naming the result.
#include "dropout_kernels.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/dropout.h"
#include "../math/norm.h"
#include "blocks.h"

namespace fastft::cpu {
namespace {

template <typename T>
inline DropoutScalars<T> scalars_of(const DropoutRandom& r) {
  return r.state ? dropout_scalars<T>(r.p, r.state[0], r.state[1]) : dropout_scalars<T>(r.p, r.seed, r.offset);
}

// The generator for many groups at a time: group first + j's words go to out[4j … 4j+3]. It may write up to
// kExtraGroups groups beyond `count`.
#if defined(__AVX2__)
// A 64-bit lane holds one 32-bit number in its lower half; the upper half is ignored, as the multiplication does.
// Several vectors at a time, since each has to wait for its own multiplications.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
constexpr Lanes kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7}, kFirstPairs = {0, 8, 1, 9, 2, 10, 3, 11},
                kLastPairs = {4, 12, 5, 13, 6, 14, 7, 15};
inline Lanes product(Lanes a, uint32_t b) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
#else
typedef uint64_t Lanes __attribute__((vector_size(32)));
constexpr Lanes kLaneNumbers = {0, 1, 2, 3}, kFirstPairs = {0, 4, 1, 5}, kLastPairs = {2, 6, 3, 7};
inline Lanes product(Lanes a, uint32_t b) {
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
#endif
constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t), kVectors = 4;
constexpr int64_t kExtraGroups = kLanes * kVectors - 1;

inline Lanes all_lanes(uint64_t x) {
  return Lanes{} + x;
}

inline void philox_groups(uint64_t seed, uint64_t block, uint64_t first, int64_t count, uint32_t* out) {
  for (int64_t j = 0; j < count; j += kLanes * kVectors, out += 4 * kLanes * kVectors) {
    Lanes a[kVectors], b[kVectors], c[kVectors], d[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      a[v] = all_lanes(block);
      b[v] = all_lanes(block >> 32);
      c[v] = all_lanes(first + j + v * kLanes) + kLaneNumbers;
      d[v] = c[v] >> 32;
    }
    PhiloxKey key = philox_key(seed);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round, philox_next(key)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {  // philox_round (math/philox.h)
        const Lanes product0 = product(a[v], kPhiloxFactor0), product1 = product(c[v], kPhiloxFactor1);
        a[v] = (product1 >> 32) ^ b[v] ^ all_lanes(key.at[0]);
        c[v] = (product0 >> 32) ^ d[v] ^ all_lanes(key.at[1]);
        b[v] = product1;
        d[v] = product0;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Lanes ab = (a[v] & 0xffffffffu) | b[v] << 32, cd = (c[v] & 0xffffffffu) | d[v] << 32;
      const Lanes words[2] = {__builtin_shuffle(ab, cd, kFirstPairs), __builtin_shuffle(ab, cd, kLastPairs)};
      memcpy(out + 4 * kLanes * v, words, sizeof words);
    }
  }
}
#else
constexpr int64_t kExtraGroups = 0;

inline void philox_groups(uint64_t seed, uint64_t block, uint64_t first, int64_t count, uint32_t* out) {
  // One array for each of the four words, and one round after the other: compilers vectorise these loops.
  alignas(64) uint32_t a[kBlock / 4 + 1], b[kBlock / 4 + 1], c[kBlock / 4 + 1], d[kBlock / 4 + 1];
  for (int64_t j = 0; j < count; ++j) {
    a[j] = static_cast<uint32_t>(block);
    b[j] = static_cast<uint32_t>(block >> 32);
    c[j] = static_cast<uint32_t>(first + j);
    d[j] = static_cast<uint32_t>((first + j) >> 32);
  }
  PhiloxKey key = philox_key(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, philox_next(key)) {
    for (int64_t j = 0; j < count; ++j) {
      PhiloxWords w = {{a[j], b[j], c[j], d[j]}};
      philox_round(w, key);
      a[j] = w.at[0];
      b[j] = w.at[1];
      c[j] = w.at[2];
      d[j] = w.at[3];
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    out[4 * j] = a[j];
    out[4 * j + 1] = b[j];
    out[4 * j + 2] = c[j];
    out[4 * j + 3] = d[j];
  }
}
#endif

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
