// The kernels of the CUDA step and their parameters; cuda/adamw.cu fills these in and launches them.
#pragma once

#include "../adamw.h"
#include "launch.cuh"

namespace fastft::cuda {

constexpr int64_t kChunk = 16384;  // live elements per block

// An entry as the kernels read it.
struct DeviceEntry {
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  const void* anchor;
  const uint8_t* mask;
  const int64_t* rows;
  float* step;
  int64_t live_numel, row_size;
  uint32_t first_chunk, chunks;
  DType grad_dtype, anchor_dtype;
  bool vectorised;  // every array is 16-byte aligned, and so is every row
  Anchoring anchoring;
  DType importance_dtype;
  const void* importance;
};

// Shared by the tensors of one group and step count.
struct StepOptions {
  AdamWOptions options;
  double bias1, bias2;
  const void* lr;
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

// The kernels for one combination of parameter and state dtype.
struct AdamWKernels {
  DType param, state;
  const Kernel* steps;  // for plain, weighted and selective anchors
  Kernel project;
  const char* name;
};

// partial[chunk] = Σ grad² of the chunk, and their sum in *out.
extern const Kernel kSumOfSquares;
// Throws for a combination that has none.
const AdamWKernels& kernels_for(DType param, DType state);

}  // namespace fastft::cuda
