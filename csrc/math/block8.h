// Moments in 8 bits: blocks of up to 256 consecutive elements of a row, each with one float, its scale.
//
// A code is a small floating-point number x ∈ [0, 1): the bits of x + 2^-16, of which the leading mantissa bits are
// kept,
//
//   code = (bits(x + c) − bits(c) + dither) >> shift        c = 2^-16, where x = value · inverse scale
//   x    = float(bits(c) + (code << shift)) − c
//
// so that there are 16 binades above c with 2^kMantissa codes each, and even steps of c·2^-kMantissa below. The first
// moment has 3 mantissa bits and a sign; the second, which has no sign, 4, and is kept as its root, whose range is half
// as wide in binades. The largest of a block gets the largest code. A second moment that is not 0 never becomes 0: its
// element would take a step without bound.
//
// The dither is what makes averages right. v changes by a thousandth of itself in a step, far less than codes lie
// apart, and rounded to nearest it would stand still: gradients ten times smaller would never be noticed. So a step's
// threshold of rounding moves with the step count by the golden ratio (a Weyl sequence): over the steps each value is
// rounded up as often as it lies nearer to the upper code. It depends on (step, element of the block) alone.
//
// Block-wise scales: Dettmers et al. 2021 (https://arxiv.org/abs/2110.02861). The root of v, and a second moment that
// is never 0: Li et al. 2023 (https://arxiv.org/abs/2309.01507).
#pragma once

#include <stdint.h>

#include "rounding.h"

namespace fastft {

constexpr int kBlock8 = 256;                  // elements of a block, at most; the last one of a row may be shorter
constexpr uint32_t kFloorBits = 0x37800000u;  // of c
constexpr float kFloor = 1.52587890625e-05f;  // c
constexpr int kShift1 = 20, kShift2 = 19;     // mantissa bits that are dropped, for the first and the second moment
constexpr uint32_t kMost1 = 127, kMost2 = 255;
constexpr float kTop1 = 0.9375f - kFloor, kTop2 = 0.96875f - kFloor;  // what these codes stand for

struct Scale8 {
  float scale;    // value = scale · x
  float inverse;  // x = inverse · value
};

// For a block whose largest absolute value is `most`; top: kTop1 or kTop2. Values too small to be divided by become 0.
FASTFT_HD Scale8 scale8(float most, float top) {
  const bool none = most < 1e-36f;
  return {none ? 0.0f : most / top, none ? 0.0f : top / most};
}

// 32 bits that spread evenly over the steps, for element i of a block.
FASTFT_HD uint32_t dither8(uint32_t step, uint32_t i) {
  return step * 0x9E3779B1u + i * 0x85EBCA6Bu;
}

// What the bits of x + c are added to before the shift: equal for the same element of all blocks in a step.
FASTFT_HD uint32_t offset8(uint32_t dither, int shift) {
  return (dither >> (32 - shift)) - kFloorBits;
}
FASTFT_HD uint32_t code8(float x, int shift, uint32_t most, uint32_t offset) {
  const uint32_t code = (float_bits(x + kFloor) + offset) >> shift;
  return code < most ? code : most;
}
FASTFT_HD float value8(uint32_t code, int shift) {
  return bits_float(kFloorBits + (code << shift)) - kFloor;
}

// Codes are below 256; in 32 bits, so that loops hold them in lanes. offset: offset8() with the moment's own shift.
FASTFT_HD uint32_t encode_first_at(float m, float inverse, uint32_t offset) {
  const uint32_t u = float_bits(m);
  const float x = bits_float(u & 0x7fffffffu) * inverse;
  return code8(x, kShift1, kMost1, offset) | ((u >> 24) & 0x80u);
}
FASTFT_HD uint32_t encode_first(float m, float inverse, uint32_t dither) {
  return encode_first_at(m, inverse, offset8(dither, kShift1));
}
FASTFT_HD float decode_first(uint32_t code, float scale) {
  const float m = value8(code & 0x7fu, kShift1) * scale;
  return bits_float(float_bits(m) | ((code & 0x80u) << 24));
}

// root = √v
FASTFT_HD uint32_t encode_second_at(float root, float inverse, uint32_t offset) {
  const uint32_t code = code8(root * inverse, kShift2, kMost2, offset), least = root > 0.0f ? 1u : 0u;
  return code > least ? code : least;
}
FASTFT_HD uint32_t encode_second(float root, float inverse, uint32_t dither) {
  return encode_second_at(root, inverse, offset8(dither, kShift2));
}
FASTFT_HD float decode_second(uint32_t code, float scale) {
  const float root = value8(code, kShift2) * scale;
  return root * root;
}

}  // namespace fastft
