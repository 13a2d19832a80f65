#include "torch_access.h"

#include <dlfcn.h>

#include "checks.h"

namespace fastft {
namespace {

using Status = int32_t;

struct Torch {
  const dlpack::ExchangeAPI* dlpack = nullptr;
  // From torch's C shim. A handle is the address of an at::Tensor, which is one pointer; a tensor object holds one,
  // `handle_offset` bytes from its beginning (0: not found, so DLPack must do).
  Status (*data)(void* handle, void** out) = nullptr;
  Status (*dim)(void* handle, int64_t* out) = nullptr;
  Status (*dtype)(void* handle, int32_t* out) = nullptr;
  Status (*sizes)(void* handle, int64_t** out) = nullptr;
  Status (*strides)(void* handle, int64_t** out) = nullptr;
  Status (*layout)(void* handle, int32_t* out) = nullptr;
  Status (*device_type)(void* handle, int32_t* out) = nullptr;
  Status (*device_index)(void* handle, int32_t* out) = nullptr;
  int32_t (*strided)() = nullptr;
  Status (*destroy)(void* handle) = nullptr;
  size_t handle_offset = 0;

  PyTypeObject* tensor_class = nullptr;
  PyGetSetDef* grad = nullptr;              // torch.Tensor.grad, where it is a plain C getter
  PyTypeObject* class_with_grad = nullptr;  // the class last seen to inherit it

  bool has_shim() const {
    return data && dim && dtype && sizes && strides && layout && device_type && device_index && strided && destroy;
  }
};
Torch torch;

template <typename Function>
void find(void* library, const char* name, Function* out) {
  *out = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
}

void** word_at(PyObject* object, size_t offset) {
  return reinterpret_cast<void**>(reinterpret_cast<char*>(object) + offset);
}

// Where all samples hold the pointer that their handle holds; 0 if there is no such place or more than one.
size_t find_handle_offset(py::handle allocate_handles, const py::list& samples) {
  size_t found = 0;
  for (const size_t offset : {sizeof(PyObject), sizeof(PyObject) + sizeof(void*)}) {
    bool all = samples.size() > 0;
    for (const py::handle sample : samples) {
      py::list one;
      one.append(sample);
      const py::list capsules = py::reinterpret_borrow<py::object>(allocate_handles)(one);
      PyObject* capsule = py::object(capsules[0]).ptr();
      void* handle = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
      if (handle == nullptr) throw py::error_already_set();
      all = all && *static_cast<void**>(handle) == *word_at(sample.ptr(), offset);
      torch.destroy(handle);
    }
    if (all && found != 0) return 0;
    if (all) found = offset;
  }
  return found;
}

void* handle_of(PyObject* tensor) {
  return word_at(tensor, torch.handle_offset);
}

}  // namespace

void connect_torch(py::handle tensor_class, py::handle allocate_handles, const py::list& samples) {
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
  find(library, "aoti_torch_get_layout", &torch.layout);
  find(library, "aoti_torch_get_device_type", &torch.device_type);
  find(library, "aoti_torch_get_device_index", &torch.device_index);
  find(library, "aoti_torch_layout_strided", &torch.strided);
  find(library, "aoti_torch_delete_tensor_object", &torch.destroy);
  if (torch.has_shim() && !allocate_handles.is_none())
    torch.handle_offset = find_handle_offset(allocate_handles, samples);
  torch.tensor_class = reinterpret_cast<PyTypeObject*>(tensor_class.ptr());
  const py::object grad = tensor_class.attr("grad");
  if (Py_TYPE(grad.ptr()) == &PyGetSetDescr_Type)
    torch.grad = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
}

py::object grad_of(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  PyTypeObject* const type = Py_TYPE(tensor);
  if (torch.grad && type != torch.class_with_grad && type->tp_getattro == torch.tensor_class->tp_getattro &&
      py::handle(reinterpret_cast<PyObject*>(type))
          .attr("grad")
          .is(py::handle(reinterpret_cast<PyObject*>(torch.tensor_class)).attr("grad")))
    torch.class_with_grad = type;
  PyObject* const grad = torch.grad && type == torch.class_with_grad ? torch.grad->get(tensor, torch.grad->closure)
                                                                     : PyObject_GetAttr(tensor, name);
  if (grad == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

PyTypeObject* tensor_class() {
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
    const std::string why = py::error_already_set().what();  // fetches and clears; its first line says it all
    throw ArgumentError(text(
        argument, ": expected a plain strided tensor, got one that cannot be read: ", why.substr(0, why.find('\n'))));
  }
  TensorView view;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.dtype = dtype_of(t.dtype);
  view.device = device_of(t.device);
  view.shape.assign(t.shape, t.shape + t.ndim);
  view.strides.assign(t.strides, t.strides + t.ndim);
  view.numel = 1;
  for (int64_t n : view.shape) view.numel *= n;
  check(t.data != nullptr || view.numel == 0, argument, ": expected a tensor with memory of its own, got ",
        py::str(py::type::of(tensor)).cast<std::string>());
  return view;
}

void* current_stream(Device device) {
  void* stream = nullptr;
  if (torch.dlpack->current_work_stream(device.type, device.index, &stream) != 0) throw py::error_already_set();
  return stream;
}

TensorRef::TensorRef(const py::object& tensor, const std::string& argument, Hold hold)
    : address_(tensor.ptr()), hold_(hold), view_(read_tensor(tensor, argument)) {
  if (hold == kOwned) holder_ = tensor;
  if (hold == kWeak) holder_ = py::weakref(tensor);
  if (torch.handle_offset == 0) return;
  void* handle = handle_of(address_);
  impl_ = *static_cast<const char**>(handle);
  if (torch.dtype(handle, &torch_dtype_) || torch.device_type(handle, &torch_device_type_) ||
      torch.device_index(handle, &torch_device_index_))
    throw ArgumentError(text(argument, ": torch does not report its dtype and device"));
}

void TensorRef::prefetch() const {
  __builtin_prefetch(address_);
  __builtin_prefetch(view_.data);
  for (int line = 0; line < 4; ++line) __builtin_prefetch(impl_ + 64 * line);
}

bool TensorRef::lives() const {
  if (hold_ != kWeak) return true;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(holder_.ptr(), &object) != 1) return false;
  Py_DECREF(object);
  return object == address_;
#else
  return PyWeakref_GET_OBJECT(holder_.ptr()) == address_;
#endif
}

bool TensorRef::same_data() const {
  if (!lives()) return false;
  if (torch.handle_offset == 0) {
    dlpack::Tensor t;
    return read_dlpack(address_, &t) && static_cast<char*>(t.data) + t.byte_offset == view_.data;
  }
  void* data = nullptr;
  return torch.data(handle_of(address_), &data) == 0 && (data == view_.data || view_.numel == 0);
}

bool TensorRef::same_view() const {
  if (!same_data()) return false;
  if (torch.handle_offset != 0) return describes(handle_of(address_));
  dlpack::Tensor t;
  return read_dlpack(address_, &t) && dtype_of(t.dtype) == view_.dtype && has_shape(t.ndim, t.shape, t.strides);
}

bool TensorRef::is_like(PyObject* tensor, void** data) const {
  if (torch.handle_offset == 0 || Py_TYPE(tensor) != torch.tensor_class) return false;
  void* handle = handle_of(tensor);
  int32_t layout, device_type, device_index;
  return torch.layout(handle, &layout) == 0 && layout == torch.strided() &&
         torch.device_type(handle, &device_type) == 0 && device_type == torch_device_type_ &&
         torch.device_index(handle, &device_index) == 0 && device_index == torch_device_index_ && describes(handle) &&
         torch.data(handle, data) == 0;
}

bool TensorRef::describes(void* handle) const {
  int64_t *sizes, *strides, dim;
  int32_t dtype;
  return torch.dtype(handle, &dtype) == 0 && dtype == torch_dtype_ && torch.dim(handle, &dim) == 0 &&
         torch.sizes(handle, &sizes) == 0 && torch.strides(handle, &strides) == 0 && has_shape(dim, sizes, strides);
}

bool TensorRef::has_shape(int64_t dim, const int64_t* sizes, const int64_t* strides) const {
  if (dim != static_cast<int64_t>(view_.shape.size())) return false;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != view_.shape[d] || strides[d] != view_.strides[d]) return false;
  return true;
}

}  // namespace fastft
