// Dropout without a mask in memory (Srivastava et al. 2014): element i of the logically contiguous tensor is kept iff
//
//   word i mod 4 of Philox(key = seed, counter = {offset/4, i/4})  <  round((1−p)·2³²)
//
// so the mask follows from (seed, offset, i) alone: the same for every dtype, layout, vector width, thread and device,
// and in the backward pass. What is kept is multiplied by 1/(1−p); what is dropped is 0, whatever it was.
#pragma once

#include "philox.h"
#include "rounding.h"

namespace fastft {

// What is equal for all elements of a call.
template <typename T>
struct DropoutScalars {
  uint64_t seed, block;  // block = offset / 4
  uint32_t last_kept;    // the largest word that is kept
  bool all, none;        // nothing is dropped (no words are needed); everything is
  T scale;               // 1 / (1 − p)
};

template <typename T>
FASTFT_HD DropoutScalars<T> dropout_scalars(double p, int64_t seed, int64_t offset) {
  const double kept = (1.0 - p) * 4294967296.0;
  const uint64_t threshold = static_cast<uint64_t>(kept + 0.5);
  DropoutScalars<T> s;
  s.seed = static_cast<uint64_t>(seed);
  s.block = static_cast<uint64_t>(offset) / 4;
  s.all = threshold > 0xffffffffull;
  s.none = threshold == 0;
  s.last_kept = static_cast<uint32_t>(s.all ? 0xffffffffull : threshold - (s.none ? 0 : 1));
  s.scale = static_cast<T>(s.none ? 0.0 : 1.0 / (1.0 - p));
  return s;
}

// The words of elements 4·group … 4·group + 3.
template <typename T>
FASTFT_HD PhiloxWords dropout_words(const DropoutScalars<T>& s, uint64_t group) {
  return philox(s.seed, s.block, group);
}

template <typename T>
FASTFT_HD bool dropout_keeps(const DropoutScalars<T>& s, uint32_t word) {
  return word <= s.last_kept && !s.none;
}

// x where kept, else 0. On the host by its bits: compilers turn `keep ? x : 0` into a masked load of x, which costs
// more than a plain one.
FASTFT_HD float dropout_select(float x, bool keep) {
#if defined(__CUDA_ARCH__)
  return keep ? x : 0.0f;
#else
  return bits_float(float_bits(x) & (keep ? 0xffffffffu : 0u));
#endif
}

FASTFT_HD double dropout_select(double x, bool keep) {
#if defined(__CUDA_ARCH__)
  return keep ? x : 0.0;
#else
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= keep ? 0xffffffffffffffffull : 0ull;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// x after dropout. Selected, not multiplied: an inf or NaN that is dropped is gone.
template <typename T>
FASTFT_HD T dropout_element(T x, bool keep, T scale) {
  return dropout_select(x * scale, keep);
}

}  // namespace fastft
