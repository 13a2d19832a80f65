// Layer normalisation (Ba et al. 2016, https://arxiv.org/abs/1607.06450) and root-mean-square normalisation (Zhang &
// Sennrich 2019, https://arxiv.org/abs/1910.07467) of a row s of n elements:
//
//   layer:  mean = Σs/n,  rstd = 1/√(Σ(s − mean)²/n + ε)      rms:  mean = 0,  rstd = 1/√(Σs²/n + ε)
//   h = (s − mean)·rstd,  y = h·weight + bias
//
// and back, with g = dy·weight and the means taken over the row:
//
//   ds = rstd·(g − mean(g) − h·mean(g·h))                     (rms: without mean(g))
//   dweight = Σ_rows dy·h,  dbias = Σ_rows dy
#pragma once

#include "hd.h"

namespace fastft {

template <typename T>
FASTFT_HD T norm_rstd(T sum_of_squares, T n, T eps) {
  return T(1) / square_root(sum_of_squares / n + eps);
}

template <typename T>
FASTFT_HD T norm_hat(T s, T mean, T rstd) {
  return (s - mean) * rstd;
}

template <typename T>
FASTFT_HD T norm_element(T s, T mean, T rstd, T weight, T bias) {
  return madd(norm_hat(s, mean, rstd), weight, bias);
}

template <typename T>
FASTFT_HD T norm_backward(T g, T h, T mean_g, T mean_gh, T rstd) {
  return rstd * (g - mean_g - h * mean_gh);
}

}  // namespace fastft
