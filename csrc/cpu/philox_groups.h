// Philox for many counters at a time. For the files that are compiled once per instruction set: all of it has internal
// linkage.
#pragma once

#include <string.h>

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/philox.h"
#include "blocks.h"

namespace fastft::cpu {
namespace {

// The words of counter {block, first + j} go to out[4j … 4j+3]. It may write up to kExtraGroups groups beyond `count`,
// which is at most kBlock / 4 + 1.
#if defined(__AVX2__)
// A 64-bit lane holds one 32-bit number in its lower half; the upper half is ignored, as the multiplication does.
// Several vectors at a time, since each has to wait for its own multiplications.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
constexpr Lanes kCounters = {0, 1, 2, 3, 4, 5, 6, 7}, kFirstPairs = {0, 8, 1, 9, 2, 10, 3, 11},
                kLastPairs = {4, 12, 5, 13, 6, 14, 7, 15};
inline Lanes product(Lanes a, uint32_t b) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
#else
typedef uint64_t Lanes __attribute__((vector_size(32)));
constexpr Lanes kCounters = {0, 1, 2, 3}, kFirstPairs = {0, 4, 1, 5}, kLastPairs = {2, 6, 3, 7};
inline Lanes product(Lanes a, uint32_t b) {
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
#endif
constexpr int kPerVector = sizeof(Lanes) / sizeof(uint64_t), kVectors = 4;
constexpr int64_t kExtraGroups = kPerVector * kVectors - 1;

inline Lanes in_all(uint64_t x) {
  return Lanes{} + x;
}
inline Lanes exclusive_or(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_ternarylogic_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b),
                                                           reinterpret_cast<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

inline void philox_groups(uint64_t seed, uint64_t block, uint64_t first, int64_t count, uint32_t* out) {
  for (int64_t j = 0; j < count; j += kPerVector * kVectors, out += 4 * kPerVector * kVectors) {
    Lanes a[kVectors], b[kVectors], c[kVectors], d[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      a[v] = in_all(block);
      b[v] = in_all(block >> 32);
      c[v] = in_all(first + j + v * kPerVector) + kCounters;
      d[v] = c[v] >> 32;
    }
    PhiloxKey key = philox_key(seed);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round, philox_next(key)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {  // philox_round (math/philox.h)
        const Lanes product0 = product(a[v], kPhiloxFactor0), product1 = product(c[v], kPhiloxFactor1);
        a[v] = exclusive_or(product1 >> 32, b[v], in_all(key.at[0]));
        c[v] = exclusive_or(product0 >> 32, d[v], in_all(key.at[1]));
        b[v] = product1;
        d[v] = product0;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Lanes ab = (a[v] & 0xffffffffu) | b[v] << 32, cd = (c[v] & 0xffffffffu) | d[v] << 32;
      const Lanes words[2] = {__builtin_shuffle(ab, cd, kFirstPairs), __builtin_shuffle(ab, cd, kLastPairs)};
      memcpy(out + 4 * kPerVector * v, words, sizeof words);
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

}  // namespace
}  // namespace fastft::cpu
