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

// A block of 8-bit moments: where its scales stand, and what it becomes before it is encoded.
struct LeanBlock {
  int64_t scale;
  WordLanes most1, most2;  // the largest absolute values, as integers (Block8::store)
  alignas(64) float m[kBlock8], root[kBlock8];
};

// The offset8() of the elements of a block in this step.
struct LeanOffsets {
  alignas(64) uint32_t first[kBlock8], second[kBlock8];

  explicit LeanOffsets(double t) {
    const uint32_t step = static_cast<uint32_t>(static_cast<uint64_t>(t));
    for (uint32_t i = 0; i < kBlock8; ++i) {
      const uint32_t dither = dither8(step, i);
      first[i] = offset8(dither, kShift1);
      second[i] = offset8(dither, kShift2);
    }
  }
};

// What adds up over the lanes of a run.
struct LeanLanes {
  WordLanes sum = {}, most1 = {}, most2 = {};  // Σ weight_term(), and as in LeanBlock
  WordLanes place;                             // the weight_term() of a weight of 1
  float scale1 = 0.0f, scale2 = 0.0f;          // of the codes as they were

  explicit LeanLanes(uint32_t first) : place(4u * (kLaneNumbers + first) + 2u) {}
};

template <class Weight, typename Moment, typename Anchor>
struct Lean {
  using Stored = typename Weight::Stored;
  using Low = typename Weight::Low;
  using Arrays = LeanArrays<Weight, Moment, Anchor>;
  static constexpr bool kCodes = std::is_same<Moment, uint8_t>::value,
                        kAnchored = !std::is_same<Anchor, Nothing>::value;

  // Steps the lanes from i on, which are those from `lane` on of the block.
  static inline __attribute__((always_inline)) void step_lanes(const Arrays& x, int64_t i, float factor,
                                                               const AdamWScalars<float>& s, LeanBlock* block,
                                                               int64_t lane, LeanLanes& lanes) {
    const lanes_of<Stored> p = load_lanes(x.p + i), g = load_lanes(x.g + i);
    lanes_of<Stored> new_p;
    SignedLanes low;
    WordLanes random, codes1, codes2, new_low;
    lanes_of<std::conditional_t<kCodes, float, Moment>> m, v, new_m, new_v;
    lanes_of<std::conditional_t<kAnchored, Anchor, float>> a;
    if constexpr (Weight::kSplit) low = load_signed_lanes(x.low + i);
    if constexpr (Weight::kStochastic) random = load_lanes(x.random + i);
    if constexpr (kAnchored) a = load_lanes(x.a + i);
    if constexpr (kCodes) {
      codes1 = load_lanes(x.m + i);
      codes2 = load_lanes(x.v + i);
    } else {
      m = load_lanes(x.m + i);
      v = load_lanes(x.v + i);
    }
    WordLanes size1, size2;
#pragma GCC ivdep
    for (int j = 0; j < kLaneCount; ++j) {
      float pj, mj, vj, xj = 0.0f, aj = 0.0f;
      if constexpr (Weight::kSplit)
        pj = join(p[j], low[j], 8 * sizeof(Low));
      else
        pj = widen_lane<Stored>(p, j);
      if constexpr (kCodes) {
        mj = decode_first(codes1[j], lanes.scale1);
        vj = decode_second(codes2[j], lanes.scale2);
      } else {
        mj = widen_lane<Moment>(m, j);
        vj = widen_lane<Moment>(v, j);
      }
      if constexpr (kAnchored) aj = widen_lane<Anchor>(a, j);
      adamw_element(pj, widen_lane<Stored>(g, j), mj, vj, xj, aj, 0.0f,
                    kAnchored ? AnchorForm::plain : AnchorForm::none, false, factor, s);
      if constexpr (Weight::kSplit) {
        uint32_t master;
        if constexpr (sizeof(Low) == 2)
          master = master_bits(pj);
        else if constexpr (Weight::kStochastic)
          master = master_bits(pj, eight_bits(random[j]));
        else
          master = master_bits(pj, nearest_rounding(pj));
        new_p[j] = weight_bits(master);
        new_low[j] = master >> (16 - 8 * sizeof(Low));
      } else if constexpr (Weight::kStochastic) {
        bfloat16 weight;
        narrow_stochastic(pj, random[j], &weight);
        new_p[j] = weight.bits;
      } else {
        narrow_lane(pj, new_p, j);
      }
      if constexpr (kCodes) {
        const float root = square_root(vj);
        new_m[j] = mj;
        new_v[j] = root;
        size1[j] = float_bits(mj) & 0x7fffffffu;
        size2[j] = float_bits(root) & 0x7fffffffu;
      } else {
        narrow_lane(mj, new_m, j);
        narrow_lane(vj, new_v, j);
      }
    }
    store_lanes(new_p, x.p + i);
    if constexpr (Weight::kSplit) {
      store_lanes(new_low, x.low + i);
      lanes.sum += new_p * lanes.place;
    }
    if constexpr (kCodes) {
      lanes.most1 = size1 > lanes.most1 ? size1 : lanes.most1;
      lanes.most2 = size2 > lanes.most2 ? size2 : lanes.most2;
      store_lanes(new_m, block->m + lane);
      store_lanes(new_v, block->root + lane);
    } else {
      store_lanes(new_m, x.m + i);
      store_lanes(new_v, x.v + i);
    }
  }

  // Steps n elements, of a block where moments are codes. What is left over after whole vectors is copied to arrays
  // that hold one, and back.
  static void step(const AdamWEntry& e, const Arrays& x, int64_t n, float factor, const AdamWScalars<float>& scalars,
                   LeanBlock* block, uint32_t first, uint32_t* sum) {
    const AdamWScalars<float> s = scalars;
    LeanLanes lanes(first);
    if constexpr (kCodes) {
      lanes.scale1 = e.exp_avg_scales[block->scale];
      lanes.scale2 = e.exp_avg_sq_scales[block->scale];
    }
    int64_t i = 0;
    for (; i + kLaneCount <= n; i += kLaneCount) {
      step_lanes(x, i, factor, s, block, i, lanes);
      lanes.place += 4u * kLaneCount;
    }
    if constexpr (Weight::kSplit)
      for (int j = 0; j < kLaneCount; ++j) *sum += lanes.sum[j];
    if (i < n) step_rest(x, i, n, factor, s, block, lanes, first, sum);
    if constexpr (kCodes) {
      block->most1 = lanes.most1;
      block->most2 = lanes.most2;
    }
  }

  static __attribute__((noinline)) void step_rest(const Arrays& x, int64_t i, int64_t n, float factor,
                                                  const AdamWScalars<float>& s, LeanBlock* block, LeanLanes& lanes,
                                                  uint32_t first, uint32_t* sum) {
    Stored p[kLaneCount] = {}, g[kLaneCount] = {};
    Low low[kLaneCount] = {};
    uint16_t random[kLaneCount] = {};
    Moment m[kLaneCount] = {}, v[kLaneCount] = {};
    Anchor a[kLaneCount] = {};
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

  // Encodes a block's n elements.
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
    for (int64_t i = 0; i < n; i += kLaneCount) {
      const FloatLanes m = load_lanes(block.m + i), root = load_lanes(block.root + i);
      const WordLanes first = load_lanes(offsets.first + i), second = load_lanes(offsets.second + i);
      WordLanes codes1, codes2;
#pragma GCC ivdep
      for (int j = 0; j < kLaneCount; ++j) {
        codes1[j] = encode_first_at(m[j], scale1.inverse, first[j]);
        codes2[j] = encode_second_at(root[j], scale2.inverse, second[j]);
      }
      if (i + kLaneCount <= n) {
        store_lanes(codes1, x.m + i);
        store_lanes(codes2, x.v + i);
      } else {
        uint8_t rest1[kLaneCount], rest2[kLaneCount];
        store_lanes(codes1, rest1);
        store_lanes(codes2, rest2);
        memcpy(x.m + i, rest1, static_cast<size_t>(n - i));
        memcpy(x.v + i, rest2, static_cast<size_t>(n - i));
      }
    }
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

  // Steps the elements [at, at + length) of the entry, the first of which is element `first` of its chunk, and adds the
  // weight_term() of each to *sum.
  static void run(const AdamWEntry& e, int64_t at, int64_t length, float factor, const AdamWScalars<float>& s,
                  uint32_t first, uint32_t* sum) {
    RoundingBits rounding;
    if constexpr (kCodes) {
      // A block is encoded once the next one has been stepped, so that neither waits for the other's last results.
      const LeanOffsets offsets(e.t);
      LeanBlock blocks[2];
      Arrays last = {};
      int64_t last_n = 0, which = 0;
      for (const int64_t stop = at + length; at < stop; which = 1 - which) {
        const Block8 block(e, at);
        blocks[which].scale = block.scale;
        const Arrays x = arrays_at(e, at, Weight::kStochastic ? rounding.fill(e, 0, at, block.n) : nullptr);
        step(e, x, block.n, factor, s, &blocks[which], first, sum);
        if (last_n > 0) encode(e, last, last_n, blocks[1 - which], offsets);
        last = x;
        last_n = block.n;
        at += block.n;
        first += static_cast<uint32_t>(block.n);
      }
      encode(e, last, last_n, blocks[1 - which], offsets);
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

using LeanRun = void (*)(const AdamWEntry& e, int64_t at, int64_t length, float factor, const AdamWScalars<float>& s,
                         uint32_t first, uint32_t* sum);

template <class Weight, typename Anchor>
inline LeanRun lean_by_moment(DType state) {
  switch (state) {
    case DType::f32:
      return Lean<Weight, float, Anchor>::run;
    case DType::bf16:
      return Lean<Weight, bfloat16, Anchor>::run;
    case DType::u8:
      return Lean<Weight, uint8_t, Anchor>::run;
    default:
      return nullptr;
  }
}

template <class Weight>
inline LeanRun lean_by_anchor(const AdamWEntry& e) {
  if (e.anchor == nullptr) return lean_by_moment<Weight, Nothing>(e.state_dtype);
  if (e.anchor_dtype == DType::f32) return lean_by_moment<Weight, float>(e.state_dtype);
  if (std::is_same<typename Weight::Stored, bfloat16>::value && e.anchor_dtype == DType::bf16)
    return lean_by_moment<Weight, bfloat16>(e.state_dtype);
  return nullptr;
}

// The loop for an entry whose low bits can be trusted; null where it has none.
inline LeanRun lean_run(const AdamWEntry& e, const AdamWOptions& options) {
  const AnchorForm form = form_of(e.anchoring);
  if (e.mask || options.amsgrad || e.grad_dtype != e.dtype) return nullptr;
  if (form != AnchorForm::none && form != AnchorForm::plain) return nullptr;
  if (e.dtype == DType::f32) {
    // Plain loops over arrays of one dtype need none of this.
    const bool in_place = e.state_dtype == DType::f32 && (e.anchor == nullptr || e.anchor_dtype == DType::f32);
    return in_place ? nullptr : lean_by_anchor<Weight<float>>(e);
  }
  if (e.dtype != DType::bf16) return nullptr;
  if (e.low_width == 16) return lean_by_anchor<Weight<bfloat16, uint16_t>>(e);
  if (e.low_width == 8 && e.stochastic) return lean_by_anchor<Weight<bfloat16, uint8_t, true>>(e);
  if (e.low_width == 8) return lean_by_anchor<Weight<bfloat16, uint8_t>>(e);
  return e.stochastic ? lean_by_anchor<Weight<bfloat16, Nothing, true>>(e) : lean_by_anchor<Weight<bfloat16>>(e);
}

}  // namespace
}  // namespace fastft::cpu
