// The arguments of the dropout kernels, the same for both backends. Pointers are borrowed; tensors are contiguous.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace fastft {

// Where the mask comes from (math/dropout.h).
struct DropoutRandom {
  double p;
  int64_t seed, offset;
  const int64_t* state;  // null, or {seed, offset} in the device's memory, used instead
};

// y = residual + dropout(x + bias − minus), any of the three left out (null).
struct BiasDropoutAdd {
  const void *x, *bias, *minus, *residual;
  void* y;
  int64_t numel, columns;                            // bias has `columns` elements: one for each of the last dimension
  DType x_dtype, dtype, bias_dtype, residual_dtype;  // of x; of y; of bias; of minus and residual
  DropoutRandom random;
};

// dx = dropout(dy); dbias = Σ_rows dx.
struct BiasDropoutAddBackward {
  const void* dy;
  void *dx, *dbias;
  int64_t rows, columns;
  DType dtype, x_dtype, bias_dtype;  // of dy; of dx; of dbias
  DropoutRandom random;
};

// sum = residual + dropout(x); y = norm(sum) (math/norm.h).
struct DropoutAddNorm {
  const void *x, *residual, *weight, *bias;  // weight and bias: null, or `columns` elements
  void *y, *sum;
  void *mean, *rstd;  // one a row, float (double for double); mean null for rms
  int64_t rows, columns;
  DType x_dtype, residual_dtype, dtype, weight_dtype;  // of x; of residual; of y and sum; of weight and bias
  double eps;
  DropoutRandom random;
};

// ds = dnorm(dy) + dsum; dresidual = ds; dx = dropout(ds); dweight and dbias: see math/norm.h.
struct DropoutAddNormBackward {
  const void *dy, *dsum, *sum, *weight, *mean, *rstd;  // dsum, weight: may be null; mean null for rms
  void *dx, *dresidual, *dweight, *dbias;              // dweight, dbias: may be null
  int64_t rows, columns;
  DType dtype, x_dtype, residual_dtype, weight_dtype;  // of dy, dsum, sum; of dx; of dresidual; of weight and bias
  DropoutRandom random;
};

}  // namespace fastft
