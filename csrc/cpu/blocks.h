// Arrays of any dtype, a block at a time in float or double. For the files that are compiled once per instruction set:
// all of it has internal linkage, so the linker can never hand one set's code to the other.
#pragma once

#include <string.h>

#include <cstdint>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../math/rounding.h"
#include "../tensor.h"

namespace fastft::cpu {
namespace {

// Elements that are widened at a time; seven float arrays of this length stay in the first-level cache.
constexpr int64_t kBlock = 512;

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename Stored, typename T>
inline void widen_all(const void* from, int64_t offset, int64_t n, T* to) {
  const Stored* source = static_cast<const Stored*>(from) + offset;
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(source[i]));
}

#if defined(__F16C__)
// float16 by the processor's own instructions; the same bits as math/rounding.h gives.
template <>
inline void widen_all<float16, float>(const void* from, int64_t offset, int64_t n, float* to) {
  const float16* source = static_cast<const float16*>(from) + offset;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  for (; i < n; ++i) to[i] = widen(source[i]);
}

inline void narrow_half(const float* from, int64_t n, float16* to) {
  // A NaN becomes the one that has all bits of the mantissa set, whatever it held.
  const __m256 all_but_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 x = _mm256_loadu_ps(from + i);
    const __m256 nan = _mm256_and_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), all_but_sign);
    const __m128i half = _mm256_cvtps_ph(_mm256_or_ps(x, nan), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < n; ++i) narrow(from[i], &to[i]);
}
#endif

template <typename T>
constexpr DType native = DType::f32;
template <>
constexpr DType native<double> = DType::f64;

// n elements from offset on as T: a pointer into data where they are stored as T, else widened into buffer.
template <typename T>
inline T* load(const void* data, DType dtype, int64_t offset, int64_t n, T* buffer) {
  if (data == nullptr) return nullptr;
  if (dtype == native<T>) return const_cast<T*>(static_cast<const T*>(data)) + offset;
  switch (dtype) {
    case DType::bf16:
      widen_all<bfloat16>(data, offset, n, buffer);
      break;
    case DType::f16:
      widen_all<float16>(data, offset, n, buffer);
      break;
    case DType::f32:
      widen_all<float>(data, offset, n, buffer);
      break;
    default:
      widen_all<double>(data, offset, n, buffer);
      break;
  }
  return buffer;
}

// to[i] = from[i] where live, for types of 8 and 16 bits.
template <typename Stored>
inline void copy_live(const Stored* from, Stored* to, int64_t n, const uint8_t* __restrict mask) {
  if (mask == nullptr) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(Stored));
    return;
  }
  using Bits = std::conditional_t<sizeof(Stored) == 1, uint8_t, uint16_t>;  // compilers vectorise it for these
  const Bits* __restrict source = reinterpret_cast<const Bits*>(from);
  Bits* __restrict target = reinterpret_cast<Bits*>(to);
  for (int64_t i = 0; i < n; ++i) target[i] = mask[i] ? source[i] : target[i];
}

template <typename Stored>
inline void narrow_all(const float* __restrict from, void* to, int64_t offset, int64_t n, const uint8_t* mask) {
  Stored* __restrict target = static_cast<Stored*>(to) + offset;
  if (mask) {
    Stored narrowed[kBlock];
    narrow_all<Stored>(from, narrowed, 0, n, nullptr);
    return copy_live(narrowed, target, n, mask);
  }
#if defined(__F16C__)
  if constexpr (std::is_same<Stored, float16>::value) return narrow_half(from, n, target);
#endif
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) narrow(from[i], &target[i]);
}

// Rounds values that load() widened back into data, except where the mask is 0; then at most kBlock of them. Does
// nothing where data holds T: there load() gave a pointer into it.
template <typename T>
inline void store(const T* values, void* data, DType dtype, int64_t offset, int64_t n, const uint8_t* mask = nullptr) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype == DType::bf16) narrow_all<bfloat16>(values, data, offset, n, mask);
    if (dtype == DType::f16) narrow_all<float16>(values, data, offset, n, mask);
  }
}

// Where to write results that store() then rounds into data: data itself where it holds T, else buffer.
template <typename T>
inline T* target(void* data, DType dtype, int64_t offset, T* buffer) {
  return dtype == native<T> ? static_cast<T*>(data) + offset : buffer;
}

// load and store that always copy, for callers that keep the values.
template <typename T>
inline void load_into(const void* data, DType dtype, int64_t offset, int64_t n, T* buffer) {
  const T* loaded = load(data, dtype, offset, n, buffer);
  if (loaded != buffer)
    for (int64_t i = 0; i < n; ++i) buffer[i] = loaded[i];
}

template <typename T>
inline void put(const T* values, void* data, DType dtype, int64_t offset, int64_t n) {
  T* place = target<T>(data, dtype, offset, nullptr);
  if (place)
    for (int64_t i = 0; i < n; ++i) place[i] = values[i];
  else
    store(values, data, dtype, offset, n);
}

}  // namespace
}  // namespace fastft::cpu
