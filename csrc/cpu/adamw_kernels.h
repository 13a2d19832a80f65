// The inner loops of the CPU step, one set per instruction set; cpu/adamw.cpp picks one and drives it.
#pragma once

#include "../adamw.h"

namespace fastft::cpu {

struct AdamWKernels {
  const char* instruction_set;
  // Σ grad² over live elements [begin, end) of the entry, in double.
  double (*sum_of_squares)(const AdamWEntry& entry, int64_t begin, int64_t end);
  // The step over live elements [begin, end), with low bits whole units from `unit` on; grad_factor carries unscaling,
  // clipping and the sign. sums: where the entry is anchored selectively, those of these elements.
  void (*update)(const AdamWEntry& entry, int64_t begin, int64_t end, int64_t unit, const AdamWOptions& options,
                 double grad_factor, SelectiveSums* sums);
  // Moves them to the anchor.
  void (*project)(const AdamWEntry& entry, int64_t begin, int64_t end, int64_t unit, double pull);
};

extern const AdamWKernels adamw_baseline;
#if defined(__x86_64__)
extern const AdamWKernels adamw_v3;  // x86-64-v3: AVX2, FMA, F16C
extern const AdamWKernels adamw_v4;  // x86-64-v4: AVX-512
#endif

}  // namespace fastft::cpu
