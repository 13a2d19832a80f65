// Compiled once per instruction set, FASTFT_KERNELS naming the result. Everything but that result has internal
// linkage, so the linker can never hand one set's code to the other.
#include "adamw_kernels.h"

#include "adamw_lean.h"
#include "low_precision.h"

namespace fastft::cpu {
namespace {

// The live elements [begin, end) as runs of consecutive memory: run(offset, length).
template <typename Run>
inline void for_each_run(const AdamWEntry& e, int64_t begin, int64_t end, const Run& run) {
  if (e.rows == nullptr) return run(begin, end - begin);
  while (begin < end) {
    const int64_t first = begin / e.row_size;
    const int64_t column = begin - first * e.row_size;
    int64_t last = first + 1;  // adjacent rows make one run
    while (last * e.row_size < end && e.rows[last] == e.rows[last - 1] + 1) ++last;
    const int64_t length = smaller(end, last * e.row_size) - begin;
    run(e.rows[first] * e.row_size + column, length);
    begin += length;
  }
}

template <AnchorForm kForm, bool kAmsgrad, bool kMasked, typename T>
inline void update_elements(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v,
                            T* __restrict vmax, const T* __restrict a, const T* __restrict f,
                            const uint8_t* __restrict mask, int64_t n, T grad_factor, const AdamWScalars<T>& scalars) {
  constexpr bool kAnchored = kForm != AnchorForm::none, kWeighted = kForm == AnchorForm::weighted;
  const AdamWScalars<T> s = scalars;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T pi = p[i], mi = m[i], vi = v[i], xi = kAmsgrad ? vmax[i] : T(0);
    adamw_element(pi, g[i], mi, vi, xi, kAnchored ? a[i] : T(0), kWeighted ? f[i] : T(0), kForm, kAmsgrad, grad_factor,
                  s);
    const bool live = !kMasked || mask[i] != 0;
    p[i] = live ? pi : p[i];
    m[i] = live ? mi : m[i];
    v[i] = live ? vi : v[i];
    if (kAmsgrad) vmax[i] = live ? xi : vmax[i];
  }
}

template <typename T>
using UpdateElements = void (*)(T*, const T*, T*, T*, T*, const T*, const T*, const uint8_t*, int64_t, T,
                                const AdamWScalars<T>&);

template <AnchorForm kForm, typename T>
UpdateElements<T> choose(bool amsgrad, bool masked) {
  static constexpr UpdateElements<T> table[4] = {
      update_elements<kForm, false, false, T>,
      update_elements<kForm, false, true, T>,
      update_elements<kForm, true, false, T>,
      update_elements<kForm, true, true, T>,
  };
  return table[amsgrad * 2 + masked];
}

template <typename T>
UpdateElements<T> choose(AnchorForm form, bool amsgrad, bool masked) {
  switch (form) {
    case AnchorForm::plain:
      return choose<AnchorForm::plain, T>(amsgrad, masked);
    case AnchorForm::weighted:
      return choose<AnchorForm::weighted, T>(amsgrad, masked);
    default:
      return choose<AnchorForm::none, T>(amsgrad, masked);
  }
}

// Independent sums, so that the additions neither wait for each other nor depend on the vector width.
constexpr int64_t kSums = 32;

// sums[i % kSums] = add(i, sums[i % kSums]) for i in [0, n), where live.
template <typename Add>
inline void add_to_sums(double (&sums)[kSums], int64_t n, const uint8_t* mask, const Add& add) {
  int64_t i = 0;
  if (mask == nullptr && n >= kSums) {
    DoubleLanes lanes[kSums / kDoubleCount];  // in registers; of an array GCC takes most numbers apart
    memcpy(lanes, sums, sizeof lanes);
    for (; i + kSums <= n; i += kSums) {
#pragma GCC unroll 16
      for (int64_t first = 0; first < kSums; first += kDoubleCount) {
        DoubleLanes& before = lanes[first / kDoubleCount];
        DoubleLanes after;
#pragma GCC ivdep
        for (int j = 0; j < kDoubleCount; ++j) after[j] = add(i + first + j, before[j]);
        before = after;
      }
    }
    memcpy(sums, lanes, sizeof lanes);
  }
  for (; i < n; ++i)
    if (mask == nullptr || mask[i]) sums[i % kSums] = add(i, sums[i % kSums]);
}

inline double total(const double (&sums)[kSums]) {
  double total = 0.0;
  for (double s : sums) total += s;
  return total;
}

struct SelectiveLanes {
  double uphill[kSums] = {}, before[kSums] = {}, after[kSums] = {};

  template <typename T>
  void add_before(const T* p, const T* g, const T* a, int64_t n, const uint8_t* mask) {
    add_to_sums(uphill, n, mask, [&](int64_t i, double sum) {
      return madd(static_cast<double>(g[i]), static_cast<double>(p[i]) - static_cast<double>(a[i]), sum);
    });
    add_distance(before, p, a, n, mask);
  }

  template <typename T>
  void add_after(const T* p, const T* a, int64_t n, const uint8_t* mask) {
    add_distance(after, p, a, n, mask);
  }

 private:
  template <typename T>
  static void add_distance(double (&sums)[kSums], const T* p, const T* a, int64_t n, const uint8_t* mask) {
    add_to_sums(sums, n, mask, [&](int64_t i, double sum) {
      const double delta = static_cast<double>(p[i]) - static_cast<double>(a[i]);
      return madd(delta, delta, sum);
    });
  }
};

// As for_each_run(), over live elements [begin, end) that are whole blocks where moments are in 8 bits: run(offset,
// length, first), first: counted in the unit that begins at `begin` (weight_term).
template <typename Run>
inline void for_each_unit_run(const AdamWEntry& e, int64_t begin, int64_t end, const Run& run) {
  uint32_t first = 0;
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    run(offset, length, first);
    if (e.state_dtype != DType::u8) {
      first += static_cast<uint32_t>(length);
    } else {
      for (int64_t at = offset, n; at < offset + length; at += n, first += kBlock8) n = Block8(e, at).n;
    }
  });
}

// Σ weight_term() over the unit of live elements [begin, end), | 1: how its weights are known again.
inline uint32_t unit_sum(const AdamWEntry& e, int64_t begin, int64_t end) {
  uint32_t sum = 0;
  for_each_unit_run(e, begin, end, [&](int64_t offset, int64_t length, uint32_t first) {
    if (e.state_dtype != DType::u8 || e.block_row % kBlock8 == 0) {
      sum += weight_sum(e, offset, length, first);
      return;
    }
    for (int64_t at = offset, n; at < offset + length; at += n, first += kBlock8) {
      n = Block8(e, at).n;
      sum += weight_sum(e, at, n, first);
    }
  });
  return sum | 1u;
}

// work(begin, end, &its sum) for each unit of live elements [begin, end), of which the first is `unit`.
template <typename Work>
inline void for_each_unit(const AdamWEntry& e, int64_t begin, int64_t end, int64_t unit, const Work& work) {
  for (int64_t next; begin < end; ++unit, begin = next) {
    next = e.unit_begin(unit + 1);
    work(begin, next, e.weight_sums + unit);
  }
}

// Clears the low bits of a unit that somebody else has written since its sum was taken, also where they are masked out.
inline void check_unit(const AdamWEntry& e, int64_t begin, int64_t end, const uint32_t* sum) {
  if (*sum == 0 || *sum == unit_sum(e, begin, end)) return;
  const int64_t size = e.low_width / 8;
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    memset(static_cast<char*>(e.low_bits) + offset * size, 0, static_cast<size_t>(length * size));
  });
}

inline void remember_units(const AdamWEntry& e, int64_t begin, int64_t end, int64_t unit) {
  for_each_unit(e, begin, end, unit,
                [&](int64_t first, int64_t last, uint32_t* sum) { *sum = unit_sum(e, first, last); });
}

template <typename T>
void update_as(const AdamWEntry& e, int64_t begin, int64_t end, const AdamWOptions& options, double grad_factor,
               SelectiveLanes* lanes) {
  const bool codes = e.state_dtype == DType::u8;
  const AdamWScalars<T> scalars = adamw_scalars<T>(options, e.bias1, e.bias2, e.anchoring);
  const UpdateElements<T> elements = choose<T>(form_of(e.anchoring), options.amsgrad, e.mask != nullptr);
  const T factor = static_cast<T>(grad_factor);
  alignas(64) T p_[kBlock], g_[kBlock], m_[kBlock], v_[kBlock], x_[kBlock], a_[kBlock], f_[kBlock];
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    // Nothing to widen: the whole run at once, unless it is looked at again while it is in the cache.
    const bool in_place = e.dtype == native<T> && e.state_dtype == native<T> && e.grad_dtype == native<T> &&
                          (e.anchor == nullptr || e.anchor_dtype == native<T>) &&
                          (e.importance == nullptr || e.importance_dtype == native<T>);
    const int64_t step = in_place && lanes == nullptr ? length : kBlock;
    for (int64_t at = offset, stop = offset + length, n; at < stop; at += n) {
      n = codes ? Block8(e, at).n : smaller(step, stop - at);
      const uint8_t* mask = e.mask ? e.mask + at : nullptr;
      T* p = load_weights(e, at, n, p_);
      T* g = load(e.grad, e.grad_dtype, at, n, g_);
      T *m = m_, *v = v_;
      if constexpr (std::is_same<T, float>::value)
        if (codes) Block8(e, at).load(e, m_, v_);
      if (!codes) {
        m = load(e.exp_avg, e.state_dtype, at, n, m_);
        v = load(e.exp_avg_sq, e.state_dtype, at, n, v_);
      }
      T* x = options.amsgrad ? load(e.max_exp_avg_sq, e.state_dtype, at, n, x_) : nullptr;
      T* a = load(e.anchor, e.anchor_dtype, at, n, a_);
      T* f = load(e.importance, e.importance_dtype, at, n, f_);
      if (lanes) lanes->add_before(p, g, a, n, mask);
      elements(p, g, m, v, x, a, f, mask, n, factor, scalars);
      store_weights(e, 0, p, at, n, mask);
      if constexpr (std::is_same<T, float>::value)
        if (codes) Block8(e, at).store(e, m, v, mask);
      if (!codes) {
        store(m, e.exp_avg, e.state_dtype, at, n, mask);
        store(v, e.exp_avg_sq, e.state_dtype, at, n, mask);
      }
      if (x) store(x, e.max_exp_avg_sq, e.state_dtype, at, n, mask);
      if (lanes) lanes->add_after(load_weights(e, at, n, p_), a, n, mask);
    }
  });
}

void update_lean(const LeanLoop& loop, const AdamWEntry& e, int64_t begin, int64_t end, int64_t unit,
                 const AdamWOptions& options, float factor) {
  const AdamWScalars<float> scalars = adamw_scalars<float>(options, e.bias1, e.bias2, e.anchoring);
  LeanOffsets offsets;
  if (loop.parts != 0) offsets.fill(e.t, loop.parts);
  if (e.low_width == 0) {
    uint32_t unused = 0;
    for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
      loop.run(e, offset, length, factor, scalars, offsets, 0, &unused);
    });
    return;
  }
  for_each_unit(e, begin, end, unit, [&](int64_t first, int64_t last, uint32_t* sum) {
    check_unit(e, first, last, sum);
    uint32_t now = 0;
    for_each_unit_run(e, first, last, [&](int64_t offset, int64_t length, uint32_t place) {
      loop.run(e, offset, length, factor, scalars, offsets, place, &now);
    });
    *sum = now | 1u;
  });
}

void update(const AdamWEntry& e, int64_t begin, int64_t end, int64_t unit, const AdamWOptions& options,
            double grad_factor, SelectiveSums* sums) {
  const LeanLoop lean = lean_loop(e, options);
  if (lean.run) return update_lean(lean, e, begin, end, unit, options, static_cast<float>(grad_factor));
  if (e.low_width != 0)
    for_each_unit(e, begin, end, unit,
                  [&](int64_t first, int64_t last, uint32_t* sum) { check_unit(e, first, last, sum); });
  const bool selective = form_of(e.anchoring) == AnchorForm::selective;
  SelectiveLanes lanes;
  const auto update = e.dtype == DType::f64 ? update_as<double> : update_as<float>;
  update(e, begin, end, options, grad_factor, selective ? &lanes : nullptr);
  if (selective) *sums = {total(lanes.uphill), total(lanes.before), total(lanes.after)};
  if (e.low_width != 0) remember_units(e, begin, end, unit);
}

template <typename T>
void project_as(const AdamWEntry& e, int64_t begin, int64_t end, T pull) {
  alignas(64) T p_[kBlock], a_[kBlock];
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    for (int64_t at = offset, stop = offset + length; at < stop; at += kBlock) {
      const int64_t n = smaller(kBlock, stop - at);
      const uint8_t* mask = e.mask ? e.mask + at : nullptr;
      T* __restrict p = load_weights(e, at, n, p_);
      const T* __restrict a = load(e.anchor, e.anchor_dtype, at, n, a_);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const T moved = selective_element(p[i], a[i], pull);
        p[i] = mask == nullptr || mask[i] ? moved : p[i];
      }
      store_weights(e, 1, p, at, n, mask);
    }
  });
}

void project(const AdamWEntry& e, int64_t begin, int64_t end, int64_t unit, double pull) {
  if (e.dtype == DType::f64)
    project_as<double>(e, begin, end, pull);
  else
    project_as<float>(e, begin, end, static_cast<float>(pull));
  if (e.low_width != 0) remember_units(e, begin, end, unit);
}

template <typename T>
double sum_of_squares_as(const AdamWEntry& e, int64_t begin, int64_t end) {
  alignas(64) T g_[kBlock];
  double sums[kSums] = {};
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    for (int64_t at = offset, stop = offset + length; at < stop; at += kBlock) {
      const int64_t n = smaller(kBlock, stop - at);
      T* g = load(e.grad, e.grad_dtype, at, n, g_);
      if (e.mask) {  // a masked-out gradient may be NaN: it must be left out, not multiplied by 0
        for (int64_t i = 0; i < n; ++i) g_[i] = e.mask[at + i] ? g[i] : T(0);
        g = g_;
      }
      add_to_sums(sums, n, nullptr, [&](int64_t i, double sum) {
        const double x = g[i];
        return madd(x, x, sum);
      });
    }
  });
  return total(sums);
}

double sum_of_squares(const AdamWEntry& e, int64_t begin, int64_t end) {
  return e.grad_dtype == DType::f64 ? sum_of_squares_as<double>(e, begin, end)
                                    : sum_of_squares_as<float>(e, begin, end);
}

}  // namespace

extern const AdamWKernels FASTFT_KERNELS = {FASTFT_INSTRUCTION_SET, sum_of_squares, update, project};

}  // namespace fastft::cpu
