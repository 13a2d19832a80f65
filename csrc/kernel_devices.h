// Which devices' tensors go to the CUDA kernels.
#pragma once

#include <string>

#include "checks.h"
#include "tensor.h"

#ifndef FASTFT_CUDA_ON_CPU
#define FASTFT_CUDA_ON_CPU 0  // 1 in the test build that sends CPU tensors through the CUDA kernels
#endif

namespace fastft {

inline bool is_kernel_device(Device device) {
  return device.type == dlpack::kCUDA || FASTFT_CUDA_ON_CPU;
}

// Raises unless this build can work on the device.
inline void check_kernel_device(Device device, const std::string& argument) {
  check(device.type == dlpack::kCPU || device.type == dlpack::kCUDA, argument,
        ": expected a tensor on cpu or cuda, got one on ", device.str());
#if !FASTFT_WITH_CUDA
  check(device.type == dlpack::kCPU, argument, ": this build of fastft has no CUDA code, and the tensor is on ",
        device.str());
#endif
}

}  // namespace fastft
