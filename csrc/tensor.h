// TensorView: what a kernel needs to know of a tensor that somebody else owns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dlpack.h"

namespace fastft {

enum class DType : uint8_t { f32, bf16, f16, f64, boolean, int64, u8, u16, int32, other };

constexpr int64_t item_size(DType t) {
  switch (t) {
    case DType::f64:
    case DType::int64:
      return 8;
    case DType::f32:
    case DType::int32:
      return 4;
    case DType::bf16:
    case DType::f16:
    case DType::u16:
      return 2;
    default:
      return 1;
  }
}

constexpr bool is_floating(DType t) {
  return t == DType::f32 || t == DType::bf16 || t == DType::f16 || t == DType::f64;
}

inline const char* name(DType t) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64", "bool",
                                   "int64",   "uint8",    "uint16",  "int32",   "another dtype"};
  return names[static_cast<int>(t)];
}

inline DType dtype_of(dlpack::DataType t) {
  if (t.lanes == 1) {
    if (t.code == dlpack::kFloat && t.bits == 32) return DType::f32;
    if (t.code == dlpack::kFloat && t.bits == 16) return DType::f16;
    if (t.code == dlpack::kFloat && t.bits == 64) return DType::f64;
    if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bf16;
    if (t.code == dlpack::kBool && t.bits == 8) return DType::boolean;
    if (t.code == dlpack::kInt && t.bits == 64) return DType::int64;
    if (t.code == dlpack::kInt && t.bits == 32) return DType::int32;
    if (t.code == dlpack::kUInt && t.bits == 8) return DType::u8;
    if (t.code == dlpack::kUInt && t.bits == 16) return DType::u16;
  }
  return DType::other;
}

struct Device {
  dlpack::DeviceType type = dlpack::kCPU;
  int32_t index = 0;

  bool operator==(const Device& o) const { return type == o.type && index == o.index; }
  bool operator!=(const Device& o) const { return !(*this == o); }
  std::string str() const {
    if (type == dlpack::kCPU) return "cpu";
    if (type == dlpack::kCUDA) return "cuda:" + std::to_string(index);
    return "device type " + std::to_string(static_cast<int>(type));
  }
};

// Pinned and managed host memory is plain memory to the CPU.
inline Device device_of(dlpack::Device d) {
  if (d.type == dlpack::kCUDAHost) return {dlpack::kCPU, 0};
  return {d.type, d.type == dlpack::kCPU ? 0 : d.index};
}

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  Device device;
  int64_t numel = 0;
  std::vector<int64_t> shape, strides;

  // Same shape and the same order of elements in memory; the stride of a dimension of size 1 means nothing.
  bool same_layout(const TensorView& o) const {
    if (shape != o.shape) return false;
    for (size_t d = 0; d < shape.size(); ++d)
      if (shape[d] != 1 && strides[d] != o.strides[d] && numel > 0) return false;
    return true;
  }

  // Every element has its own place and there are no gaps: numel consecutive items in some order.
  bool dense() const {
    if (numel <= 1) return true;
    std::vector<bool> used(shape.size(), false);
    for (int64_t expected = 1; expected < numel;) {
      size_t found = shape.size();
      for (size_t d = 0; d < shape.size(); ++d)
        if (!used[d] && shape[d] != 1 && strides[d] == expected) found = d;
      if (found == shape.size()) return false;
      used[found] = true;
      expected *= shape[found];
    }
    return true;
  }

  // In row-major order, without gaps.
  bool contiguous() const {
    int64_t expected = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      if (shape[d] != 1 && strides[d] != expected && numel > 0) return false;
      expected *= shape[d];
    }
    return true;
  }

  // A row (an index of the first dimension) occupies consecutive items.
  bool rows_contiguous() const {
    return !shape.empty() && (shape[0] <= 1 || numel == 0 || strides[0] == numel / shape[0]);
  }

  std::string shape_str() const {
    std::string s = "[";
    for (size_t d = 0; d < shape.size(); ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
    return s + "]";
  }
};

}  // namespace fastft
