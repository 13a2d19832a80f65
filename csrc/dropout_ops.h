// Dropout as Python calls it: check, pick the backend, call.
#pragma once

#include "torch_access.h"

namespace fastft {

// In all of them: `random` is (p, seed, offset) or (p, state), state an int64[2] tensor on the device. Optional tensors
// are None. Tensors are contiguous, and of one dtype where nothing else is said. They throw ArgumentError before
// anything is written.

// y = residual + dropout(x + bias − minus); bias: [columns] of any floating dtype; minus, residual: of one dtype.
void dropout_add(const py::object& x, const py::object& y, const py::tuple& random, const py::object& bias,
                 const py::object& minus, const py::object& residual);

// dx = dropout(dy), dbias = Σ_rows dx; dbias: [columns] of any floating dtype.
void dropout_bias_grad(const py::object& dy, const py::object& dx, const py::object& dbias, const py::tuple& random,
                       const py::object& workspace);

// sum = residual + dropout(x), y = norm(sum) over the last `columns` elements; weight, bias: [columns] or None.
// mean (None for rms), rstd: [rows] in float32 (float64 for float64).
void dropout_norm(const py::object& x, const py::object& residual, const py::object& weight, const py::object& bias,
                  const py::object& y, const py::object& sum, const py::object& mean, const py::object& rstd,
                  int64_t columns, double eps, const py::tuple& random);

void dropout_norm_grad(const py::object& dy, const py::object& dsum, const py::object& sum, const py::object& weight,
                       const py::object& mean, const py::object& rstd, const py::object& dx,
                       const py::object& dresidual, const py::object& dweight, const py::object& dbias, int64_t columns,
                       const py::tuple& random, const py::object& workspace);

// Bytes of device memory to pass as `workspace` for a tensor of [rows, columns]; 0 for the CPU.
int64_t dropout_workspace_bytes(const py::object& tensor, int64_t columns, int64_t sums);

}  // namespace fastft
