// The dropout functions of fastft._C: they check their arguments, pick the backend and call it.
#pragma once

#include "torch_access.h"

namespace fastft {

// In all of them: `random` is (p, seed, offset) or (p, state), state an int64[2] tensor on the device. Optional tensors
// are None. Tensors are contiguous, on one device and of any floating dtype, but float64 goes with float64 only. They
// throw ArgumentError before anything is written.

// y = residual + dropout(x + bias − minus); bias: [columns], the size of the last dimension; minus and residual: of one
// dtype.
void bias_dropout_add(py::handle x, py::handle y, py::handle random, py::handle bias, py::handle minus,
                      py::handle residual);

// dx = dropout(dy), dbias = Σ_rows dx; dbias: [columns].
void bias_dropout_add_backward(py::handle dy, py::handle dx, py::handle dbias, py::handle random, py::handle workspace);

// sum = residual + dropout(x), y = norm(sum) over the last `columns` elements; weight, bias: [columns] or None, of one
// dtype; y, sum: of one dtype, and one memory if the sum is not needed. mean (None for rms), rstd: [rows] in float32
// (float64 for float64).
void dropout_add_norm(py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle y,
                      py::handle sum, py::handle mean, py::handle rstd, int64_t columns, double eps, py::handle random);

// dresidual = dnorm(dy) + dsum, dx = dropout(dresidual); dy, dsum (or None), sum: of one dtype; dweight, dbias:
// [columns] or None, of weight's dtype.
void dropout_add_norm_backward(py::handle dy, py::handle dsum, py::handle sum, py::handle weight, py::handle mean,
                               py::handle rstd, py::handle dx, py::handle dresidual, py::handle dweight,
                               py::handle dbias, int64_t columns, py::handle random, py::handle workspace);

// Bytes of device memory to pass as `workspace` for `sums` sums over the rows of a [rows, columns] tensor. 0: pass
// None.
int64_t dropout_workspace_bytes(py::handle tensor, int64_t columns, int64_t sums);

// Whether a tensor can be given to these functions as it is: a torch.Tensor or Parameter (no subclass), strided,
// contiguous, of a floating dtype, on a device that this build works on.
bool dropout_takes(py::handle tensor);

// dropout(x) in a new tensor, or None if dropout_takes(x) is false. Check, allocation and kernel in one call: on a few
// elements, the calls are what takes time.
py::object dropout(py::handle x, py::handle random);

}  // namespace fastft
