// The part of DLPack's C ABI (version 1.3) that reading a borrowed tensor needs, declared from the specification
// (dmlc/dlpack, Apache-2.0). Names follow it.
#pragma once

#include <cstdint>

namespace fastft::dlpack {

constexpr uint32_t kMajorVersion = 1;

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
struct Device {
  DeviceType type;
  int32_t index;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// The table behind type(tensor).__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api".
struct ExchangeAPI {
  Version version;
  ExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(DeviceType type, int32_t index, void** out);
};

}  // namespace fastft::dlpack
