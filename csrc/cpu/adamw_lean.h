// The step where nothing is out of the ordinary: no mask, no importance, no amsgrad, gradients in the weights' dtype.
// One loop for each way of keeping weights, moments and anchor, from memory through registers to memory. The same bits
// as the loops over blocks give. For the files that are compiled once per instruction set: all of it has internal
// linkage.
#pragma once

#include <algorithm>
#include <utility>

#include "lanes.h"
#include "low_precision.h"

namespace fastft::cpu {
namespace {

struct Nothing {};

// Stored: float or bfloat16. Low: uint16_t or uint8_t, low bits of a bfloat16; or Nothing.
template <typename Stored_, typename Low_ = Nothing, bool kStochastic_ = false>
struct Weight {
  using Stored = Stored_;
  using Low = Low_;
  static constexpr bool kStochastic = kStochastic_, kSplit = !std::is_same<Low, Nothing>::value;
};

// The arrays of a run, or of a piece of it that is filled up to whole vectors. Moment: float, bfloat16, or uint8_t for
// codes. Anchor: float, bfloat16, or Nothing.
template <class Weight, typename Moment, typename Anchor>
struct LeanArrays {
  typename Weight::Stored* p;
  const typename Weight::Stored* g;
  typename Weight::Low* low;
  const uint16_t* random;
  Moment *m, *v;
  const Anchor* a;
};

// A block of 8-bit moments: where its scales stand, and what it becomes before it is encoded. In the order in which the
// parts of lanes are taken apart: first part 0 of all of them, then part 1.
struct LeanBlock {
  int64_t scale;
  WordLanes most1, most2;  // the largest absolute values, as integers (Block8::store)
  alignas(64) float m[kBlock8], root[kBlock8];
};

// The offset8() of the elements of a block in this step, in the same order.
struct LeanOffsets {
  alignas(64) uint32_t first[kBlock8], second[kBlock8];

  void fill(double t, uint32_t parts) {
    const uint32_t step = static_cast<uint32_t>(static_cast<uint64_t>(t));
    for (uint32_t i = 0; i < kBlock8; ++i) {
      const uint32_t lanes = kLaneCount, wide = parts * lanes;
      const uint32_t element = i / wide * wide + i % lanes * parts + i % wide / lanes;
      const uint32_t dither = dither8(step, element);
      first[i] = offset8(dither, kShift1);
      second[i] = offset8(dither, kShift2);
    }
  }
};

// Sums and maxima of a run, in lanes.
template <int kParts>
struct LeanLanes {
  // Σ weight_term() is that of sum + 4·later, over the lanes; later: of the weights in part 1.
  WordLanes sum = {}, later = {}, most1 = {}, most2 = {};  // most: as in LeanBlock
  WordLanes place;                                         // the weight_term() of a weight of 1 in part 0
  float scale1 = 0.0f, scale2 = 0.0f;                      // of the codes as they were

  explicit LeanLanes(uint32_t first) : place(4u * (kParts * kLaneNumbers + first) + 2u) {}
};

template <class Weight, typename Moment, typename Anchor>
struct Lean {
  using Stored = typename Weight::Stored;
  using Low = typename Weight::Low;
  using Arrays = LeanArrays<Weight, Moment, Anchor>;
  static constexpr bool kCodes = std::is_same<Moment, uint8_t>::value,
                        kAnchored = !std::is_same<Anchor, Nothing>::value,
                        kPairs = sizeof(Stored) == 2 && sizeof(Moment) <= 2 && sizeof(Anchor) <= 2;
  // Where no array holds floats, a lane holds two elements: taking it apart costs less than widening.
  static constexpr int kParts = kPairs ? 2 : 1, kWide = kParts * kLaneCount;

  // Steps the elements of the lanes from i on, which are those from `at` on of the block.
  static inline __attribute__((always_inline)) void step_lanes(const Arrays& x, int64_t i, float factor,
                                                               const AdamWScalars<float>& s, LeanBlock* block,
                                                               int64_t at, LeanLanes<kParts>& lanes) {
    const auto p = load_parts<kParts>(x.p + i), g = load_parts<kParts>(x.g + i);
    const auto m = load_parts<kParts>(x.m + i), v = load_parts<kParts>(x.v + i);
    WordLanes low = {}, random = {};
    decltype(load_parts<kParts>(static_cast<const std::conditional_t<kAnchored, Anchor, Stored>*>(nullptr))) a = {};
    if constexpr (Weight::kSplit && kPairs) low = load_parts<kParts>(x.low + i);
    if constexpr (Weight::kSplit && !kPairs) low = reinterpret_cast<WordLanes>(load_signed_lanes(x.low + i));
    if constexpr (Weight::kStochastic) random = load_parts<kParts>(x.random + i);
    if constexpr (kAnchored) a = load_parts<kParts>(x.a + i);
    std::remove_const_t<decltype(p)> new_p;
    std::remove_const_t<decltype(m)> new_m, new_v;
    WordLanes new_low, weights[kParts], size1[kParts], size2[kParts];
    FloatLanes block_m[kParts], block_root[kParts];
#pragma GCC ivdep
    for (int j = 0; j < kLaneCount; ++j) {
      auto pj = p[j];
      auto mj = m[j], vj = v[j];
      uint32_t lowj = 0;
#pragma GCC unroll 2
      for (int k = 0; k < kParts; ++k) {
        float pk, mk, vk, xk = 0.0f, ak = 0.0f;
        if constexpr (Weight::kSplit) {
          constexpr int kUnused = 32 - 8 * sizeof(Low);
          const int32_t bits = kPairs ? static_cast<int32_t>(part<kParts>(low[j], k) << kUnused) >> kUnused
                                      : static_cast<int32_t>(low[j]);
          pk = join(part<kParts>(p[j], k), bits, 8 * sizeof(Low));
        } else {
          pk = widen_part(part<kParts>(p[j], k));
        }
        if constexpr (kCodes) {
          mk = decode_first(part<kParts>(m[j], k), lanes.scale1);
          vk = decode_second(part<kParts>(v[j], k), lanes.scale2);
        } else {
          mk = widen_part(part<kParts>(m[j], k));
          vk = widen_part(part<kParts>(v[j], k));
        }
        if constexpr (kAnchored) ak = widen_part(part<kParts>(a[j], k));
        adamw_element(pk, widen_part(part<kParts>(g[j], k)), mk, vk, xk, ak, 0.0f,
                      kAnchored ? AnchorForm::plain : AnchorForm::none, false, factor, s);
        if constexpr (Weight::kSplit) {
          uint32_t master;
          if constexpr (sizeof(Low) == 2)
            master = master_bits(pk);
          else if constexpr (Weight::kStochastic)
            master = master_bits(pk, rounding_byte(part<kParts>(random[j], k)));
          else
            master = master_bits(pk, nearest_rounding(pk));
          constexpr uint32_t kMask = kPairs ? (1u << 8 * sizeof(Low)) - 1u : ~0u;
          lowj = with_part<kParts>(lowj, (master >> (16 - 8 * sizeof(Low))) & kMask, k);
          weights[k][j] = weight_high(master) >> 16;
          pj = with_high<kParts>(pj, weight_high(master), k);
        } else if constexpr (Weight::kStochastic) {
          pj = with_high<kParts>(pj, stochastic_high(pk, part<kParts>(random[j], k)), k);
        } else {
          pj = with_rounded<kParts>(pj, pk, k);
        }
        if constexpr (kCodes) {
          const float root = square_root(vk);
          block_m[k][j] = mk;
          block_root[k][j] = root;
          size1[k][j] = float_bits(mk) & 0x7fffffffu;
          size2[k][j] = float_bits(root) & 0x7fffffffu;
        } else {
          mj = with_rounded<kParts>(mj, mk, k);
          vj = with_rounded<kParts>(vj, vk, k);
        }
      }
      new_p[j] = pj;
      new_low[j] = lowj;
      new_m[j] = mj;
      new_v[j] = vj;
    }
    store_parts<kParts>(new_p, x.p + i);
    if constexpr (Weight::kSplit) {
      store_parts<kParts>(new_low, x.low + i);
      if constexpr (kPairs) {
        lanes.sum += (weights[0] + weights[1]) * lanes.place;
        lanes.later += weights[1];
      } else {
        lanes.sum += weights[0] * lanes.place;
      }
    }
    if constexpr (kCodes) {
      for (int k = 0; k < kParts; ++k) {
        lanes.most1 = size1[k] > lanes.most1 ? size1[k] : lanes.most1;
        lanes.most2 = size2[k] > lanes.most2 ? size2[k] : lanes.most2;
        store_lanes(block_m[k], block->m + at + k * kLaneCount);
        store_lanes(block_root[k], block->root + at + k * kLaneCount);
      }
    } else {
      store_parts<kParts>(new_m, x.m + i);
      store_parts<kParts>(new_v, x.v + i);
    }
  }

  // Steps n elements, of a block where moments are codes. What is left over after whole vectors is copied to arrays
  // that hold one, and back.
  static void step(const AdamWEntry& e, const Arrays& x, int64_t n, float factor, const AdamWScalars<float>& scalars,
                   LeanBlock* block, uint32_t first, uint32_t* sum) {
    const AdamWScalars<float> s = scalars;
    LeanLanes<kParts> lanes(first);
    if constexpr (kCodes) {
      lanes.scale1 = e.exp_avg_scales[block->scale];
      lanes.scale2 = e.exp_avg_sq_scales[block->scale];
    }
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide) {
      step_lanes(x, i, factor, s, block, i, lanes);
      lanes.place += 4u * kWide;
    }
    if constexpr (Weight::kSplit)
      for (int j = 0; j < kLaneCount; ++j) *sum += lanes.sum[j] + 4u * lanes.later[j];
    if (i < n) step_rest(x, i, n, factor, s, block, lanes, first, sum);
    if constexpr (kCodes) {
      block->most1 = lanes.most1;
      block->most2 = lanes.most2;
    }
  }

  static __attribute__((noinline)) void step_rest(const Arrays& x, int64_t i, int64_t n, float factor,
                                                  const AdamWScalars<float>& s, LeanBlock* block,
                                                  LeanLanes<kParts>& lanes, uint32_t first, uint32_t* sum) {
    Stored p[kWide] = {}, g[kWide] = {};
    Low low[kWide] = {};
    uint16_t random[kWide] = {};
    Moment m[kWide] = {}, v[kWide] = {};
    Anchor a[kWide] = {};
    const size_t rest = static_cast<size_t>(n - i);
    const auto copy = [rest](auto* to, const auto* from) { memcpy(to, from, rest * sizeof *to); };
    copy(p, x.p + i);
    copy(g, x.g + i);
    copy(m, x.m + i);
    copy(v, x.v + i);
    if constexpr (Weight::kSplit) copy(low, x.low + i);
    if constexpr (Weight::kStochastic) copy(random, x.random + i);
    if constexpr (kAnchored) copy(a, x.a + i);
    step_lanes({p, g, low, random, m, v, a}, 0, factor, s, block, i, lanes);
    copy(x.p + i, p);
    if constexpr (!kCodes) {
      copy(x.m + i, m);
      copy(x.v + i, v);
    }
    if constexpr (Weight::kSplit) {
      copy(x.low + i, low);
      for (size_t j = 0; j < rest; ++j) *sum += weight_term(p[j], first + static_cast<uint32_t>(i + j));
    }
  }

  // Encodes the block's elements of the lanes from i on into m and v.
  static inline __attribute__((always_inline)) void encode_lanes(Moment* to_m, Moment* to_v, int64_t i,
                                                                 const LeanBlock& block, float inverse1, float inverse2,
                                                                 const LeanOffsets& offsets) {
    FloatLanes m[kParts], root[kParts];
    WordLanes offset1[kParts], offset2[kParts], codes1, codes2;
    for (int k = 0; k < kParts; ++k) {
      m[k] = load_lanes(block.m + i + k * kLaneCount);
      root[k] = load_lanes(block.root + i + k * kLaneCount);
      offset1[k] = load_lanes(offsets.first + i + k * kLaneCount);
      offset2[k] = load_lanes(offsets.second + i + k * kLaneCount);
    }
#pragma GCC ivdep
    for (int j = 0; j < kLaneCount; ++j) {
      uint32_t first = 0, second = 0;
#pragma GCC unroll 2
      for (int k = 0; k < kParts; ++k) {
        first = with_part<kParts>(first, encode_first_at(m[k][j], inverse1, offset1[k][j]), k);
        second = with_part<kParts>(second, encode_second_at(root[k][j], inverse2, offset2[k][j]), k);
      }
      codes1[j] = first;
      codes2[j] = second;
    }
    store_parts<kParts>(codes1, to_m);
    store_parts<kParts>(codes2, to_v);
  }

  // Encodes the block's n elements.
  static void encode(const AdamWEntry& e, const Arrays& x, int64_t n, const LeanBlock& block,
                     const LeanOffsets& offsets) {
    uint32_t most1 = 0, most2 = 0;
    for (int j = 0; j < kLaneCount; ++j) {
      most1 = std::max(most1, static_cast<uint32_t>(block.most1[j]));
      most2 = std::max(most2, static_cast<uint32_t>(block.most2[j]));
    }
    const Scale8 scale1 = scale8(bits_float(most1), kTop1), scale2 = scale8(bits_float(most2), kTop2);
    e.exp_avg_scales[block.scale] = scale1.scale;
    e.exp_avg_sq_scales[block.scale] = scale2.scale;
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide)
      encode_lanes(x.m + i, x.v + i, i, block, scale1.inverse, scale2.inverse, offsets);
    if (i == n) return;
    Moment m[kWide], v[kWide];
    encode_lanes(m, v, i, block, scale1.inverse, scale2.inverse, offsets);
    memcpy(x.m + i, m, static_cast<size_t>(n - i));
    memcpy(x.v + i, v, static_cast<size_t>(n - i));
  }

  static Arrays arrays_at(const AdamWEntry& e, int64_t at, const uint16_t* random) {
    return {static_cast<Stored*>(e.param) + at,
            static_cast<const Stored*>(e.grad) + at,
            static_cast<Low*>(e.low_bits) + (Weight::kSplit ? at : 0),
            random,
            static_cast<Moment*>(e.exp_avg) + at,
            static_cast<Moment*>(e.exp_avg_sq) + at,
            static_cast<const Anchor*>(e.anchor) + (kAnchored ? at : 0)};
  }

  // Steps the elements [at, at + length) of the entry, the first of which is element `first` of its unit, and adds the
  // weight_term() of each to *sum.
  static void run(const AdamWEntry& e, int64_t at, int64_t length, float factor, const AdamWScalars<float>& s,
                  const LeanOffsets& offsets, uint32_t first, uint32_t* sum) {
    RoundingBits rounding;
    if constexpr (kCodes) {
      LeanBlock block;
      for (const int64_t stop = at + length; at < stop;) {
        const Block8 place(e, at);
        block.scale = place.scale;
        const Arrays x = arrays_at(e, at, Weight::kStochastic ? rounding.fill(e, 0, at, place.n) : nullptr);
        step(e, x, place.n, factor, s, &block, first, sum);
        encode(e, x, place.n, block, offsets);
        at += place.n;
        first += kBlock8;
      }
    } else {
      for (const int64_t stop = at + length; at < stop;) {
        const int64_t n = Weight::kStochastic ? smaller(kBlock, stop - at) : stop - at;
        const Arrays x = arrays_at(e, at, Weight::kStochastic ? rounding.fill(e, 0, at, n) : nullptr);
        step(e, x, n, factor, s, nullptr, first, sum);
        at += n;
        first += static_cast<uint32_t>(n);
      }
    }
  }
};

struct LeanLoop {
  using Run = void (*)(const AdamWEntry& e, int64_t at, int64_t length, float factor, const AdamWScalars<float>& s,
                       const LeanOffsets& offsets, uint32_t first, uint32_t* sum);
  Run run = nullptr;
  uint32_t parts = 0;  // with 8-bit moments, those of its offsets
};

template <class Weight, typename Anchor>
inline LeanLoop lean_by_moment(DType state) {
  switch (state) {
    case DType::f32:
      return {Lean<Weight, float, Anchor>::run, 0};
    case DType::bf16:
      return {Lean<Weight, bfloat16, Anchor>::run, 0};
    case DType::u8:
      return {Lean<Weight, uint8_t, Anchor>::run, Lean<Weight, uint8_t, Anchor>::kParts};
    default:
      return {};
  }
}

template <class Weight>
inline LeanLoop lean_by_anchor(const AdamWEntry& e) {
  if (e.anchor == nullptr) return lean_by_moment<Weight, Nothing>(e.state_dtype);
  if (e.anchor_dtype == DType::f32) return lean_by_moment<Weight, float>(e.state_dtype);
  if (std::is_same<typename Weight::Stored, bfloat16>::value && e.anchor_dtype == DType::bf16)
    return lean_by_moment<Weight, bfloat16>(e.state_dtype);
  return {};
}

// The loop for an entry; one without a run where there is none.
inline LeanLoop lean_loop(const AdamWEntry& e, const AdamWOptions& options) {
  const AnchorForm form = form_of(e.anchoring);
  if (e.mask || options.amsgrad || e.grad_dtype != e.dtype) return {};
  if (form != AnchorForm::none && form != AnchorForm::plain) return {};
  if (e.dtype == DType::f32) {
    // Plain loops over arrays of one dtype need none of this.
    const bool in_place = e.state_dtype == DType::f32 && (e.anchor == nullptr || e.anchor_dtype == DType::f32);
    return in_place ? LeanLoop{} : lean_by_anchor<Weight<float>>(e);
  }
  if (e.dtype != DType::bf16) return {};
  if (e.low_width == 16) return lean_by_anchor<Weight<bfloat16, uint16_t>>(e);
  if (e.low_width == 8 && e.stochastic) return lean_by_anchor<Weight<bfloat16, uint8_t, true>>(e);
  if (e.low_width == 8) return lean_by_anchor<Weight<bfloat16, uint8_t>>(e);
  return e.stochastic ? lean_by_anchor<Weight<bfloat16, Nothing, true>>(e) : lean_by_anchor<Weight<bfloat16>>(e);
}

}  // namespace
}  // namespace fastft::cpu
