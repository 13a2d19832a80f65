// Philox4x32-10, the counter-based generator of Salmon et al. 2011 (Parallel random numbers: as easy as 1, 2, 3;
// doi 10.1145/2063384.2063405): a keyed bijection of 128-bit counters, so any word of the stream can be computed at any
// time, in any order, with nothing stored. Known answer: key 0, counter 0 → 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once

#include <stdint.h>

#include "hd.h"

namespace fastft {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;

struct PhiloxWords {
  uint32_t at[4];
};

struct PhiloxKey {
  uint32_t at[2];
};

FASTFT_HD PhiloxKey philox_key(uint64_t key) {
  return {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}};
}

// From one round's key to the next one's.
FASTFT_HD void philox_next(PhiloxKey& key) {
  key.at[0] += 0x9E3779B9u;
  key.at[1] += 0xBB67AE85u;
}

FASTFT_HD void philox_round(PhiloxWords& c, PhiloxKey key) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxFactor0) * c.at[0];
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxFactor1) * c.at[2];
  const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), low0 = static_cast<uint32_t>(product0);
  const uint32_t high1 = static_cast<uint32_t>(product1 >> 32), low1 = static_cast<uint32_t>(product1);
  c.at[0] = high1 ^ c.at[1] ^ key.at[0];
  c.at[1] = low1;
  c.at[2] = high0 ^ c.at[3] ^ key.at[1];
  c.at[3] = low0;
}

// The four words of a counter, given as two 64-bit halves.
FASTFT_HD PhiloxWords philox(uint64_t seed, uint64_t counter_low, uint64_t counter_high) {
  PhiloxWords c = {{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
                    static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)}};
  PhiloxKey key = philox_key(seed);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c, key);
    philox_next(key);
  }
  return c;
}

}  // namespace fastft
