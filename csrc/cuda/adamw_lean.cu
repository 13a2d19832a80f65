// The lean kernels of the CUDA step that there are.
#include "adamw_lean.cuh"

namespace fastft::cuda {
namespace {

template <typename T>
constexpr DType kDType = std::is_same_v<T, Codes>      ? DType::u8
                         : std::is_same_v<T, float>    ? DType::f32
                         : std::is_same_v<T, bfloat16> ? DType::bf16
                                                       : DType::f16;

template <typename W, typename M>
constexpr LeanKernel lean(const char* name) {
  return {kDType<typename W::Stored>,
          kDType<M>,
          W::kLowBits,
          W::kStochastic,
          {adamw_lean<W, M, false>, adamw_lean<W, M, true>},
          name};
}

using F32 = Weight<float>;
using Bf16 = Weight<bfloat16>;
using F16 = Weight<float16>;
using Split16 = Weight<bfloat16, uint16_t>;
using Split8 = Weight<bfloat16, uint8_t>;
using RandomBf16 = Weight<bfloat16, void, true>;
using RandomSplit8 = Weight<bfloat16, uint8_t, true>;

const LeanKernel kLean[] = {
    lean<F32, float>("adamw_lean<F32, float>"),
    lean<F32, bfloat16>("adamw_lean<F32, bfloat16>"),
    lean<F32, Codes>("adamw_lean<F32, Codes>"),
    lean<Bf16, float>("adamw_lean<Bf16, float>"),
    lean<Bf16, bfloat16>("adamw_lean<Bf16, bfloat16>"),
    lean<Bf16, Codes>("adamw_lean<Bf16, Codes>"),
    lean<F16, float>("adamw_lean<F16, float>"),
    lean<F16, float16>("adamw_lean<F16, float16>"),
    lean<Split16, float>("adamw_lean<Split16, float>"),
    lean<Split16, bfloat16>("adamw_lean<Split16, bfloat16>"),
    lean<Split16, Codes>("adamw_lean<Split16, Codes>"),
    lean<Split8, float>("adamw_lean<Split8, float>"),
    lean<Split8, bfloat16>("adamw_lean<Split8, bfloat16>"),
    lean<Split8, Codes>("adamw_lean<Split8, Codes>"),
    lean<RandomBf16, float>("adamw_lean<RandomBf16, float>"),
    lean<RandomBf16, bfloat16>("adamw_lean<RandomBf16, bfloat16>"),
    lean<RandomBf16, Codes>("adamw_lean<RandomBf16, Codes>"),
    lean<RandomSplit8, float>("adamw_lean<RandomSplit8, float>"),
    lean<RandomSplit8, bfloat16>("adamw_lean<RandomSplit8, bfloat16>"),
    lean<RandomSplit8, Codes>("adamw_lean<RandomSplit8, Codes>"),
};

}  // namespace

const LeanKernel* lean_kernel_for(const AdamWEntry& e) {
  for (const LeanKernel& k : kLean)
    if (k.param == e.dtype && k.state == e.state_dtype && k.low_width == e.low_width && k.stochastic == e.stochastic)
      return &k;
  return nullptr;
}

}  // namespace fastft::cuda
