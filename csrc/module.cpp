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
  m.def("connect_torch", &connect_torch, py::arg("tensor_class"), py::arg("allocate_handles"));
  m.def("overlapping", &overlapping, py::arg("tensors"));
  m.def("dropout_add", &dropout_add, py::arg("x"), py::arg("y"), py::arg("random"), py::arg("bias") = py::none(),
        py::arg("minus") = py::none(), py::arg("residual") = py::none());
  m.def("dropout_bias_grad", &dropout_bias_grad, py::arg("dy"), py::arg("dx"), py::arg("dbias"), py::arg("random"),
        py::arg("workspace"));
  m.def("dropout_norm", &dropout_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
        py::arg("y"), py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::arg("columns"), py::arg("eps"),
        py::arg("random"));
  m.def("dropout_norm_grad", &dropout_norm_grad, py::arg("dy"), py::arg("dsum"), py::arg("sum"), py::arg("weight"),
        py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"),
        py::arg("columns"), py::arg("random"), py::arg("workspace"));
  m.def("dropout_workspace_bytes", &dropout_workspace_bytes, py::arg("tensor"), py::arg("columns"), py::arg("sums"));
  py::class_<AdamWPlan>(m, "AdamWPlan")
      .def(py::init<const py::list&>(), py::arg("entries"))
      .def("gather", &AdamWPlan::gather, py::arg("parameter_lists"), py::arg("state"))
      .def("set_grad", &AdamWPlan::set_grad, py::arg("position"), py::arg("grad"))
      .def("release", &AdamWPlan::release)
      .def("devices", &AdamWPlan::devices)
      .def("workspace_bytes", &AdamWPlan::workspace_bytes, py::arg("device"))
      .def("launches", &AdamWPlan::launches, py::arg("device"))
      .def("sum_of_squares", &AdamWPlan::sum_of_squares, py::arg("device"), py::arg("out"), py::arg("workspace"))
      .def("step", &AdamWPlan::step, py::arg("device"), py::arg("groups"), py::arg("sum_of_squares"),
           py::arg("max_grad_norm"), py::arg("skip_nonfinite"), py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("skipped_steps"), py::arg("workspace"));
}

}  // namespace fastft
