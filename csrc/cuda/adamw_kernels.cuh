// The kernels of the CUDA step and their parameters; cuda/adamw.cu fills these in and launches them.
//
// Most tensors are stepped by a lean kernel (adamw_lean.cu), made for one kind of weight and one of moments, which
// takes 16 bytes at a time. Whatever has an option of its own (amsgrad, an importance, selective projection, a
// gradient in another dtype, memory that is not aligned) is stepped by a generic one (adamw_generic.cu), an element
// at a time.
#pragma once

#include "../adamw.h"
#include "launch.cuh"

namespace fastft::cuda {

constexpr int64_t kChunk = 16384;  // live elements per block
constexpr int64_t kChunkBlocks = kChunk / kBlock8;
constexpr uint32_t kUnits = kChunk / kUnit;  // of weights with low bits (math/split.h)
constexpr uint32_t kUnitBlocks = kUnit / kBlock8;
static_assert(kChunk % kUnit == 0, "a chunk is whole units");

// An entry as the kernels read it.
struct alignas(8) DeviceEntry {
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *low_bits;
  float *exp_avg_scales, *exp_avg_sq_scales;
  uint32_t* weight_sums;
  const void *anchor, *importance;
  const uint8_t* mask;
  const int64_t* rows;
  float* step;
  int64_t live_numel;
  int64_t row_size;  // of `rows`; with moments in 8 bits, of the rows that their blocks are counted in
  uint64_t rounding_key;
  ElementIndex index;
  uint32_t first_chunk, chunks;
  uint32_t chunk_size;  // live elements of a chunk; with moments in 8 bits, of what sums over gradients take for one
  DType dtype, state_dtype, grad_dtype, anchor_dtype, importance_dtype;
  Anchoring anchoring;
  bool stochastic;
  uint8_t low_width;

  FASTFT_HD bool in_blocks() const { return state_dtype == DType::u8; }
  FASTFT_HD int64_t blocks_per_row() const { return (row_size + kBlock8 - 1) / kBlock8; }
};

// Shared by the tensors of one group and step count.
struct StepOptions {
  AdamWOptions options;
  double bias1, bias2;
  const void* lr;
  uint32_t t;
  DType lr_dtype;
};

// Kernel parameters; at most 32,764 bytes. `space` holds StepOptions, then per tensor the gradient's address and
// the index of its StepOptions.
struct Args {
  const DeviceEntry* entries;
  const uint32_t* chunk_entry;
  uint32_t* tickets;
  double* partial;  // three to a chunk
  double* pulls;    // of each entry, in selective projection
  double* out;
  AdamWControl control;
  uint32_t first_entry, count, first_chunk, options_count, total_chunks;
  bool counts_skips, finishes;
  alignas(8) unsigned char space[32000];

  FASTFT_HD const StepOptions* options(uint32_t i) const { return reinterpret_cast<const StepOptions*>(space) + i; }
  FASTFT_HD const void* const* grad(uint32_t i) const {
    return reinterpret_cast<const void* const*>(space + options_count * sizeof(StepOptions)) + i;
  }
  FASTFT_HD const uint16_t* options_index(uint32_t i) const {
    return reinterpret_cast<const uint16_t*>(space + options_count * sizeof(StepOptions) + count * sizeof(void*)) + i;
  }
};
static_assert(sizeof(Args) <= 32764, "kernel parameters");

using Kernel = void (*)(Args);

// A lean kernel, and what it is for.
struct LeanKernel {
  DType param, state;
  uint8_t low_width;
  bool stochastic;
  Kernel steps[2];  // without and with masks of elements
  const char* name;
};
// The one for such an entry, as far as its dtypes go; null if there is none.
const LeanKernel* lean_kernel_for(const AdamWEntry& e);

// For everything else; in float and in double.
struct GenericKernels {
  Kernel step, selective_step, project;
};
extern const GenericKernels kGeneric[2];

// partial[chunk] = Σ grad² of the chunk, and their sum in *out.
extern const Kernel kSumOfSquares;

}  // namespace fastft::cuda
