// The AdamW step with decoupled decay and an anchor: the one place where its formulas stand.
//
//   g  = grad · grad_scale⁻¹ · clip              clip = min(1, max_grad_norm / (‖g‖₂ + 1e-6))
//   p  = p − lr·wd·p − pull·(p − a)              decoupled decay and anchor       (or, L2-SP: g += λ·F·(p − a))
//        pull = min(1, lr·λ), or with an importance F ≥ 0 for each element: lr·λ·F / (1 + lr·λ·F)
//   m  = m + (1−β₁)·(g − m)
//   v  = β₂·v + (1−β₂)·g²                        (v̂ = running maximum of v with amsgrad)
//   p  = p − lr/(1−β₁ᵗ) · m / (√v̂/√(1−β₂ᵗ) + ε)
//
// or, selectively, in place of any pull: once all of a tensor has been stepped from p to p̃ (which is stored),
//
//   if ⟨g, p − a⟩ > 0:   p = p̃ − min(1, λ·r)·(p̃ − a)      r = (‖p̃ − a‖₂ − ‖p − a‖₂) / ‖p̃ − a‖₂, 0 if negative
//
// With an importance the anchor's penalty is λ/2·F·(p − a)² (elastic weight consolidation), and its pull an implicit
// (proximal) step on it: p − a is divided by 1 + lr·λ·F. Fisher informations lie many orders of magnitude apart, so no
// one lr·λ suits an explicit step: min(1, lr·λ·F) would throw every heavy element back to the anchor at each step and
// distinguish none of them. The implicit step never overshoots, for no lr·λ, and keeps their order; for small lr·λ·F
// both are the same. Without an importance the bound on lr·λ is checked, and the explicit step is what users of a
// decoupled decay expect.
//
// Loshchilov & Hutter 2019 (https://arxiv.org/abs/1711.05101); Reddi et al. 2018 (https://arxiv.org/abs/1904.09237) for
// amsgrad; Li et al. 2018 (https://arxiv.org/abs/1802.01483) for the anchor; Kirkpatrick et al. 2017
// (https://arxiv.org/abs/1612.00796) for the importance; Tian et al. 2024 (https://arxiv.org/abs/2411.01713) for
// selective projection, whose bound at the anchor is ours. Everything is computed in float (double for double
// parameters).
#pragma once

#include <math.h>
#include <stdint.h>

#include "hd.h"

namespace fastft {

// How a tensor is anchored: chosen in fastft/optim/anchoring.py, exported under these names, and all that the formulas
// below go by. decoupled: p is pulled; l2: the penalty's gradient is added to g; each also weighted, by an importance F
// of each element; selective: projection after the step.
enum class Anchoring : uint8_t { none, decoupled, l2, decoupled_weighted, l2_weighted, selective };
constexpr const char* kAnchorings[] = {"none", "decoupled", "l2", "decoupled_weighted", "l2_weighted", "selective"};

// The forms that loops and kernels are instantiated for: nothing to read; the anchor; the anchor and its importance;
// the anchor, for sums over the whole tensor. Many kinds may share a form.
enum class AnchorForm : uint8_t { none, plain, weighted, selective };

FASTFT_HD constexpr AnchorForm form_of(Anchoring anchoring) {
  switch (anchoring) {
    case Anchoring::decoupled:
    case Anchoring::l2:
      return AnchorForm::plain;
    case Anchoring::decoupled_weighted:
    case Anchoring::l2_weighted:
      return AnchorForm::weighted;
    case Anchoring::selective:
      return AnchorForm::selective;
    default:
      return AnchorForm::none;
  }
}

// The options of one parameter group; doubles as in Python.
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay, anchor_decay;
  bool amsgrad, maximize;
};

// The same, made ready for step t: all that is equal for the elements of a tensor.
template <typename T>
struct AdamWScalars {
  T one_minus_beta1, beta2, one_minus_beta2;
  T step_size;    // lr / (1 − β₁ᵗ)
  T rsqrt_bias2;  // 1 / √(1 − β₂ᵗ)
  T eps;
  T decay;  // lr·wd
  T pull;   // min(1, lr·λ), weighted: lr·λ; 0 with an l2 anchor
  T l2;     // λ with an l2 anchor, else 0
};

// Of lr·λ and of lr·λ·F: far beyond what still makes a difference, and small enough to be computed with.
constexpr double kMostWeighted = 1e30;

// bias1 = 1 − β₁ᵗ, bias2 = 1 − β₂ᵗ for the step t being taken (t = 1 for the first).
FASTFT_HD double adamw_bias(double beta, double t) {
  return 1.0 - pow(beta, t);
}

template <typename T>
FASTFT_HD AdamWScalars<T> adamw_scalars(const AdamWOptions& o, double bias1, double bias2, Anchoring anchoring) {
  const bool weighted = form_of(anchoring) == AnchorForm::weighted;
  const bool l2 = anchoring == Anchoring::l2 || anchoring == Anchoring::l2_weighted;
  double pull = o.lr * o.anchor_decay;
  const double most = weighted ? kMostWeighted : 1.0;
  if (!(pull < most)) pull = most;
  if (weighted && pull < 0.0) pull = 0.0;  // schedulers end a hair below 0 now and then, where 1 + lr·λ·F may vanish
  AdamWScalars<T> s;
  s.one_minus_beta1 = static_cast<T>(1.0 - o.beta1);
  s.beta2 = static_cast<T>(o.beta2);
  s.one_minus_beta2 = static_cast<T>(1.0 - o.beta2);
  s.step_size = static_cast<T>(o.lr / bias1);
  s.rsqrt_bias2 = static_cast<T>(1.0 / square_root(bias2));
  s.eps = static_cast<T>(o.eps);
  s.decay = static_cast<T>(o.lr * o.weight_decay);
  s.pull = static_cast<T>(l2 ? 0.0 : pull);
  s.l2 = static_cast<T>(l2 ? o.anchor_decay : 0.0);
  return s;
}

// The factor that turns a stored gradient into g: sign for maximize, unscaling, clipping.
// norm is ‖grad‖₂ after unscaling; max_norm < 0 means no clipping.
FASTFT_HD double adamw_grad_factor(double grad_scale, double norm, double max_norm, bool maximize) {
  double factor = (maximize ? -1.0 : 1.0) / grad_scale;
  if (max_norm >= 0.0) {
    const double clip = max_norm / (norm + 1e-6);
    factor *= clip > 1.0 ? 1.0 : clip;  // a NaN norm stays NaN, as in torch's clip_grad_norm_
  }
  return factor;
}

// Whether this step is skipped: the loss scaler found an inf, or the norm is inf or NaN and the user wants that.
FASTFT_HD bool adamw_skips(bool skip_nonfinite, double norm, const float* found_inf) {
  return (found_inf != nullptr && *found_inf != 0.0f) || (skip_nonfinite && !(norm - norm == 0.0));
}

// One element, in place. Reads a only if plain or weighted, the importance f only if weighted, vmax only if amsgrad.
template <typename T>
FASTFT_HD void adamw_element(T& p, T grad, T& m, T& v, T& vmax, T a, T f, AnchorForm form, bool amsgrad, T grad_factor,
                             const AdamWScalars<T>& s) {
  T g = grad * grad_factor;
  const T before = p;
  p = madd(-s.decay, before, before);
  if (form == AnchorForm::plain || form == AnchorForm::weighted) {
    const T delta = before - a;
    T pull = s.pull, l2 = s.l2;
    if (form == AnchorForm::weighted) {
      const T rate = s.pull * f, bounded = rate < T(kMostWeighted) ? rate : T(kMostWeighted);
      pull = bounded / (T(1) + bounded);
      l2 = s.l2 * f;
    }
    p = madd(-pull, delta, p);
    g = madd(l2, delta, g);
  }
  m = madd(s.one_minus_beta1, g - m, m);
  v = madd(s.one_minus_beta2 * g, g, s.beta2 * v);
  T second = v;
  if (amsgrad) {
    // torch.maximum keeps a NaN from either side
    vmax = (v > vmax || v != v) ? v : vmax;
    second = vmax;
  }
  p = madd(-s.step_size, m / madd(square_root(second), s.rsqrt_bias2, s.eps), p);
}

// The sums over a tensor's live elements that selective projection needs.
struct SelectiveSums {
  double uphill;         // ⟨grad, p − a⟩, the gradient as it is stored: neither clipping nor unscaling turns it
  double before, after;  // ‖p − a‖² and ‖p̃ − a‖²
};

// How far the stepped tensor is moved to its anchor: min(1, λ·r), or 0 where it is left as it is. Nothing that is not
// a number projects.
FASTFT_HD double selective_pull(const SelectiveSums& sums, const AdamWOptions& o) {
  const double uphill = o.maximize ? -sums.uphill : sums.uphill;
  const double distance = square_root(sums.after);
  const double ratio = (distance - square_root(sums.before)) / distance;
  if (!(uphill > 0.0) || !(ratio > 0.0)) return 0.0;
  const double pull = o.anchor_decay * ratio;
  return pull < 1.0 ? pull : 1.0;
}

// One element of a stepped tensor, moved to its anchor.
template <typename T>
FASTFT_HD T selective_element(T p, T a, T pull) {
  return madd(-pull, p - a, p);
}

}  // namespace fastft
