// Weights with low bits or stochastic rounding, and moments in 8 bits, a block at a time as floats. For the files that
// are compiled once per instruction set: all of it has internal linkage.
#pragma once

#include <string.h>

#include "../adamw.h"
#include "blocks.h"
#include "philox_groups.h"

namespace fastft::cpu {
namespace {

// Whether the parameter is kept as it is computed, but for plain rounding to nearest.
inline bool is_plain(const AdamWEntry& e) {
  return e.low_width == 0 && !(e.stochastic && item_size(e.dtype) == 2);
}

// The sixteen random bits of each of up to kBlock elements.
class RoundingBits {
 public:
  // A pointer to those of elements [at, at + n) in memory, n <= kBlock. pass: as in rounding_words().
  const uint16_t* fill(const AdamWEntry& e, uint32_t pass, int64_t at, int64_t n) {
    const uint64_t counter = 2 * static_cast<uint64_t>(e.t) + pass;
    for (int64_t done = 0; done < n;) {
      const int64_t row_end = ((at + done) / e.index.row + 1) * e.index.row;
      const int64_t length = smaller(n - done, row_end - at - done);
      const int64_t first = e.index.of(at + done), group = first / kPerPhilox;
      const int64_t groups = (first + length - 1) / kPerPhilox - group + 1;
      philox_groups(e.rounding_key, counter, static_cast<uint64_t>(group), groups, words_);
      // Little-endian, as all machines are that this is built for: rounding_bits() as they lie.
      memcpy(bits_ + done, reinterpret_cast<const char*>(words_) + first % kPerPhilox * 2, length * 2);
      done += length;
    }
    return bits_;
  }

 private:
  alignas(64) uint32_t words_[4 * (kBlock / kPerPhilox + 1 + kExtraGroups)];
  alignas(64) uint16_t bits_[kBlock];
};

template <typename Low>
inline void join_all(const void* weights, const void* low, int64_t offset, int64_t n, float* __restrict to) {
  const bfloat16* w = static_cast<const bfloat16*>(weights) + offset;
  const Low* bits = static_cast<const Low*>(low) + offset;
  for (int64_t i = 0; i < n; ++i) to[i] = join(w[i], bits[i]);
}

// master(i): the bits of the masters of n elements, at most kBlock, which are stored where live.
template <typename Low, typename Master>
inline void split_all(const AdamWEntry& e, int64_t at, int64_t n, const uint8_t* mask, const Master& master) {
  bfloat16 weights[kBlock];
  Low low[kBlock];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = master(i);
    weights[i].bits = static_cast<uint16_t>(weight_high(bits) >> 16);
    low[i] = static_cast<Low>(bits >> (16 - 8 * sizeof(Low)));
  }
  copy_live(weights, static_cast<bfloat16*>(e.param) + at, n, mask);
  copy_live(low, static_cast<Low*>(e.low_bits) + at, n, mask);
}

// n elements of the parameter from `at` on: load(), or the masters.
template <typename T>
inline T* load_weights(const AdamWEntry& e, int64_t at, int64_t n, T* buffer) {
  if constexpr (std::is_same<T, float>::value) {
    if (e.low_width != 0) {
      e.low_width == 16 ? join_all<uint16_t>(e.param, e.low_bits, at, n, buffer)
                        : join_all<uint8_t>(e.param, e.low_bits, at, n, buffer);
      return buffer;
    }
  }
  return load(e.param, e.dtype, at, n, buffer);
}

template <typename Stored>
inline void narrow_all_stochastic(const float* from, const uint16_t* random, void* to, int64_t at, int64_t n,
                                  const uint8_t* mask) {
  Stored rounded[kBlock];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) narrow_stochastic(from[i], random[i], &rounded[i]);
  copy_live(rounded, static_cast<Stored*>(to) + at, n, mask);
}

// Rounds what load_weights() gave back into the parameter and its low bits, where live.
template <typename T>
inline void store_weights(const AdamWEntry& e, uint32_t pass, const T* values, int64_t at, int64_t n,
                          const uint8_t* mask) {
  if constexpr (std::is_same<T, float>::value) {
    if (!is_plain(e)) {
      RoundingBits rounding;
      const uint16_t* random = e.stochastic ? rounding.fill(e, pass, at, n) : nullptr;
      if (e.low_width == 16) {
        split_all<uint16_t>(e, at, n, mask, [=](int64_t i) { return master_bits(values[i]); });
      } else if (e.low_width == 8 && random) {
        split_all<uint8_t>(e, at, n, mask, [=](int64_t i) { return master_bits(values[i], rounding_byte(random[i])); });
      } else if (e.low_width == 8) {
        split_all<uint8_t>(e, at, n, mask,
                           [=](int64_t i) { return master_bits(values[i], nearest_rounding(values[i])); });
      } else if (e.dtype == DType::bf16) {
        narrow_all_stochastic<bfloat16>(values, random, e.param, at, n, mask);
      } else {
        narrow_all_stochastic<float16>(values, random, e.param, at, n, mask);
      }
      return;
    }
  }
  store(values, e.param, e.dtype, at, n, mask);
}

// Σ weight_term() over n elements from `at` on, of which the first is element `first` of its unit.
inline uint32_t weight_sum(const AdamWEntry& e, int64_t at, int64_t n, uint32_t first) {
  const bfloat16* weights = static_cast<const bfloat16*>(e.param) + at;
  uint32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += weight_term(weights[i], first + static_cast<uint32_t>(i));
  return sum;
}

// A block of 8-bit moments, in whole: its elements lie at [at, at + n), one scale belongs to them.
struct Block8 {
  int64_t at, n, scale;

  // The block that begins at element `at` of the parameter.
  Block8(const AdamWEntry& e, int64_t begin) : at(begin) {
    const int64_t row = at / e.block_row, column = at - row * e.block_row;
    n = smaller(kBlock8, e.block_row - column);
    scale = row * e.blocks_per_row() + column / kBlock8;
  }

  void load(const AdamWEntry& e, float* __restrict m, float* __restrict v) const {
    const uint8_t* first = static_cast<const uint8_t*>(e.exp_avg) + at;
    const uint8_t* second = static_cast<const uint8_t*>(e.exp_avg_sq) + at;
    const float scale1 = e.exp_avg_scales[scale], scale2 = e.exp_avg_sq_scales[scale];
    for (int64_t i = 0; i < n; ++i) {
      m[i] = decode_first(first[i], scale1);
      v[i] = decode_second(second[i], scale2);
    }
  }

  void store(const AdamWEntry& e, const float* __restrict m, const float* __restrict v, const uint8_t* mask) const {
    alignas(64) float root[kBlock8];
    alignas(64) uint32_t size1[kBlock8], size2[kBlock8];
    // Absolute values as integers, which have the same order, and of which NaN is the largest.
    for (int64_t i = 0; i < n; ++i) {
      root[i] = square_root(v[i]);
      size1[i] = float_bits(m[i]) & 0x7fffffffu;
      size2[i] = float_bits(root[i]) & 0x7fffffffu;
    }
    if (mask) {
      uint32_t any = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t live = mask[i] ? ~0u : 0u;
        any |= live;
        size1[i] &= live;
        size2[i] &= live;
      }
      if (any == 0) return;
    }
    uint32_t most1 = 0, most2 = 0;
    for (int64_t i = 0; i < n; ++i) {
      most1 = size1[i] > most1 ? size1[i] : most1;
      most2 = size2[i] > most2 ? size2[i] : most2;
    }
    const Scale8 scale1 = scale8(bits_float(most1), kTop1), scale2 = scale8(bits_float(most2), kTop2);
    e.exp_avg_scales[scale] = scale1.scale;
    e.exp_avg_sq_scales[scale] = scale2.scale;
    const uint32_t step = static_cast<uint32_t>(static_cast<uint64_t>(e.t));
    alignas(64) uint32_t codes1[kBlock8], codes2[kBlock8];
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t dither = dither8(step, static_cast<uint32_t>(i));
      codes1[i] = encode_first(m[i], scale1.inverse, dither);
      codes2[i] = encode_second(root[i], scale2.inverse, dither);
    }
    uint8_t first[kBlock8], second[kBlock8];
    for (int64_t i = 0; i < n; ++i) {
      first[i] = static_cast<uint8_t>(codes1[i]);
      second[i] = static_cast<uint8_t>(codes2[i]);
    }
    copy_live(first, static_cast<uint8_t*>(e.exp_avg) + at, n, mask);
    copy_live(second, static_cast<uint8_t*>(e.exp_avg_sq) + at, n, mask);
  }
};

}  // namespace
}  // namespace fastft::cpu
