// The CPU backend of dropout. Results do not depend on the number of threads.
#pragma once

#include "../dropout.h"

namespace fastft::cpu {

void dropout_add(const DropoutAdd& call);
void dropout_bias_grad(const DropoutBiasGrad& call);
void dropout_norm(const DropoutNorm& call);
void dropout_norm_grad(const DropoutNormGrad& call);

}  // namespace fastft::cpu
