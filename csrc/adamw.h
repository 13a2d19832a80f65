// The operands of one AdamW step, for both backends. Pointers are borrowed; all arrays of an entry hold
// `numel` items in the same memory order.
#pragma once

#include <cstdint>
#include <vector>

#include "math/adamw.h"
#include "math/block8.h"
#include "math/split.h"
#include "math/stochastic.h"
#include "tensor.h"

namespace fastft {

// One parameter tensor that takes part in this step.
struct AdamWEntry {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;    // null without amsgrad
  const void* anchor;      // null: not anchored
  const void* importance;  // null: not weighted
  const uint8_t* mask;     // null, or one byte per element: 0 = leave untouched
  const int64_t* rows;     // null, or the indices of the live rows, ascending
  int64_t numel;
  int64_t row_size;    // elements per row; used with rows
  int64_t live_rows;   // length of rows
  float* device_step;  // the step count, counted by the kernel; null when `t`, `bias1`, `bias2` are given instead
  int32_t group;
  DType dtype, state_dtype, grad_dtype, anchor_dtype, importance_dtype;
  Anchoring anchoring;
  double t, bias1, bias2;  // the number of the step being taken, and 1 − βᵗ for it

  // Low bits beside a bfloat16 parameter (math/split.h): uint16 or uint8 with low_width 16 or 8; null with 0.
  void* low_bits;
  // One for each unit of live elements (math/split.h): the sum of weight_term() over them, | 1, when last written; 0:
  // not known. Where it is another now, somebody else has written the parameter, and the low bits of the unit become 0.
  uint32_t* weight_sums;
  // Scales of moments in 8 bits (math/block8.h), state_dtype u8: `blocks_per_row()` for each of numel / block_row rows.
  float *exp_avg_scales, *exp_avg_sq_scales;
  int64_t block_row;
  // Stochastic rounding of the parameter (math/stochastic.h), of its 24 bits where 8 low ones are kept.
  bool stochastic;
  uint8_t low_width;
  uint64_t rounding_key;
  ElementIndex index;

  int64_t live_numel() const { return rows ? live_rows * row_size : numel; }
  int64_t blocks_per_row() const { return (block_row + kBlock8 - 1) / kBlock8; }
  // Units of live elements.
  int64_t units() const {
    if (state_dtype != DType::u8) return (live_numel() + kUnit - 1) / kUnit;
    const int64_t rows = block_row > 0 ? live_numel() / block_row : 0;
    return (rows * blocks_per_row() * kBlock8 + kUnit - 1) / kUnit;
  }
  // The live element that a unit begins with.
  int64_t unit_begin(int64_t unit) const {
    if (unit >= units()) return live_numel();
    if (state_dtype != DType::u8) return unit * kUnit;
    const int64_t block = unit * (kUnit / kBlock8), row = block / blocks_per_row();
    return row * block_row + (block - row * blocks_per_row()) * kBlock8;
  }
};

struct AdamWGroup {
  AdamWOptions options;
  const void* lr;  // null, or where the learning rate lies on the device
  DType lr_dtype;
};

// Shared by all tensors of the step. On CUDA the pointers are device memory and nothing is read by the host.
struct AdamWControl {
  const double* sum_of_squares;  // Σ grad² over all live elements, before unscaling; null when not needed
  const float* grad_scale;       // null or a factor that the gradients still carry
  const float* found_inf;        // null, or skip where not 0
  int64_t* skipped_steps;        // null, or counts the skipped steps
  double max_grad_norm;          // < 0: no clipping
  bool skip_nonfinite;
};

}  // namespace fastft
