#include "torch_access.h"

#include <dlfcn.h>

#include <cstring>

#include "checks.h"

namespace fastft {
namespace {

using Status = int32_t;

struct Torch {
  PyObject* tensor_class = nullptr;
  const dlpack::ExchangeAPI* dlpack = nullptr;
  // From torch's C shim; null where missing, and then handles are not used.
  Status (*data)(void* handle, void** out) = nullptr;
  Status (*dim)(void* handle, int64_t* out) = nullptr;
  Status (*dtype)(void* handle, int32_t* out) = nullptr;
  Status (*sizes)(void* handle, int64_t** out) = nullptr;
  Status (*strides)(void* handle, int64_t** out) = nullptr;
  Status (*destroy)(void* handle) = nullptr;
  PyObject* allocate_handles = nullptr;
};
Torch torch;

template <typename Function>
void find(void* library, const char* name, Function* out) {
  *out = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
}

}  // namespace

void connect_torch(py::handle tensor_class, py::handle allocate_handles) {
  torch.tensor_class = tensor_class.inc_ref().ptr();
  const py::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
  void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  for (auto* api = static_cast<const dlpack::ExchangeAPI*>(table); api != nullptr; api = api->previous)
    if (api->version.major == dlpack::kMajorVersion) torch.dlpack = api;
  check(torch.dlpack != nullptr && torch.dlpack->dltensor_from_py_object_no_sync != nullptr,
        "this torch offers no DLPack exchange table of version ", dlpack::kMajorVersion);
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
  find(library, "aoti_torch_get_data_ptr", &torch.data);
  find(library, "aoti_torch_get_dim", &torch.dim);
  find(library, "aoti_torch_get_dtype", &torch.dtype);
  find(library, "aoti_torch_get_sizes", &torch.sizes);
  find(library, "aoti_torch_get_strides", &torch.strides);
  find(library, "aoti_torch_delete_tensor_object", &torch.destroy);
  if (torch.data && torch.dim && torch.dtype && torch.sizes && torch.strides && torch.destroy &&
      !allocate_handles.is_none())
    torch.allocate_handles = allocate_handles.inc_ref().ptr();
}

py::handle tensor_class() {
  return torch.tensor_class;
}

bool read_dlpack(PyObject* tensor, dlpack::Tensor* out) {
  if (torch.dlpack->dltensor_from_py_object_no_sync(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

TensorView read_tensor(py::handle tensor, const std::string& argument) {
  dlpack::Tensor t;
  if (torch.dlpack->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) {
    const py::error_already_set error;  // fetches and clears
    throw ArgumentError(
        text(argument, ": expected a plain strided tensor, got one that cannot be read: ", error.what()));
  }
  TensorView view;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.dtype = dtype_of(t.dtype);
  view.device = device_of(t.device);
  view.shape.assign(t.shape, t.shape + t.ndim);
  view.strides.assign(t.strides, t.strides + t.ndim);
  view.numel = 1;
  for (int64_t n : view.shape) view.numel *= n;
  return view;
}

void* current_stream(Device device) {
  void* stream = nullptr;
  if (torch.dlpack->current_work_stream(device.type, device.index, &stream) != 0) throw py::error_already_set();
  return stream;
}

TensorRef::TensorRef(py::object tensor, const std::string& argument)
    : object_(std::move(tensor)), view_(read_tensor(object_, argument)) {
  if (torch.allocate_handles == nullptr) return;
  py::list one;
  one.append(object_);
  const py::list capsules = py::reinterpret_borrow<py::object>(torch.allocate_handles)(one);
  PyObject* capsule = py::object(capsules[0]).ptr();
  handle_ = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
  if (handle_ == nullptr) throw py::error_already_set();
  torch.dtype(handle_, &torch_dtype_);
}

void TensorRef::swap(TensorRef& other) noexcept {
  std::swap(object_, other.object_);
  std::swap(handle_, other.handle_);
  std::swap(torch_dtype_, other.torch_dtype_);
  std::swap(view_, other.view_);
}

void TensorRef::reset() {
  if (handle_ != nullptr) torch.destroy(handle_);
  handle_ = nullptr;
}

bool TensorRef::same_data() const {
  if (handle_ == nullptr) {
    dlpack::Tensor t;
    return read_dlpack(object_.ptr(), &t) && static_cast<char*>(t.data) + t.byte_offset == view_.data;
  }
  void* data = nullptr;
  return torch.data(handle_, &data) == 0 && (data == view_.data || view_.numel == 0);
}

bool TensorRef::same_view() const {
  const size_t bytes = view_.shape.size() * sizeof(int64_t);
  const int64_t *sizes, *strides;
  int64_t dim;
  int32_t dtype;
  if (handle_ == nullptr) {
    dlpack::Tensor t;
    if (!read_dlpack(object_.ptr(), &t) || static_cast<char*>(t.data) + t.byte_offset != view_.data ||
        dtype_of(t.dtype) != view_.dtype)
      return false;
    sizes = t.shape;
    strides = t.strides;
    dim = t.ndim;
  } else {
    int64_t *s, *d;
    if (!same_data() || torch.dtype(handle_, &dtype) || dtype != torch_dtype_ || torch.dim(handle_, &dim) ||
        torch.sizes(handle_, &s) || torch.strides(handle_, &d))
      return false;
    sizes = s;
    strides = d;
  }
  return dim == static_cast<int64_t>(view_.shape.size()) && std::memcmp(sizes, view_.shape.data(), bytes) == 0 &&
         std::memcmp(strides, view_.strides.data(), bytes) == 0;
}

}  // namespace fastft
