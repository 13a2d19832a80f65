#include "dropout_ops.h"

#include "checks.h"
#include "cpu/dropout.h"
#include "cuda/dropout.h"
#include "kernel_devices.h"

namespace fastft {
namespace {

// Tensors of one call: each is compared with the first.
class Operands {
 public:
  explicit Operands(const py::object& first, const char* argument) : first_(read(first, argument)) {
    check(is_floating(first_.dtype), argument, ": expected float32, bfloat16, float16 or float64, got ",
          name(first_.dtype));
    check_kernel_device(first_.device, argument);
  }

  const TensorView& first() const { return first_; }

  // A tensor of the first one's shape and dtype; with `dtype`, of any floating dtype that it can be computed with.
  void* like(const py::object& tensor, const char* argument, DType* dtype = nullptr) const {
    if (tensor.is_none()) return nullptr;
    const TensorView t = read(tensor, argument);
    check(t.numel == first_.numel && t.shape == first_.shape, argument, ": expected shape ", first_.shape_str(),
          ", got ", t.shape_str());
    check_dtype(t, argument, dtype);
    return t.data;
  }

  // `count` elements in one piece.
  void* vector(const py::object& tensor, int64_t count, const char* argument, DType* dtype) const {
    if (tensor.is_none()) return nullptr;
    const TensorView t = read(tensor, argument);
    check(t.numel == count, argument, ": expected ", count, " elements, got shape ", t.shape_str());
    check_dtype(t, argument, dtype);
    return t.data;
  }

  // Statistics: `count` elements of the dtype that is computed in.
  void* statistics(const py::object& tensor, int64_t count, const char* argument) const {
    if (tensor.is_none()) return nullptr;
    const TensorView t = read(tensor, argument);
    const DType computed = first_.dtype == DType::f64 ? DType::f64 : DType::f32;
    check(t.numel == count && t.dtype == computed && t.device == first_.device, argument, ": expected ", count, " ",
          name(computed), " on ", first_.device.str(), ", got shape ", t.shape_str(), " ", name(t.dtype), " on ",
          t.device.str());
    return t.data;
  }

  DropoutRandom random(const py::tuple& given) const {
    DropoutRandom r = {given[0].cast<double>(), 0, 0, nullptr};
    check(r.p >= 0.0 && r.p <= 1.0, "p: expected a probability from 0 to 1, got ", r.p);
    if (given.size() == 3) {
      r.seed = given[1].cast<int64_t>();
      r.offset = given[2].cast<int64_t>();
      return r;
    }
    const TensorView state = read_tensor(given[1], "state");
    check(state.dtype == DType::int64 && state.numel == 2 && state.device == first_.device && state.contiguous(),
          "state: expected two int64 on ", first_.device.str(), ", got shape ", state.shape_str(), " ",
          name(state.dtype), " on ", state.device.str());
    r.state = static_cast<const int64_t*>(state.data);
    return r;
  }

  int64_t rows(int64_t columns) const {
    check(columns > 0 && first_.numel % columns == 0, "columns: expected a divisor of ", first_.numel, ", got ",
          columns);
    return first_.numel / columns;
  }

 private:
  static TensorView read(const py::object& tensor, const char* argument) {
    TensorView t = read_tensor(tensor, argument);
    check(t.contiguous(), argument, ": expected a contiguous tensor, got shape ", t.shape_str());
    return t;
  }

  void check_dtype(const TensorView& t, const char* argument, DType* dtype) const {
    check(t.device == first_.device, argument, ": expected a tensor on ", first_.device.str(), ", got one on ",
          t.device.str());
    if (dtype == nullptr) {
      check(t.dtype == first_.dtype, argument, ": expected ", name(first_.dtype), ", got ", name(t.dtype));
      return;
    }
    check(is_floating(t.dtype) && (t.dtype != DType::f64 || first_.dtype == DType::f64), argument,
          ": expected a floating dtype, float64 only with float64, got ", name(t.dtype), " with ", name(first_.dtype));
    *dtype = t.dtype;
  }

  TensorView first_;
};

// Runs a call on the CPU or on the device where its tensors lie.
template <typename OnCpu, typename OnDevice>
void dispatch(Device device, const OnCpu& on_cpu, [[maybe_unused]] const OnDevice& on_device) {
#if FASTFT_WITH_CUDA
  if (is_kernel_device(device)) {
    void* stream = current_stream(device);
    const py::gil_scoped_release unlocked;
    on_device(stream);
    return;
  }
#endif
  const py::gil_scoped_release unlocked;
  on_cpu();
}

void* workspace_data(const py::object& workspace) {
  return workspace.is_none() ? nullptr : read_tensor(workspace, "workspace").data;
}

}  // namespace

void dropout_add(const py::object& x, const py::object& y, const py::tuple& random, const py::object& bias,
                 const py::object& minus, const py::object& residual) {
  const Operands operands(x, "input");
  const TensorView& first = operands.first();
  DropoutAdd call = {};
  call.x = first.data;
  call.y = operands.like(y, "output");
  call.numel = first.numel;
  call.dtype = call.bias_dtype = call.residual_dtype = first.dtype;
  call.columns = first.shape.empty() ? 1 : first.shape.back();
  call.bias = operands.vector(bias, call.columns, "bias", &call.bias_dtype);
  call.minus = operands.like(minus, "minus", &call.residual_dtype);
  DType residual_dtype = call.residual_dtype;
  call.residual = operands.like(residual, "residual", &residual_dtype);
  check(call.minus == nullptr || residual_dtype == call.residual_dtype, "minus and residual: expected one dtype, got ",
        name(call.residual_dtype), " and ", name(residual_dtype));
  call.residual_dtype = residual_dtype;
  call.random = operands.random(random);
  if (call.numel == 0) return;
  dispatch(
      first.device, [&] { cpu::dropout_add(call); },
      [&](void* stream) { cuda::dropout_add(call, first.device.index, stream); });
}

void dropout_bias_grad(const py::object& dy, const py::object& dx, const py::object& dbias, const py::tuple& random,
                       const py::object& workspace) {
  const Operands operands(dy, "grad");
  const TensorView& first = operands.first();
  DropoutBiasGrad call = {};
  call.dy = first.data;
  call.dtype = call.bias_dtype = first.dtype;
  call.dx = operands.like(dx, "grad_input");
  call.columns = first.shape.empty() ? 1 : first.shape.back();
  call.rows = operands.rows(call.columns);
  call.dbias = operands.vector(dbias, call.columns, "grad_bias", &call.bias_dtype);
  call.random = operands.random(random);
  void* memory = workspace_data(workspace);
  dispatch(
      first.device, [&] { cpu::dropout_bias_grad(call); },
      [&](void* stream) { cuda::dropout_bias_grad(call, memory, first.device.index, stream); });
}

void dropout_norm(const py::object& x, const py::object& residual, const py::object& weight, const py::object& bias,
                  const py::object& y, const py::object& sum, const py::object& mean, const py::object& rstd,
                  int64_t columns, double eps, const py::tuple& random) {
  const Operands operands(x, "input");
  const TensorView& first = operands.first();
  DropoutNorm call = {};
  call.x = first.data;
  call.dtype = call.weight_dtype = first.dtype;
  call.columns = columns;
  call.rows = operands.rows(columns);
  call.residual = operands.like(residual, "residual");
  call.weight = operands.vector(weight, columns, "weight", &call.weight_dtype);
  DType bias_dtype = call.weight_dtype;
  call.bias = operands.vector(bias, columns, "bias", &bias_dtype);
  check(call.weight == nullptr || bias_dtype == call.weight_dtype, "bias: expected weight's dtype ",
        name(call.weight_dtype), ", got ", name(bias_dtype));
  call.weight_dtype = bias_dtype;
  call.y = operands.like(y, "output");
  call.sum = operands.like(sum, "sum");
  call.mean = operands.statistics(mean, call.rows, "mean");
  call.rstd = operands.statistics(rstd, call.rows, "rstd");
  call.eps = eps;
  call.random = operands.random(random);
  if (call.rows == 0) return;
  dispatch(
      first.device, [&] { cpu::dropout_norm(call); },
      [&](void* stream) { cuda::dropout_norm(call, first.device.index, stream); });
}

void dropout_norm_grad(const py::object& dy, const py::object& dsum, const py::object& sum, const py::object& weight,
                       const py::object& mean, const py::object& rstd, const py::object& dx,
                       const py::object& dresidual, const py::object& dweight, const py::object& dbias, int64_t columns,
                       const py::tuple& random, const py::object& workspace) {
  const Operands operands(dy, "grad");
  const TensorView& first = operands.first();
  DropoutNormGrad call = {};
  call.dy = first.data;
  call.dtype = call.weight_dtype = first.dtype;
  call.columns = columns;
  call.rows = operands.rows(columns);
  call.dsum = operands.like(dsum, "grad_sum");
  call.sum = operands.like(sum, "sum");
  call.weight = operands.vector(weight, columns, "weight", &call.weight_dtype);
  call.mean = operands.statistics(mean, call.rows, "mean");
  call.rstd = operands.statistics(rstd, call.rows, "rstd");
  call.dx = operands.like(dx, "grad_input");
  call.dresidual = operands.like(dresidual, "grad_residual");
  call.dweight = operands.vector(dweight, columns, "grad_weight", &call.weight_dtype);
  call.dbias = operands.vector(dbias, columns, "grad_bias", &call.weight_dtype);
  call.random = operands.random(random);
  void* memory = workspace_data(workspace);
  dispatch(
      first.device, [&] { cpu::dropout_norm_grad(call); },
      [&](void* stream) { cuda::dropout_norm_grad(call, memory, first.device.index, stream); });
}

int64_t dropout_workspace_bytes([[maybe_unused]] const py::object& tensor, [[maybe_unused]] int64_t columns,
                                [[maybe_unused]] int64_t sums) {
#if FASTFT_WITH_CUDA
  const TensorView t = read_tensor(tensor, "tensor");
  if (is_kernel_device(t.device) && columns > 0) return cuda::row_sums_bytes(t.numel / columns, columns, t.dtype, sums);
#endif
  return 0;
}

}  // namespace fastft
