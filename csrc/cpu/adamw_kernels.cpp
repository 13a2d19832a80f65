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
constexpr int64_t kLanes = 16;

// sums[i % kLanes] = add(i, sums[i % kLanes]) for i in [0, n), where live.
template <typename Add>
inline void add_to_lanes(double (&sums)[kLanes], int64_t n, const uint8_t* mask, const Add& add) {
  double lanes[kLanes];  // which nothing else can point to
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = sums[j];
  int64_t i = 0;
  if (mask == nullptr)
    for (; i + kLanes <= n; i += kLanes)
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] = add(i + j, lanes[j]);
  for (; i < n; ++i)
    if (mask == nullptr || mask[i]) lanes[i % kLanes] = add(i, lanes[i % kLanes]);
  for (int64_t j = 0; j < kLanes; ++j) sums[j] = lanes[j];
}

inline double total(const double (&sums)[kLanes]) {
  double total = 0.0;
  for (double s : sums) total += s;
  return total;
}

struct SelectiveLanes {
  double uphill[kLanes] = {}, before[kLanes] = {}, after[kLanes] = {};

  template <typename T>
  void add_before(const T* p, const T* g, const T* a, int64_t n, const uint8_t* mask) {
    add_to_lanes(uphill, n, mask, [&](int64_t i, double sum) {
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
  static void add_distance(double (&sums)[kLanes], const T* p, const T* a, int64_t n, const uint8_t* mask) {
    add_to_lanes(sums, n, mask, [&](int64_t i, double sum) {
      const double delta = static_cast<double>(p[i]) - static_cast<double>(a[i]);
      return madd(delta, delta, sum);
    });
  }
};

// Σ weight_term() over live elements [begin, end), | 1: how a chunk's weights are known again.
inline uint32_t chunk_sum(const AdamWEntry& e, int64_t begin, int64_t end) {
  uint32_t sum = 0, first = 0;
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    sum += weight_sum(e, offset, length, first);
    first += static_cast<uint32_t>(length);
  });
  return sum | 1u;
}

template <typename T>
void update_as(const AdamWEntry& e, int64_t begin, int64_t end, const AdamWOptions& options, double grad_factor,
               bool trusted, SelectiveLanes* lanes) {
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
      T* p = load_weights(e, trusted, at, n, p_);
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
      if (lanes) lanes->add_after(load_weights(e, true, at, n, p_), a, n, mask);
    }
  });
}

void update(const AdamWEntry& e, int64_t begin, int64_t end, const AdamWOptions& options, double grad_factor,
            uint32_t* weight_sum, SelectiveSums* sums) {
  const bool trusted = weight_sum == nullptr || *weight_sum == 0 || *weight_sum == chunk_sum(e, begin, end);
  if (const LeanRun lean = trusted ? lean_run(e, options) : nullptr) {
    const AdamWScalars<float> scalars = adamw_scalars<float>(options, e.bias1, e.bias2, e.anchoring);
    uint32_t sum = 0, first = 0;
    for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
      lean(e, offset, length, static_cast<float>(grad_factor), scalars, first, &sum);
      first += static_cast<uint32_t>(length);
    });
    if (weight_sum) *weight_sum = sum | 1u;
    return;
  }
  const bool selective = form_of(e.anchoring) == AnchorForm::selective;
  SelectiveLanes lanes;
  const auto update = e.dtype == DType::f64 ? update_as<double> : update_as<float>;
  update(e, begin, end, options, grad_factor, trusted, selective ? &lanes : nullptr);
  if (selective) *sums = {total(lanes.uphill), total(lanes.before), total(lanes.after)};
  if (weight_sum) *weight_sum = chunk_sum(e, begin, end);
}

template <typename T>
void project_as(const AdamWEntry& e, int64_t begin, int64_t end, T pull) {
  alignas(64) T p_[kBlock], a_[kBlock];
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    for (int64_t at = offset, stop = offset + length; at < stop; at += kBlock) {
      const int64_t n = smaller(kBlock, stop - at);
      const uint8_t* mask = e.mask ? e.mask + at : nullptr;
      T* __restrict p = load_weights(e, true, at, n, p_);
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

void project(const AdamWEntry& e, int64_t begin, int64_t end, double pull, uint32_t* weight_sum) {
  if (e.dtype == DType::f64)
    project_as<double>(e, begin, end, pull);
  else
    project_as<float>(e, begin, end, static_cast<float>(pull));
  if (weight_sum) *weight_sum = chunk_sum(e, begin, end);
}

template <typename T>
double sum_of_squares_as(const AdamWEntry& e, int64_t begin, int64_t end) {
  alignas(64) T g_[kBlock];
  double sums[kLanes] = {};
  for_each_run(e, begin, end, [&](int64_t offset, int64_t length) {
    for (int64_t at = offset, stop = offset + length; at < stop; at += kBlock) {
      const int64_t n = smaller(kBlock, stop - at);
      T* g = load(e.grad, e.grad_dtype, at, n, g_);
      if (e.mask) {  // a masked-out gradient may be NaN: it must be left out, not multiplied by 0
        for (int64_t i = 0; i < n; ++i) g_[i] = e.mask[at + i] ? g[i] : T(0);
        g = g_;
      }
      add_to_lanes(sums, n, nullptr, [&](int64_t i, double sum) {
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
