// The CUDA backend of dropout, as host code sees it. Every function launches on the stream and returns.
#pragma once

#include "../dropout.h"

namespace fastft::cuda {

void bias_dropout_add(const BiasDropoutAdd& call, int32_t device, void* stream);

// Bytes of device memory that sums over the rows of [rows, columns] need: `sums` of them, in float (double for double).
int64_t row_sums_bytes(int64_t rows, int64_t columns, DType dtype, int64_t sums);

void bias_dropout_add_backward(const BiasDropoutAddBackward& call, void* workspace, int32_t device, void* stream);
void dropout_add_norm(const DropoutAddNorm& call, int32_t device, void* stream);
void dropout_add_norm_backward(const DropoutAddNormBackward& call, void* workspace, int32_t device, void* stream);

}  // namespace fastft::cuda
