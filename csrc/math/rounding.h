// bfloat16 and IEEE half, as bit patterns: exact widening to float, narrowing to nearest, ties to even.
// One integer formula on both sides, so that a value stored by the GPU and by the CPU has the same bits.
#pragma once

#include <stdint.h>
#include <string.h>

#include "hd.h"

namespace fastft {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FASTFT_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

FASTFT_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// The type in which a stored value is computed with: float for everything narrower, double for double.
template <typename Stored>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <typename Stored>
using compute_t = typename compute<Stored>::type;

FASTFT_HD float widen(float x) {
  return x;
}
FASTFT_HD double widen(double x) {
  return x;
}
FASTFT_HD float widen(bfloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

FASTFT_HD float widen(float16 x) {
  // Move exponent and mantissa into place and re-bias the exponent (15 → 127). Inf and NaN need the bias twice;
  // a subnormal gets one exponent step too many, taken off again by an exact subtraction.
  const uint32_t shifted = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  uint32_t u = shifted + (112u << 23);
  u += exponent == 0x0f800000u ? (112u << 23) : 0u;
  const float normal = bits_float(u);
  const float subnormal = bits_float(u + (1u << 23)) - bits_float(113u << 23);
  const uint32_t magnitude = float_bits(exponent == 0u ? subnormal : normal);
  return bits_float(magnitude | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

FASTFT_HD void narrow(float x, float* out) {
  *out = x;
}
FASTFT_HD void narrow(double x, double* out) {
  *out = x;
}

// The bfloat16 in the upper half of a word; what is in the lower half goes.
FASTFT_HD uint32_t rounded_high(float x) {
  const uint32_t u = float_bits(x);
  return x != x ? 0x7fc00000u : u + 0x7fffu + ((u >> 16) & 1u);
}
FASTFT_HD void narrow(float x, bfloat16* out) {
  out->bits = static_cast<uint16_t>(rounded_high(x) >> 16);
}

FASTFT_HD void narrow(float x, float16* out) {
  const uint32_t u = float_bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lines its last bit up with the float's last bit, so that
  // the addition itself rounds to nearest even.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
  const uint32_t half = magnitude >= (143u << 23) ? special : finite;
  out->bits = static_cast<uint16_t>(half | ((u >> 16) & 0x8000u));
}

}  // namespace fastft
