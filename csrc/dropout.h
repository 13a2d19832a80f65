// What the dropout kernels work on, as both backends see it. Pointers are borrowed; tensors are contiguous.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace fastft {

// Where the mask comes from (math/dropout.h).
struct DropoutRandom {
  double p;
  int64_t seed, offset;
  const int64_t* state;  // null, or where {seed, offset} lie on the device
};

// y = residual + dropout(x + bias − minus), any of the three left out (null).
struct DropoutAdd {
  const void *x, *bias, *minus, *residual;
  void* y;
  int64_t numel, columns;                   // bias has `columns` elements: one for each of the last dimension
  DType dtype, bias_dtype, residual_dtype;  // of x and y; of bias; of minus and residual
  DropoutRandom random;
};

// dx = dropout(dy); dbias = Σ_rows dx.
struct DropoutBiasGrad {
  const void* dy;
  void *dx, *dbias;
  int64_t rows, columns;
  DType dtype, bias_dtype;
  DropoutRandom random;
};

// sum = residual + dropout(x); y = norm(sum) (math/norm.h).
struct DropoutNorm {
  const void *x, *residual, *weight, *bias;  // weight and bias: null, or `columns` elements
  void *y, *sum;
  void *mean, *rstd;  // one a row, float (double for double); mean null for rms
  int64_t rows, columns;
  DType dtype, weight_dtype;  // of x, residual, y, sum; of weight and bias
  double eps;
  DropoutRandom random;
};

// ds = dnorm(dy) + dsum; dresidual = ds; dx = dropout(ds); dweight and dbias: see math/norm.h.
struct DropoutNormGrad {
  const void *dy, *dsum, *sum, *weight, *mean, *rstd;  // dsum, weight: may be null; mean null for rms
  void *dx, *dresidual, *dweight, *dbias;              // dweight, dbias: may be null
  int64_t rows, columns;
  DType dtype, weight_dtype;
  DropoutRandom random;
};

}  // namespace fastft
