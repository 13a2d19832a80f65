// The CUDA backend of dropout, as host code sees it. Every function launches on the stream and returns.
#pragma once

#include "../dropout.h"

namespace fastft::cuda {

void dropout_add(const DropoutAdd& call, int32_t device, void* stream);

// Bytes of device memory that sums over the rows of [rows, columns] need: `sums` of them, in float (double for double).
int64_t row_sums_bytes(int64_t rows, int64_t columns, DType dtype, int64_t sums);

void dropout_bias_grad(const DropoutBiasGrad& call, void* workspace, int32_t device, void* stream);
void dropout_norm(const DropoutNorm& call, int32_t device, void* stream);
void dropout_norm_grad(const DropoutNormGrad& call, void* workspace, int32_t device, void* stream);

}  // namespace fastft::cuda
