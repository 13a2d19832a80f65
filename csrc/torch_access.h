// How the core reads tensors of a torch it was never compiled against: DLPack's exchange table for any tensor, and
// torch's stable C functions for tensors that are looked at again at every step. Both are looked up once, at import.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace fastft {

namespace py = pybind11;

// Called once by the Python package: torch.Tensor; where this torch has it, the function that hands out tensor handles
// (None otherwise); and tensors of several classes, by which the handle's place in a tensor object is found.
void connect_torch(py::handle tensor_class, py::handle allocate_handles, const py::list& samples);

// torch.Tensor itself.
PyTypeObject* tensor_class();

// Everything about a tensor. `argument` names it in errors.
TensorView read_tensor(py::handle tensor, const std::string& argument);

// The value of tensor.grad, for less than Python's attribute look-up costs. Throws what that throws.
py::object grad_of(PyObject* tensor);

// The raw DLPack view; false (and no Python error set) if the tensor cannot be read so.
bool read_dlpack(PyObject* tensor, dlpack::Tensor* out);

// The stream that torch would launch on now.
void* current_stream(Device device);

// A tensor that is watched: where its data lies now, and whether dtype, shape and strides are still what they were, for
// some nanoseconds instead of the forty that a full read takes.
class TensorRef {
 public:
  enum Hold {
    kOwned,
    kWeak,      // keeps nothing alive, so that a user who lets go of the tensor gets its memory back at once
    kBorrowed,  // nor does it refer to it weakly, which torch.utils.swap_tensors forbids. It may be asked only while an
                // object is known to live at the address, and should that be another one, it answers for that one.
  };

  TensorRef() = default;
  TensorRef(const py::object& tensor, const std::string& argument, Hold hold = kOwned);

  explicit operator bool() const { return address_ != nullptr; }
  const TensorView& view() const { return view_; }
  // The tensor object, to be kept alive while its data is used; only while it is known to live.
  py::object keep() const { return py::reinterpret_borrow<py::object>(address_); }

  // It is the same object (if not borrowed), and its data has not moved since view() was taken.
  bool same_data() const;
  // Nor have dtype, shape and strides changed.
  bool same_view() const;
  // Starts to bring what these read into the cache: they wait for memory more than they compute.
  void prefetch() const;
  // Whether another tensor is plainly like this one: of class torch.Tensor, with its dtype, device, shape and strides.
  // Then also where its data lies. False proves nothing.
  bool is_like(PyObject* tensor, void** data) const;

 private:
  bool lives() const;
  // Whether what torch says of a tensor is what this one's view says: dtype, shape and strides.
  bool describes(void* handle) const;
  bool has_shape(int64_t dim, const int64_t* sizes, const int64_t* strides) const;

  PyObject* address_ = nullptr;
  py::object holder_;  // the tensor, a weak reference to it, or null
  Hold hold_ = kOwned;
  const char* impl_ = nullptr;  // where torch kept sizes and data of it; only ever prefetched
  int32_t torch_dtype_ = -1, torch_device_type_ = -1, torch_device_index_ = -1;
  TensorView view_;
};

}  // namespace fastft
