// Arrays of narrow types, a vector register's worth at a time. A loop over the lanes of such vectors is vectorised by
// the compiler and stays in registers; over arrays of 8, 16 and 32 bits at once it would take vectors of the narrowest
// type and spill the wide ones. For the files that are compiled once per instruction set: all of it has internal
// linkage.
#pragma once

#include <string.h>

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/rounding.h"

namespace fastft::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLaneCount = 16;
#elif defined(__AVX2__)
constexpr int kLaneCount = 8;
#else
constexpr int kLaneCount = 4;
#endif

typedef float FloatLanes __attribute__((vector_size(4 * kLaneCount)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kLaneCount)));
typedef int32_t SignedLanes __attribute__((vector_size(4 * kLaneCount)));

constexpr int kDoubleCount = kLaneCount / 2;
typedef double DoubleLanes __attribute__((vector_size(8 * kDoubleCount)));

#if defined(__AVX512F__)
constexpr WordLanes kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr WordLanes kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr WordLanes kLaneNumbers = {0, 1, 2, 3};
#endif

template <typename Vector, typename Stored>
inline Vector copy_lanes(const Stored* from) {
  Vector lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline FloatLanes load_lanes(const float* from) {
  return copy_lanes<FloatLanes>(from);
}
inline WordLanes load_lanes(const uint32_t* from) {
  return copy_lanes<WordLanes>(from);
}
inline void store_lanes(FloatLanes lanes, float* to) {
  memcpy(to, &lanes, sizeof lanes);
}

// Unsigned numbers of 16 and 8 bits, widened, and the lower bits of words.
#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;  // without a mask GCC 12 warns of what its own header leaves undefined
inline WordLanes load_lanes(const uint16_t* from) {
  return reinterpret_cast<WordLanes>(_mm512_maskz_cvtepu16_epi32(kAllLanes, copy_lanes<__m256i>(from)));
}
inline WordLanes load_lanes(const uint8_t* from) {
  return reinterpret_cast<WordLanes>(_mm512_maskz_cvtepu8_epi32(kAllLanes, copy_lanes<__m128i>(from)));
}
inline SignedLanes load_signed_lanes(const uint16_t* from) {
  return reinterpret_cast<SignedLanes>(_mm512_maskz_cvtepi16_epi32(kAllLanes, copy_lanes<__m256i>(from)));
}
inline SignedLanes load_signed_lanes(const uint8_t* from) {
  return reinterpret_cast<SignedLanes>(_mm512_maskz_cvtepi8_epi32(kAllLanes, copy_lanes<__m128i>(from)));
}
inline void store_lanes(WordLanes lanes, uint16_t* to) {
  const __m256i narrow = _mm512_maskz_cvtepi32_epi16(kAllLanes, reinterpret_cast<__m512i>(lanes));
  memcpy(to, &narrow, sizeof narrow);
}
inline void store_lanes(WordLanes lanes, uint8_t* to) {
  const __m128i narrow = _mm512_maskz_cvtepi32_epi8(kAllLanes, reinterpret_cast<__m512i>(lanes));
  memcpy(to, &narrow, sizeof narrow);
}
#elif defined(__AVX2__)
inline WordLanes load_lanes(const uint16_t* from) {
  return reinterpret_cast<WordLanes>(_mm256_cvtepu16_epi32(copy_lanes<__m128i>(from)));
}
inline WordLanes load_lanes(const uint8_t* from) {
  return reinterpret_cast<WordLanes>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline SignedLanes load_signed_lanes(const uint16_t* from) {
  return reinterpret_cast<SignedLanes>(_mm256_cvtepi16_epi32(copy_lanes<__m128i>(from)));
}
inline SignedLanes load_signed_lanes(const uint8_t* from) {
  return reinterpret_cast<SignedLanes>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
template <uint32_t kMask>
inline __m128i narrow_lanes(WordLanes lanes) {
  const __m256i x = reinterpret_cast<__m256i>(lanes & kMask);
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline void store_lanes(WordLanes lanes, uint16_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow_lanes<0xffffu>(lanes));
}
inline void store_lanes(WordLanes lanes, uint8_t* to) {
  const __m128i x = narrow_lanes<0xffu>(lanes);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(x, x));
}
#else
template <typename Lanes, typename Number, typename Stored>
inline Lanes widen_lanes(const Stored* from) {
  typedef Number Narrow __attribute__((vector_size(sizeof(Stored) * kLaneCount)));
  return __builtin_convertvector(copy_lanes<Narrow>(from), Lanes);
}
template <typename Stored>
inline void narrow_lanes(WordLanes lanes, Stored* to) {
  typedef Stored Narrow __attribute__((vector_size(sizeof(Stored) * kLaneCount)));
  const Narrow narrow = __builtin_convertvector(lanes, Narrow);
  memcpy(to, &narrow, sizeof narrow);
}
inline WordLanes load_lanes(const uint16_t* from) {
  return widen_lanes<WordLanes, uint16_t>(from);
}
inline WordLanes load_lanes(const uint8_t* from) {
  return widen_lanes<WordLanes, uint8_t>(from);
}
inline SignedLanes load_signed_lanes(const uint16_t* from) {
  return widen_lanes<SignedLanes, int16_t>(from);
}
inline SignedLanes load_signed_lanes(const uint8_t* from) {
  return widen_lanes<SignedLanes, int8_t>(from);
}
inline void store_lanes(WordLanes lanes, uint16_t* to) {
  narrow_lanes(lanes, to);
}
inline void store_lanes(WordLanes lanes, uint8_t* to) {
  narrow_lanes(lanes, to);
}
#endif

inline WordLanes load_lanes(const bfloat16* from) {
  return load_lanes(reinterpret_cast<const uint16_t*>(from));
}
inline void store_lanes(WordLanes lanes, bfloat16* to) {
  store_lanes(lanes, reinterpret_cast<uint16_t*>(to));
}

// Two consecutive bytes in each lane, one in each half of the word.
inline WordLanes load_byte_pairs(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<WordLanes>(_mm512_cvtepu8_epi16(copy_lanes<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<WordLanes>(_mm256_cvtepu8_epi16(copy_lanes<__m128i>(from)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(2 * kLaneCount)));
  typedef uint16_t Halves __attribute__((vector_size(4 * kLaneCount)));
  return reinterpret_cast<WordLanes>(__builtin_convertvector(copy_lanes<Bytes>(from), Halves));
#endif
}
inline void store_byte_pairs(WordLanes lanes, uint8_t* to) {
#if defined(__AVX512F__)
  const __m256i bytes = _mm512_maskz_cvtepi16_epi8(0xffffffffu, reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(lanes);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
#else
  typedef uint8_t Bytes __attribute__((vector_size(2 * kLaneCount)));
  typedef uint16_t Halves __attribute__((vector_size(4 * kLaneCount)));
  const Bytes bytes = __builtin_convertvector(reinterpret_cast<Halves>(lanes), Bytes);
#endif
  memcpy(to, &bytes, sizeof bytes);
}

// Lanes that hold kParts elements each: one, widened, or two of at most 16 bits, which are taken apart in the lane.
template <int kParts, typename Stored>
inline auto load_parts(const Stored* from) {
  if constexpr (kParts == 1)
    return load_lanes(from);
  else if constexpr (sizeof(Stored) == 1)
    return load_byte_pairs(from);
  else
    return copy_lanes<WordLanes>(from);
}
template <int kParts, typename Lanes, typename Stored>
inline void store_parts(const Lanes& lanes, Stored* to) {
  if constexpr (kParts == 1)
    store_lanes(lanes, to);
  else if constexpr (sizeof(Stored) == 1)
    store_byte_pairs(lanes, to);
  else
    memcpy(to, &lanes, sizeof lanes);
}

// Part k of a lane: a float, or the bits of what is stored.
template <int kParts>
inline float part(float lane, int) {
  return lane;
}
template <int kParts>
inline uint32_t part(uint32_t lane, int k) {
  return kParts == 1 ? lane : k == 0 ? lane & 0xffffu : lane >> 16;
}
// Puts part k in its place; the parts before it are there. with_high: from the upper half of a word.
template <int kParts>
inline uint32_t with_part(uint32_t lane, uint32_t bits, int k) {
  return k == 0 ? bits : lane | bits << 16;
}
template <int kParts>
inline uint32_t with_high(uint32_t lane, uint32_t high, int k) {
  return k == 0 ? high >> 16 : lane | (high & 0xffff0000u);
}
template <int kParts>
inline float with_rounded(float, float x, int) {
  return x;
}
template <int kParts>
inline uint32_t with_rounded(uint32_t lane, float x, int k) {
  return with_high<kParts>(lane, rounded_high(x), k);
}

inline float widen_part(float x) {
  return x;
}
inline float widen_part(uint32_t bits) {
  return widen(bfloat16{static_cast<uint16_t>(bits)});
}

}  // namespace
}  // namespace fastft::cpu
