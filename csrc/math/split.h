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

FASTFT_HD bool is_nan_bits(uint32_t u) {
  return (u & 0x7fffffffu) > 0x7f800000u;
}

FASTFT_HD float join(bfloat16 weight, uint16_t low) {
  const uint32_t signed_low = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(low)));
  return bits_float((static_cast<uint32_t>(weight.bits) << 16) + signed_low);
}
FASTFT_HD float join(bfloat16 weight, uint8_t low) {
  const uint32_t signed_low = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(low)));
  return bits_float((static_cast<uint32_t>(weight.bits) << 16) + (signed_low << 8));
}

// Every NaN becomes the one whose low bits are 0; any other float comes back from join() as it was.
FASTFT_HD void split(float master, bfloat16* weight, uint16_t* low) {
  const uint32_t bits = float_bits(master);
  const uint32_t u = is_nan_bits(bits) ? kQuietNaN : bits;
  weight->bits = static_cast<uint16_t>((u + 0x8000u) >> 16);
  *low = static_cast<uint16_t>(u);
}

// The float is first rounded to 24 bits: up where the 8 bits that go, plus `rounding` (below 256), carry. That is a
// random number for stochastic rounding, or nearest_rounding().
FASTFT_HD uint32_t nearest_rounding(float x) {
  return 0x7fu + ((float_bits(x) >> 8) & 1u);  // to even
}
FASTFT_HD void split(float x, uint32_t rounding, bfloat16* weight, uint8_t* low) {
  const uint32_t bits = float_bits(x);
  const uint32_t u = is_nan_bits(bits) ? kQuietNaN : (bits + rounding) & 0xffffff00u;
  weight->bits = static_cast<uint16_t>((u + 0x8000u) >> 16);
  *low = static_cast<uint8_t>(u >> 8);
}

// What element i of a chunk adds to the chunk's sum, by which a later step sees whether the weights are still those
// that it wrote; even, so that sum | 1 is never 0.
FASTFT_HD uint32_t weight_term(bfloat16 weight, uint32_t i) {
  return weight.bits * (4u * i + 2u);
}

}  // namespace fastft
