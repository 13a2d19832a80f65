// Which set of inner loops this machine can run.
#pragma once

namespace fastft::cpu {

#if defined(__x86_64__)
// x86-64-v3: AVX2, FMA, F16C.
inline bool has_v3() {
  static const bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return v3;
}
#endif

}  // namespace fastft::cpu
