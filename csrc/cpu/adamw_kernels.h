// The inner loops of the CPU step, one set per instruction set; cpu/adamw.cpp picks one and drives it.
#pragma once

#include "../adamw.h"

namespace fastft::cpu {

struct AdamWKernels {
  const char* instruction_set;
  // Σ grad² over live elements [begin, end) of the entry, in double.
  double (*sum_of_squares)(const AdamWEntry& entry, int64_t begin, int64_t end);
  // The step over live elements [begin, end), which are a chunk; grad_factor carries unscaling, clipping and the sign.
  // weight_sum: null, or where the chunk's sum stands (AdamWEntry::weight_sums). sums: where the entry is anchored
  // selectively, those of the chunk.
  void (*update)(const AdamWEntry& entry, int64_t begin, int64_t end, const AdamWOptions& options, double grad_factor,
                 uint32_t* weight_sum, SelectiveSums* sums);
  // Moves live elements [begin, end) to the anchor.
  void (*project)(const AdamWEntry& entry, int64_t begin, int64_t end, double pull, uint32_t* weight_sum);
};

extern const AdamWKernels adamw_baseline;
#if defined(__x86_64__)
extern const AdamWKernels adamw_v3;  // x86-64-v3: AVX2, FMA, F16C
extern const AdamWKernels adamw_v4;  // x86-64-v4: AVX-512
#endif

}  // namespace fastft::cpu
