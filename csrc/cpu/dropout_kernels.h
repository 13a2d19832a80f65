// The inner loops of dropout on the CPU, one set per instruction set; cpu/dropout.cpp picks one and drives it.
#pragma once

#include "../dropout.h"

namespace fastft::cpu {

struct DropoutKernels {
  // Elements [begin, end); begin is a multiple of 4.
  void (*bias_dropout_add)(const BiasDropoutAdd& call, int64_t begin, int64_t end);
  // Rows [begin, end). `partial`: columns sums of dx, in float (double for double).
  void (*bias_dropout_add_backward)(const BiasDropoutAddBackward& call, int64_t begin, int64_t end, void* partial);
  // Rows [begin, end). `scratch`: 3 · columns items of float (double for double).
  void (*dropout_add_norm)(const DropoutAddNorm& call, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end). `partial`: 2 · columns sums, of dy·h and of dy; `scratch`: 3 · columns.
  void (*dropout_add_norm_backward)(const DropoutAddNormBackward& call, int64_t begin, int64_t end, void* partial,
                                    void* scratch);
};

extern const DropoutKernels dropout_baseline;
#if defined(__x86_64__)
extern const DropoutKernels dropout_v3;  // x86-64-v3: AVX2, FMA, F16C
extern const DropoutKernels dropout_v4;  // x86-64-v4: AVX-512
#endif

}  // namespace fastft::cpu
