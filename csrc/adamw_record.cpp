#include "adamw_record.h"

#include <pybind11/stl.h>

#include <iterator>
#include <utility>

#include "checks.h"

namespace fastft {
namespace {

size_t place_of(const std::string& name) {
  size_t at = 0;
  while (at < Field::count_ && name != kRecordTensors[at].name) ++at;
  if (at == Field::count_) throw py::type_error("AdamWRecord: unknown tensor '" + name + "'");
  return at;
}

py::tuple tensor_names() {
  py::tuple names(std::size(kRecordTensors));
  for (size_t i = 0; i < Field::count_; ++i) names[i] = kRecordTensors[i].name;
  return names;
}

// Anchoring as Python sees it. Of its own type, since the type information of an enum with a name would be visible
// outside the module.
enum class ExportedAnchoring : uint8_t {};

AdamWRecord make_record(py::object param, int32_t group, bool dormant, std::string name, ExportedAnchoring anchoring,
                        bool counts_on_device, std::optional<uint64_t> rounding_key,
                        const std::optional<std::array<int64_t, 3>>& index, const py::kwargs& tensors) {
  AdamWRecord record = {std::move(param), group,       dormant, std::move(name), static_cast<Anchoring>(anchoring),
                        counts_on_device, rounding_key};
  if (index) record.index = {(*index)[0], (*index)[1], (*index)[2]};
  for (py::object& tensor : record.tensors) tensor = py::none();
  return record.replaced(tensors);
}

}  // namespace

AdamWRecord AdamWRecord::replaced(const py::kwargs& others) const {
  AdamWRecord record = *this;
  for (const auto& [key, tensor] : others)
    record.tensors[place_of(key.cast<std::string>())] = py::reinterpret_borrow<py::object>(tensor);
  return record;
}

AdamWRecord AdamWRecord::unstepped() const {
  AdamWRecord record = {param, group, dormant};
  for (py::object& tensor : record.tensors) tensor = py::none();
  return record;
}

void bind_record(py::module_& module) {
  py::enum_<ExportedAnchoring> kinds(module, "Anchoring");
  for (size_t i = 0; i < std::size(kAnchorings); ++i) kinds.value(kAnchorings[i], static_cast<ExportedAnchoring>(i));

  py::class_<AdamWRecord> record(module, "AdamWRecord");
  record.def(py::init(&make_record), py::arg("param"), py::arg("group"), py::kw_only(), py::arg("dormant") = false,
             py::arg("name") = "", py::arg("anchoring") = ExportedAnchoring{}, py::arg("counts_on_device") = false,
             py::arg("rounding_key") = py::none(), py::arg("index") = py::none());
  record.def_readonly("param", &AdamWRecord::param);
  record.def_readonly("group", &AdamWRecord::group);
  record.def_readonly("dormant", &AdamWRecord::dormant);
  record.def_readonly("name", &AdamWRecord::name);
  record.def_property_readonly("anchoring",
                               [](const AdamWRecord& r) { return static_cast<ExportedAnchoring>(r.anchoring); });
  record.def_readonly("counts_on_device", &AdamWRecord::counts_on_device);
  record.def_readonly("rounding_key", &AdamWRecord::rounding_key);
  record.def_property_readonly("index", [](const AdamWRecord& r) -> py::object {
    if (r.index.row == 0) return py::none();
    return py::make_tuple(r.index.row, r.index.stride, r.index.first);
  });
  record.def_property_readonly("steps", &AdamWRecord::steps);
  record.def("replaced", &AdamWRecord::replaced);
  record.def("unstepped", &AdamWRecord::unstepped);
  record.attr("tensors") = tensor_names();
  for (size_t i = 0; i < Field::count_; ++i)
    record.def_property_readonly(kRecordTensors[i].name, [i](const AdamWRecord& r) { return r.tensors[i]; });
}

}  // namespace fastft
