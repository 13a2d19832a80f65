// A bfloat16 weight with more of its bits kept beside it, so that small steps add up in them instead of being rounded
// away. Weight and low bits together are one float, the master:
//
//   master bits = (weight bits << 16) + low << (16 − kBits)         low: signed, of kBits bits
//
// With 16 low bits that is every float: nothing is lost. With 8, the masters are the floats whose last 8 bits are 0.
// The weight is the master rounded to nearest, and away from zero where it lies exactly between two: rounding to even
// would need one more code for every second weight.
#pragma once

#include <stdint.h>

#include "rounding.h"

namespace fastft {

constexpr uint32_t kQuietNaN = 0x7fc00000u;

// On plain numbers, for loops that hold each in a lane of 32 bits: weight in its lower half, low with its sign.
// Low bits that would make a NaN belong to another weight (those below 0 beside a weight of 0 do): they count as 0.
FASTFT_HD float join(uint32_t weight, int32_t low, int low_width) {
  const uint32_t high = weight << 16;
  const float x = bits_float(high + (static_cast<uint32_t>(low) << (16 - low_width)));
  return x == x ? x : bits_float(high);
}
FASTFT_HD float join(bfloat16 weight, uint16_t low) {
  return join(weight.bits, static_cast<int16_t>(low), 16);
}
FASTFT_HD float join(bfloat16 weight, uint8_t low) {
  return join(weight.bits, static_cast<int8_t>(low), 8);
}

// The bits of the master that is kept. Every NaN becomes the one whose low bits are 0; with 16 low bits any other float
// is kept as it is.
FASTFT_HD uint32_t master_bits(float x) {
  return x != x ? kQuietNaN : float_bits(x);
}
// With 8 low bits the float is first rounded to 24 bits: up where the 8 bits that go, plus `rounding` (below 256),
// carry. That is rounding_byte() for stochastic rounding, or nearest_rounding().
FASTFT_HD uint32_t master_bits(float x, uint32_t rounding) {
  return x != x ? kQuietNaN : (float_bits(x) + rounding) & 0xffffff00u;
}
FASTFT_HD uint32_t nearest_rounding(float x) {
  return 0x7fu + ((float_bits(x) >> 8) & 1u);  // to even
}
// The weight in the upper half of a word; what is in the lower half goes.
FASTFT_HD uint32_t weight_high(uint32_t master) {
  return master + 0x8000u;
}

FASTFT_HD void split(float x, bfloat16* weight, uint16_t* low) {
  const uint32_t u = master_bits(x);
  weight->bits = static_cast<uint16_t>(weight_high(u) >> 16);
  *low = static_cast<uint16_t>(u);
}
FASTFT_HD void split(float x, uint32_t rounding, bfloat16* weight, uint8_t* low) {
  const uint32_t u = master_bits(x, rounding);
  weight->bits = static_cast<uint16_t>(weight_high(u) >> 16);
  *low = static_cast<uint8_t>(u >> 8);
}

// Elements that one of the sums stands for by which a later step sees whether the weights are still those that it
// wrote: so many consecutive live ones; with moments in blocks (block8.h) those of kUnit / kBlock8 consecutive blocks.
constexpr int64_t kUnit = 4096;

// What element i of a unit, masked out or not, adds to the unit's sum; even, so that sum | 1 is never 0. With moments
// in blocks, i is that of a unit whose blocks are all of full length.
FASTFT_HD uint32_t weight_term(bfloat16 weight, uint32_t i) {
  return weight.bits * (4u * i + 2u);
}

}  // namespace fastft
