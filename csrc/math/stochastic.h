// Stochastic rounding to 16 bits: to one of the two neighbours, with the probabilities that make it right on average,
// so that steps far below a weight's last bit add up in expectation.
//
// The randomness is a function of (key, step, element): Philox with the key of the tensor and the counter
// {2·step + pass, i/8}, of which element i, counted in the whole tensor, takes the i%8-th sixteen bits. So a step has
// the same result on every device, with any number of threads, and however the tensor is cut into shards.
#pragma once

#include <stdint.h>

#include "philox.h"
#include "rounding.h"

namespace fastft {

constexpr int64_t kPerPhilox = 8;  // elements served by one call

// Where an element of a shard lies in the whole tensor. A shard is rows of `row` consecutive elements, which lie
// `stride` apart in the whole; a tensor that is whole is one row.
struct ElementIndex {
  int64_t row, stride, first;

  FASTFT_HD int64_t of(int64_t i) const {
    const int64_t r = i / row;
    return first + r * stride + (i - r * row);
  }
};

// The words for elements 8·i to 8·i + 7, for step number `step` (1 is the first); pass 0 is the step itself, 1 the
// projection that may follow it.
FASTFT_HD PhiloxWords rounding_words(uint64_t key, uint64_t step, uint32_t pass, uint64_t i) {
  return philox(key, 2 * step + pass, i);
}

// The sixteen bits of element k of the eight.
FASTFT_HD uint32_t rounding_bits(const PhiloxWords& words, int k) {
  return (words.at[k / 2] >> (k % 2 * 16)) & 0xffffu;
}

// Those of them that round a weight with 8 low bits (split.h).
FASTFT_HD uint32_t rounding_byte(uint32_t random) {
  return random & 0xffu;
}

// random: 16 bits. The bfloat16 in the upper half of a word; what is in the lower half goes.
FASTFT_HD uint32_t stochastic_high(float x, uint32_t random) {
  return x != x ? 0x7fc00000u : float_bits(x) + random;
}
FASTFT_HD void narrow_stochastic(float x, uint32_t random, bfloat16* out) {
  out->bits = static_cast<uint16_t>(stochastic_high(x, random) >> 16);
}

FASTFT_HD void narrow_stochastic(float x, uint32_t random, float16* out) {
  const uint32_t u = float_bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  // A normal half drops 13 bits of the float. Below 2^-14 halves are multiples of 2^-24: the float is first brought to
  // multiples of 2^-40, which is exact but for bits far below what `random` resolves.
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  const float tiny = bits_float(magnitude < (113u << 23) ? magnitude : 0u) * 1099511627776.0f;  // 2^40
  const uint32_t subnormal = (static_cast<uint32_t>(tiny) + random) >> 16;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal < 0x7c00u ? normal : 0x7c00u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
  const uint32_t half = magnitude >= (143u << 23) ? special : finite;
  out->bits = static_cast<uint16_t>(half | ((u >> 16) & 0x8000u));
}

}  // namespace fastft
