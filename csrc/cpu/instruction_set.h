// The instruction sets that the inner loops are compiled for, and which one to run.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastft::cpu {

enum class InstructionSet {
  baseline,
  v3,  // x86-64-v3: AVX2, FMA, F16C
  v4,  // x86-64-v4: AVX-512
};

inline InstructionSet supported_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? InstructionSet::v4 : InstructionSet::v3;
  }
#endif
  return InstructionSet::baseline;
}

// The highest set that FASTFT_CPU_CAPABILITY allows: for tests and comparisons, like torch's ATEN_CPU_CAPABILITY.
inline InstructionSet allowed_set() {
  const char* value = std::getenv("FASTFT_CPU_CAPABILITY");
  const std::string name = value ? value : "";
  if (name.empty() || name == "v4") return InstructionSet::v4;
  if (name == "v3") return InstructionSet::v3;
  if (name == "baseline") return InstructionSet::baseline;
  throw std::invalid_argument("FASTFT_CPU_CAPABILITY: expected baseline, v3 or v4, got " + name);
}

inline InstructionSet best_set() {
  static const InstructionSet best = supported_set() < allowed_set() ? supported_set() : allowed_set();
  return best;
}

}  // namespace fastft::cpu
