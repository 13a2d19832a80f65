// The CPU backend of dropout. Results do not depend on the number of threads.
#pragma once

#include "../dropout.h"

namespace fastft::cpu {

void bias_dropout_add(const BiasDropoutAdd& call);
void bias_dropout_add_backward(const BiasDropoutAddBackward& call);
void dropout_add_norm(const DropoutAddNorm& call);
void dropout_add_norm_backward(const DropoutAddNormBackward& call);

}  // namespace fastft::cpu
