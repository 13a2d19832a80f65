// The AdamW step with decoupled decay and an anchor: the one place where its formulas stand.
//
//   g  = grad · grad_scale⁻¹ · clip              clip = min(1, max_grad_norm / (‖g‖₂ + 1e-6))
//   p  = p − lr·wd·p − min(1, lr·λ)·(p − a)      decoupled decay and anchor       (or, L2-SP: g += λ·(p − a))
//   m  = m + (1−β₁)·(g − m)
//   v  = β₂·v + (1−β₂)·g²                        (v̂ = running maximum of v with amsgrad)
//   p  = p − lr/(1−β₁ᵗ) · m / (√v̂/√(1−β₂ᵗ) + ε)
//
// Loshchilov & Hutter 2019 (arXiv 1711.05101); Reddi et al. 2018 (arXiv 1904.09237) for amsgrad; Li et al. 2018
// (arXiv 1802.01483) for the anchor. Everything is computed in float (double for double parameters).
#pragma once

#include <math.h>

#include "hd.h"

namespace fastft {

// What the user chose for one parameter group; doubles as in Python.
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay, anchor_decay;
  bool l2_anchor, amsgrad, maximize;
};

// The same, made ready for step t: all that is equal for the elements of a tensor.
template <typename T>
struct AdamWScalars {
  T one_minus_beta1, beta2, one_minus_beta2;
  T step_size;    // lr / (1 − β₁ᵗ)
  T rsqrt_bias2;  // 1 / √(1 − β₂ᵗ)
  T eps;
  T decay;  // lr·wd
  T pull;   // min(1, lr·λ), or 0 with the l2 anchor
  T l2;     // λ with the l2 anchor, else 0
};

// bias1 = 1 − β₁ᵗ, bias2 = 1 − β₂ᵗ for the step t being taken (t = 1 for the first).
FASTFT_HD double adamw_bias(double beta, double t) {
  return 1.0 - pow(beta, t);
}

template <typename T>
FASTFT_HD AdamWScalars<T> adamw_scalars(const AdamWOptions& o, double bias1, double bias2) {
  const double pull = o.lr * o.anchor_decay;
  AdamWScalars<T> s;
  s.one_minus_beta1 = static_cast<T>(1.0 - o.beta1);
  s.beta2 = static_cast<T>(o.beta2);
  s.one_minus_beta2 = static_cast<T>(1.0 - o.beta2);
  s.step_size = static_cast<T>(o.lr / bias1);
  s.rsqrt_bias2 = static_cast<T>(1.0 / square_root(bias2));
  s.eps = static_cast<T>(o.eps);
  s.decay = static_cast<T>(o.lr * o.weight_decay);
  s.pull = static_cast<T>(o.l2_anchor ? 0.0 : (pull < 1.0 ? pull : 1.0));
  s.l2 = static_cast<T>(o.l2_anchor ? o.anchor_decay : 0.0);
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

// One element, in place. Reads a only if anchored, vmax only if amsgrad.
template <typename T>
FASTFT_HD void adamw_element(T& p, T grad, T& m, T& v, T& vmax, T a, bool anchored, bool amsgrad, T grad_factor,
                             const AdamWScalars<T>& s) {
  T g = grad * grad_factor;
  const T before = p;
  p = madd(-s.decay, before, before);
  if (anchored) {
    const T delta = before - a;
    p = madd(-s.pull, delta, p);
    g = madd(s.l2, delta, g);
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

}  // namespace fastft
