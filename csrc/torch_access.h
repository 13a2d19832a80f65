// How the core reads tensors of a torch it was never compiled against: DLPack's exchange table for any tensor, and
// torch's stable C functions for tensors that are read again at every step. Both are looked up once, at import.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace fastft {

namespace py = pybind11;

// Called once by the Python package: torch.Tensor and, where this torch has it, the function that hands out tensor
// handles (None otherwise).
void connect_torch(py::handle tensor_class, py::handle allocate_handles);

// torch.Tensor itself.
py::handle tensor_class();

// Everything about a tensor. `argument` names it in errors.
TensorView read_tensor(py::handle tensor, const std::string& argument);

// The raw DLPack view; false (and no Python error set) if the tensor cannot be read so.
bool read_dlpack(PyObject* tensor, dlpack::Tensor* out);

// The stream that torch would launch on now.
void* current_stream(Device device);

// A tensor that is watched: where its data lies now, and whether shape and strides are still what they were, for some
// nanoseconds instead of the hundred that a full read takes.
class TensorRef {
 public:
  TensorRef() = default;
  TensorRef(py::object tensor, const std::string& argument);
  ~TensorRef() { reset(); }
  TensorRef(TensorRef&& other) noexcept { swap(other); }
  TensorRef& operator=(TensorRef&& other) noexcept {
    swap(other);
    return *this;
  }

  explicit operator bool() const { return static_cast<bool>(object_); }
  const TensorView& view() const { return view_; }
  PyObject* object() const { return object_.ptr(); }

  // The data has not moved since view() was taken.
  bool same_data() const;
  // Nor have dtype, shape and strides changed.
  bool same_view() const;

 private:
  void swap(TensorRef& other) noexcept;
  void reset();

  py::object object_;
  void* handle_ = nullptr;  // torch's AtenTensorHandle: follows `tensor.data = ...`
  int32_t torch_dtype_ = -1;
  TensorView view_;
};

}  // namespace fastft
