// The Python module fastft._C.
#include <pybind11/pybind11.h>

#include "adamw_plan.h"
#include "checks.h"
#include "cpu/adamw.h"
#include "dropout_ops.h"
#include "kernel_devices.h"

namespace fastft {
namespace {

// Why CUDA cannot be used; "" when it can.
std::string cuda_unavailable() {
#if FASTFT_WITH_CUDA
  return cuda::unavailable_reason();
#else
  return "this build of fastft has no CUDA code";
#endif
}

// Functions that are called for every few elements go past pybind11, whose dispatch would take a third of their time.
template <typename Function>
PyObject* guarded(const Function& function) {
  try {
    return function().release().ptr();
  } catch (const ArgumentError& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// bias_dropout_add(x, y, random, bias=None, minus=None, residual=None, /)
PyObject* py_bias_dropout_add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> py::object {
    check(count >= 3 && count <= 6, "bias_dropout_add: expected 3 to 6 arguments, got ", count);
    const auto optional = [&](Py_ssize_t i) { return i < count ? py::handle(args[i]) : py::handle(Py_None); };
    bias_dropout_add(args[0], args[1], args[2], optional(3), optional(4), optional(5));
    return py::none();
  });
}

// dropout(x, random, /)
PyObject* py_dropout(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> py::object {
    check(count == 2, "dropout: expected 2 arguments, got ", count);
    return dropout(args[0], args[1]);
  });
}

// dropout_takes(tensor, /)
PyObject* py_dropout_takes(PyObject*, PyObject* tensor) {
  return guarded([&]() -> py::object { return py::bool_(dropout_takes(tensor)); });
}

PyMethodDef kFastFunctions[] = {
    {"dropout", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_dropout)), METH_FASTCALL, nullptr},
    {"bias_dropout_add", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_bias_dropout_add)), METH_FASTCALL,
     nullptr},
    {"dropout_takes", py_dropout_takes, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of fastft.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const ArgumentError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
  cpu::instruction_set();  // a FASTFT_CPU_CAPABILITY that is none fails here, not in a step
  m.attr("version") = FASTFT_VERSION;
  m.attr("cuda_archs") = FASTFT_CUDA_ARCHS;  // "" without CUDA code
  // Device types whose tensors go to the CUDA kernels.
#if FASTFT_CUDA_ON_CPU
  m.attr("kernel_devices") = py::make_tuple("cpu");
#elif FASTFT_WITH_CUDA
  m.attr("kernel_devices") = py::make_tuple("cuda");
#else
  m.attr("kernel_devices") = py::tuple();
#endif
  m.def("cuda_unavailable", &cuda_unavailable);
  m.def("cpu_instruction_set", &cpu::instruction_set);
  m.def("connect_torch", &connect_torch, py::arg("tensor_class"), py::arg("allocate_handles"), py::arg("samples"));
  m.def("overlapping", &overlapping, py::arg("tensors"));
  if (PyModule_AddFunctions(m.ptr(), kFastFunctions) != 0) throw py::error_already_set();
  m.def("bias_dropout_add_backward", &bias_dropout_add_backward, py::arg("dy"), py::arg("dx"), py::arg("dbias"),
        py::arg("random"), py::arg("workspace"));
  m.def("dropout_add_norm", &dropout_add_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
        py::arg("y"), py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::arg("columns"), py::arg("eps"),
        py::arg("random"));
  m.def("dropout_add_norm_backward", &dropout_add_norm_backward, py::arg("dy"), py::arg("dsum"), py::arg("sum"),
        py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"),
        py::arg("dbias"), py::arg("columns"), py::arg("random"), py::arg("workspace"));
  m.def("dropout_workspace_bytes", &dropout_workspace_bytes, py::arg("tensor"), py::arg("columns"), py::arg("sums"));
  bind_record(m);
  py::class_<AdamWPlan>(m, "AdamWPlan")
      .def(py::init<const py::list&>(), py::arg("records"))
      .def("gather", &AdamWPlan::gather, py::arg("parameter_lists"), py::arg("state"))
      .def("unread", &AdamWPlan::unread)
      .def("set_grad", &AdamWPlan::set_grad, py::arg("position"), py::arg("grad"))
      .def("stepped", &AdamWPlan::stepped, py::arg("position"))
      .def("written", &AdamWPlan::written)
      .def("release", &AdamWPlan::release)
      .def("devices", &AdamWPlan::devices)
      .def("workspace_bytes", &AdamWPlan::workspace_bytes, py::arg("device"))
      .def("launches", &AdamWPlan::launches, py::arg("device"))
      .def("sum_of_squares", &AdamWPlan::sum_of_squares, py::arg("device"), py::arg("out"), py::arg("workspace"))
      .def("step", &AdamWPlan::step, py::arg("device"), py::arg("groups"), py::arg("lrs"), py::arg("sum_of_squares"),
           py::arg("max_grad_norm"), py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("skipped_steps"), py::arg("workspace"));
}

}  // namespace fastft
