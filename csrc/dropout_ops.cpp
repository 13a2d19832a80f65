#include "dropout_ops.h"

#include <algorithm>

#include "checks.h"
#include "cpu/dropout.h"
#include "cuda/dropout.h"
#include "kernel_devices.h"

namespace fastft {
namespace {

// Below this a call is over before another thread could have used the interpreter.
constexpr int64_t kUnlockFrom = 16384;

// Like TensorView, with the shape borrowed: a call on a few elements must not spend its time on allocation.
struct Operand {
  void* data;
  DType dtype;
  Device device;
  const int64_t* shape;
  int64_t ndim, numel;

  int64_t last() const { return ndim == 0 ? 1 : shape[ndim - 1]; }
  bool same_shape(const Operand& o) const { return ndim == o.ndim && std::equal(shape, shape + ndim, o.shape); }
  std::string shape_str() const {
    TensorView view;
    view.shape.assign(shape, shape + ndim);
    return view.shape_str();
  }
};

// False if the tensor is not contiguous, or has no memory.
bool view_of(const dlpack::Tensor& t, Operand* out) {
  *out = {static_cast<char*>(t.data) + t.byte_offset, dtype_of(t.dtype), device_of(t.device), t.shape, t.ndim, 1};
  bool contiguous = true;
  for (int32_t d = t.ndim; d-- > 0;) {
    contiguous &= t.shape[d] == 1 || t.strides[d] == out->numel;
    out->numel *= t.shape[d];
  }
  return (contiguous && t.data != nullptr) || out->numel == 0;
}

Operand read(py::handle tensor, const char* argument) {
  dlpack::Tensor t;
  if (!read_dlpack(tensor.ptr(), &t) || t.data == nullptr) read_tensor(tensor, argument);  // throws with the reason
  Operand out;
  if (!view_of(t, &out)) fail(argument, ": expected a contiguous tensor, got shape ", out.shape_str());
  return out;
}

DropoutRandom random_of(py::handle given, Device device) {
  const auto parts = py::reinterpret_borrow<py::tuple>(given);
  DropoutRandom r = {parts[0].cast<double>(), 0, 0, nullptr};
  if (!(r.p >= 0.0 && r.p <= 1.0)) fail("p: expected a probability from 0 to 1, got ", r.p);
  if (parts.size() == 3) {
    r.seed = parts[1].cast<int64_t>();
    r.offset = parts[2].cast<int64_t>();
    return r;
  }
  const Operand state = read(parts[1], "state");
  if (state.dtype != DType::int64 || state.numel != 2 || state.device != device)
    fail("state: expected two int64 on ", device.str(), ", got shape ", state.shape_str(), " ", name(state.dtype),
         " on ", state.device.str());
  r.state = static_cast<const int64_t*>(state.data);
  return r;
}

// Tensors of one call: each is compared with the first.
class Operands {
 public:
  explicit Operands(py::handle first, const char* argument) : first_(read(first, argument)) {
    if (!is_floating(first_.dtype))
      fail(argument, ": expected float32, bfloat16, float16 or float64, got ", name(first_.dtype));
    check_kernel_device(first_.device, argument);
  }

  const Operand& first() const { return first_; }

  // A tensor of the first one's shape and of the dtype `*dtype`. Where that is DType::other, any dtype that goes with
  // the first one's is accepted and stored there.
  void* like(py::handle tensor, const char* argument, DType* dtype) const {
    const Operand t = read(tensor, argument);
    if (!t.same_shape(first_)) fail(argument, ": expected shape ", first_.shape_str(), ", got ", t.shape_str());
    check_dtype(t, argument, dtype);
    return t.data;
  }

  // The same for `count` elements of any shape.
  void* vector(py::handle tensor, int64_t count, const char* argument, DType* dtype) const {
    const Operand t = read(tensor, argument);
    if (t.numel != count) fail(argument, ": expected ", count, " elements, got shape ", t.shape_str());
    check_dtype(t, argument, dtype);
    return t.data;
  }

  // `count` elements of the dtype that is computed in.
  void* statistics(py::handle tensor, int64_t count, const char* argument) const {
    DType computed = first_.dtype == DType::f64 ? DType::f64 : DType::f32;
    return vector(tensor, count, argument, &computed);
  }

  // Null for None.
  void* like_or_null(py::handle tensor, const char* argument, DType* dtype) const {
    return tensor.is_none() ? nullptr : like(tensor, argument, dtype);
  }
  void* vector_or_null(py::handle tensor, int64_t count, const char* argument, DType* dtype) const {
    return tensor.is_none() ? nullptr : vector(tensor, count, argument, dtype);
  }

  int64_t rows(int64_t columns) const {
    if (columns <= 0 || first_.numel % columns != 0)
      fail("columns: expected a divisor of ", first_.numel, ", got ", columns);
    return first_.numel / columns;
  }

 private:
  void check_dtype(const Operand& t, const char* argument, DType* dtype) const {
    if (t.device != first_.device)
      fail(argument, ": expected a tensor on ", first_.device.str(), ", got one on ", t.device.str());
    if (*dtype != DType::other && t.dtype != *dtype)
      fail(argument, ": expected ", name(*dtype), ", got ", name(t.dtype));
    if (!is_floating(t.dtype) || (t.dtype == DType::f64) != (first_.dtype == DType::f64))
      fail(argument, ": expected a floating dtype, float64 only with float64, got ", name(t.dtype), " with ",
           name(first_.dtype));
    *dtype = t.dtype;
  }

  Operand first_;
};

// Runs a call on the CPU or on the device where its tensors lie.
template <typename OnCpu, typename OnDevice>
void dispatch(const Operand& first, const OnCpu& on_cpu, [[maybe_unused]] const OnDevice& on_device) {
#if FASTFT_WITH_CUDA
  if (is_kernel_device(first.device)) {
    void* stream = current_stream(first.device);
    const py::gil_scoped_release unlocked;
    on_device(stream);
    return;
  }
#endif
  if (first.numel < kUnlockFrom) return on_cpu();
  const py::gil_scoped_release unlocked;
  on_cpu();
}

void* workspace_data(py::handle workspace) {
  return workspace.is_none() ? nullptr : read(workspace, "workspace").data;
}

void run(const BiasDropoutAdd& call, const Operand& first) {
  if (call.numel == 0) return;
  dispatch(
      first, [&] { cpu::bias_dropout_add(call); },
      [&](void* stream) { cuda::bias_dropout_add(call, first.device.index, stream); });
}

// Whether the kernels can compute with a tensor as it is.
bool takes(py::handle tensor, Operand* out) {
  static const auto* const parameter =
      reinterpret_cast<PyTypeObject*>(py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr());
  if (Py_TYPE(tensor.ptr()) != tensor_class() && Py_TYPE(tensor.ptr()) != parameter) return false;
  dlpack::Tensor t;
  return read_dlpack(tensor.ptr(), &t) && view_of(t, out) && is_floating(out->dtype) &&
         (out->device.type == dlpack::kCPU || (FASTFT_WITH_CUDA && out->device.type == dlpack::kCUDA));
}

}  // namespace

void bias_dropout_add(py::handle x, py::handle y, py::handle random, py::handle bias, py::handle minus,
                      py::handle residual) {
  const Operands operands(x, "input");
  const Operand& first = operands.first();
  BiasDropoutAdd call = {};
  call.x = first.data;
  call.x_dtype = first.dtype;
  call.numel = first.numel;
  call.columns = first.last();
  call.dtype = call.bias_dtype = call.residual_dtype = DType::other;
  call.y = operands.like(y, "output", &call.dtype);
  call.bias = operands.vector_or_null(bias, call.columns, "bias", &call.bias_dtype);
  call.minus = operands.like_or_null(minus, "minus", &call.residual_dtype);
  call.residual = operands.like_or_null(residual, "residual", &call.residual_dtype);
  call.random = random_of(random, first.device);
  run(call, first);
}

void bias_dropout_add_backward(py::handle dy, py::handle dx, py::handle dbias, py::handle random,
                               py::handle workspace) {
  const Operands operands(dy, "grad");
  const Operand& first = operands.first();
  BiasDropoutAddBackward call = {};
  call.dy = first.data;
  call.dtype = first.dtype;
  call.columns = first.last();
  call.rows = operands.rows(call.columns);
  call.x_dtype = call.bias_dtype = DType::other;
  call.dx = operands.like(dx, "grad_input", &call.x_dtype);
  call.dbias = operands.vector(dbias, call.columns, "grad_bias", &call.bias_dtype);
  call.random = random_of(random, first.device);
  void* memory = workspace_data(workspace);
  dispatch(
      first, [&] { cpu::bias_dropout_add_backward(call); },
      [&](void* stream) { cuda::bias_dropout_add_backward(call, memory, first.device.index, stream); });
}

void dropout_add_norm(py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle y,
                      py::handle sum, py::handle mean, py::handle rstd, int64_t columns, double eps,
                      py::handle random) {
  const Operands operands(x, "input");
  const Operand& first = operands.first();
  DropoutAddNorm call = {};
  call.x = first.data;
  call.x_dtype = first.dtype;
  call.columns = columns;
  call.rows = operands.rows(columns);
  call.residual_dtype = call.dtype = call.weight_dtype = DType::other;
  call.residual = operands.like(residual, "residual", &call.residual_dtype);
  call.weight = operands.vector_or_null(weight, columns, "weight", &call.weight_dtype);
  call.bias = operands.vector_or_null(bias, columns, "bias", &call.weight_dtype);
  call.y = operands.like(y, "output", &call.dtype);
  call.sum = operands.like(sum, "sum", &call.dtype);
  call.mean = mean.is_none() ? nullptr : operands.statistics(mean, call.rows, "mean");
  call.rstd = operands.statistics(rstd, call.rows, "rstd");
  call.eps = eps;
  call.random = random_of(random, first.device);
  if (call.rows == 0) return;
  dispatch(
      first, [&] { cpu::dropout_add_norm(call); },
      [&](void* stream) { cuda::dropout_add_norm(call, first.device.index, stream); });
}

void dropout_add_norm_backward(py::handle dy, py::handle dsum, py::handle sum, py::handle weight, py::handle mean,
                               py::handle rstd, py::handle dx, py::handle dresidual, py::handle dweight,
                               py::handle dbias, int64_t columns, py::handle random, py::handle workspace) {
  const Operands operands(dy, "grad");
  const Operand& first = operands.first();
  DropoutAddNormBackward call = {};
  call.dy = first.data;
  call.dtype = first.dtype;
  call.columns = columns;
  call.rows = operands.rows(columns);
  call.x_dtype = call.residual_dtype = call.weight_dtype = DType::other;
  call.dsum = operands.like_or_null(dsum, "grad_sum", &call.dtype);
  call.sum = operands.like(sum, "sum", &call.dtype);
  call.weight = operands.vector_or_null(weight, columns, "weight", &call.weight_dtype);
  call.mean = mean.is_none() ? nullptr : operands.statistics(mean, call.rows, "mean");
  call.rstd = operands.statistics(rstd, call.rows, "rstd");
  call.dx = operands.like(dx, "grad_input", &call.x_dtype);
  call.dresidual = operands.like(dresidual, "grad_residual", &call.residual_dtype);
  call.dweight = operands.vector_or_null(dweight, columns, "grad_weight", &call.weight_dtype);
  call.dbias = operands.vector_or_null(dbias, columns, "grad_bias", &call.weight_dtype);
  call.random = random_of(random, first.device);
  void* memory = workspace_data(workspace);
  dispatch(
      first, [&] { cpu::dropout_add_norm_backward(call); },
      [&](void* stream) { cuda::dropout_add_norm_backward(call, memory, first.device.index, stream); });
}

int64_t dropout_workspace_bytes([[maybe_unused]] py::handle tensor, [[maybe_unused]] int64_t columns,
                                [[maybe_unused]] int64_t sums) {
#if FASTFT_WITH_CUDA
  const Operand t = read(tensor, "tensor");
  if (is_kernel_device(t.device) && columns > 0) return cuda::row_sums_bytes(t.numel / columns, columns, t.dtype, sums);
#endif
  return 0;
}

bool dropout_takes(py::handle tensor) {
  Operand ignored;
  return takes(tensor, &ignored);
}

py::object dropout(py::handle x, py::handle random) {
  static PyObject* const empty_like = py::object(py::module_::import("torch").attr("empty_like")).release().ptr();
  Operand first;
  if (!takes(x, &first)) return py::none();
  BiasDropoutAdd call = {};
  call.random = random_of(random, first.device);
  auto y = py::reinterpret_steal<py::object>(PyObject_CallOneArg(empty_like, x.ptr()));
  dlpack::Tensor made;
  if (!y || !read_dlpack(y.ptr(), &made)) throw py::error_already_set();
  call.x = first.data;
  call.y = static_cast<char*>(made.data) + made.byte_offset;
  call.numel = first.numel;
  call.columns = first.last();
  call.x_dtype = call.dtype = call.bias_dtype = call.residual_dtype = first.dtype;
  run(call, first);
  return y;
}

}  // namespace fastft
