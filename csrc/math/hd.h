// The vocabulary of all formulas in math/: the host/device marker and the one arithmetic primitive
// whose rounding must be the same everywhere.
#pragma once

#if defined(__CUDACC__)
#define FASTFT_HD __host__ __device__ __forceinline__
#else
#define FASTFT_HD inline __attribute__((always_inline))
#endif

namespace fastft {

// a·b + c, rounded once. Written out (never left to the compiler's contraction, which is switched off) so that
// the CPU's vector units and the GPU give the same bits. Only an x86-64 without FMA rounds twice.
FASTFT_HD float madd(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTFT_HD double madd(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

FASTFT_HD float square_root(float x) {
  return __builtin_sqrtf(x);
}
FASTFT_HD double square_root(double x) {
  return __builtin_sqrt(x);
}

}  // namespace fastft
