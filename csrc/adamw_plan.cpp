#include "adamw_plan.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/adamw.h"
#include "kernel_devices.h"

namespace fastft {
namespace {

constexpr size_t kAhead = 4;  // slots whose tensors are prefetched while one is looked at

Device parse_device(const py::tuple& t) {
  return {static_cast<dlpack::DeviceType>(t[0].cast<int32_t>()), t[1].cast<int32_t>()};
}

// One scalar in float32 or float64.
double read_scalar(const TensorView& view) {
  return view.dtype == DType::f64 ? *static_cast<const double*>(view.data) : *static_cast<const float*>(view.data);
}

// Elements of a row, in which blocks of 8-bit moments are counted; a tensor of one dimension is one row.
int64_t block_row(const TensorView& p) {
  return p.shape.size() > 1 && p.shape[0] > 0 ? p.numel / p.shape[0] : p.numel;
}

// group[key]; `key` is kept as a Python string between calls.
PyObject* item(const py::dict& group, const char* name, PyObject*& key) {
  if (key == nullptr) key = PyUnicode_InternFromString(name);
  PyObject* value = PyDict_GetItemWithError(group.ptr(), key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (value == nullptr) throw py::key_error(text("param_groups: expected the key ", name));
  return value;
}

double number(PyObject* value) {
  const double x = PyFloat_AsDouble(value);
  if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

bool flag(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// The numbers of one of the optimizer's param_groups; lr: a float, or a tensor on the device.
AdamWGroup read_group(const py::dict& group, const py::object& lr, Device device) {
  AdamWGroup read = {};
  if (PyFloat_Check(lr.ptr())) {
    read.options.lr = PyFloat_AS_DOUBLE(lr.ptr());
  } else {
    const TensorView view = read_tensor(lr, "lr");
    check(is_floating(view.dtype) && view.numel == 1 && view.device == device,
          "lr: expected one floating-point number on ", device.str(), ", got ", view.numel, " ", name(view.dtype),
          " on ", view.device.str());
    read.lr = view.data;
    read.lr_dtype = view.dtype;
  }
  static PyObject *betas, *eps, *weight_decay, *anchor_decay, *amsgrad, *maximize;
  const auto pair = py::reinterpret_steal<py::object>(PySequence_Tuple(item(group, "betas", betas)));
  if (!pair) throw py::error_already_set();
  check(PyTuple_GET_SIZE(pair.ptr()) == 2, "betas: expected two numbers, got ", PyTuple_GET_SIZE(pair.ptr()));
  read.options.beta1 = number(PyTuple_GET_ITEM(pair.ptr(), 0));
  read.options.beta2 = number(PyTuple_GET_ITEM(pair.ptr(), 1));
  read.options.eps = number(item(group, "eps", eps));
  read.options.weight_decay = number(item(group, "weight_decay", weight_decay));
  read.options.anchor_decay = number(item(group, "anchor_decay", anchor_decay));
  read.options.amsgrad = flag(item(group, "amsgrad", amsgrad));
  read.options.maximize = flag(item(group, "maximize", maximize));
  return read;
}

// The data of an optional one-element tensor on the given device; null for None.
template <typename T>
T* scalar_data(const py::object& tensor, DType dtype, Device device, const char* argument) {
  if (tensor.is_none()) return nullptr;
  const TensorView view = read_tensor(tensor, argument);
  check(view.dtype == dtype && view.numel == 1 && view.device == device, argument, ": expected one ", name(dtype),
        " on ", device.str(), ", got ", view.numel, " ", name(view.dtype), " on ", view.device.str());
  return static_cast<T*>(view.data);
}

}  // namespace

AdamWPlan::AdamWPlan(const py::list& records) : slots_(records.size()) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    const AdamWRecord& record = py::object(records[i]).cast<const AdamWRecord&>();
    slot.param = record.param.ptr();
    slot.group = record.group;
    if (record.steps())
      fill(slot, record);
    else if (record.dormant)
      slot.kind = Kind::dormant;
  }
}

void AdamWPlan::fill(Slot& slot, const AdamWRecord& record) {
  slot.kind = Kind::live;
  slot.name = record.name;
  const std::string& who = slot.name;
  const py::object& stepped = record.tensors[Field::stepped];
  slot.wrapped = !stepped.is(record.param);
  slot.counts_versions = !stepped.attr("is_inference")().cast<bool>();
  for (size_t i = 0; i < Field::count_; ++i) {
    if (record.tensors[i].is_none() && !kRecordTensors[i].needed) continue;
    // The parameter holds its own data, and the state dict holds the moments; but not their local parts.
    const bool kept = kRecordTensors[i].keeper == Keeper::plan || (slot.wrapped && i != Field::step);
    const TensorRef::Hold hold = kept                  ? TensorRef::kOwned
                                 : i == Field::stepped ? TensorRef::kBorrowed
                                                       : TensorRef::kWeak;
    const std::string argument = i == Field::stepped ? who : text(who, ": ", kRecordTensors[i].name);
    slot.tensors[i] = TensorRef(record.tensors[i], argument, hold);
  }
  const TensorView& p = slot[Field::stepped].view();
  check(is_floating(p.dtype), who, ": expected a float32, bfloat16, float16 or float64 parameter, got ", name(p.dtype));
  check(p.dense(), who,
        ": expected a parameter whose elements each have a place of their own, without gaps; got shape ",
        p.shape_str());
  check_kernel_device(p.device, who);
  for (size_t i = Field::stepped + 1; i < Field::count_; ++i)
    if (slot.tensors[i]) check_tensor(slot, i, record.counts_on_device);
  check_low_precision(slot, record);
  check(!slot[Field::importance] || slot[Field::anchor], who, ": importance: expected None without an anchor");
  const AnchorForm form = form_of(record.anchoring);
  const AnchorForm given = slot[Field::importance] ? AnchorForm::weighted
                           : slot[Field::anchor]   ? AnchorForm::plain
                                                   : AnchorForm::none;
  check(form == given || (form == AnchorForm::selective && given == AnchorForm::plain), who,
        ": anchoring: ", kAnchorings[static_cast<size_t>(record.anchoring)],
        " does not go with the anchor and importance given");

  AdamWEntry& e = slot.entry;
  const auto data = [&](size_t i) { return slot.tensors[i] ? slot.tensors[i].view().data : nullptr; };
  const auto dtype = [&](size_t i) { return slot.tensors[i] ? slot.tensors[i].view().dtype : DType::f32; };
  e.param = p.data;
  e.exp_avg = data(Field::exp_avg);
  e.exp_avg_sq = data(Field::exp_avg_sq);
  e.max_exp_avg_sq = data(Field::max_exp_avg_sq);
  e.anchor = data(Field::anchor);
  e.importance = data(Field::importance);
  e.mask = static_cast<const uint8_t*>(data(Field::update_mask));
  e.rows = static_cast<const int64_t*>(data(Field::rows));
  e.numel = p.numel;
  e.row_size = !p.shape.empty() && p.shape[0] > 0 ? p.numel / p.shape[0] : 0;
  e.live_rows = slot[Field::rows] ? slot[Field::rows].view().numel : 0;
  static const int64_t no_row = 0;  // a list of no rows may have no data: still not "all rows"
  if (slot[Field::rows] && e.rows == nullptr) e.rows = &no_row;
  e.device_step = record.counts_on_device ? static_cast<float*>(data(Field::step)) : nullptr;
  e.group = slot.group;
  e.dtype = p.dtype;
  e.state_dtype = dtype(Field::exp_avg);
  e.anchor_dtype = dtype(Field::anchor);
  e.importance_dtype = dtype(Field::importance);
  e.anchoring = record.anchoring;
  e.low_bits = data(Field::low_bits);
  e.low_width = !slot[Field::low_bits] ? 0 : dtype(Field::low_bits) == DType::u16 ? 16 : 8;
  e.weight_sums = static_cast<uint32_t*>(data(Field::weight_sums));
  e.exp_avg_scales = static_cast<float*>(data(Field::exp_avg_scales));
  e.exp_avg_sq_scales = static_cast<float*>(data(Field::exp_avg_sq_scales));
  e.block_row = block_row(p);
  e.stochastic = record.rounding_key.has_value();
  e.rounding_key = record.rounding_key.value_or(0);
  e.index = record.index.row > 0 ? record.index : ElementIndex{std::max<int64_t>(p.numel, 1), 0, 0};
}

// Throws ArgumentError unless what holds bits below the parameter's and the moments' precision goes together.
void AdamWPlan::check_low_precision(const Slot& slot, const AdamWRecord& record) {
  const std::string& who = slot.name;
  const TensorView& p = slot[Field::stepped].view();
  const bool codes = slot[Field::exp_avg].view().dtype == DType::u8;
  check(bool(slot[Field::exp_avg_scales]) == codes && bool(slot[Field::exp_avg_sq_scales]) == codes, who,
        ": exp_avg_scales: expected both moments' scales with uint8 moments, and none with others");
  check(!codes || p.shape.size() == 1 || p.rows_contiguous(), who,
        ": exp_avg: expected floating-point moments where rows do not lie in one piece, got uint8");
  check(!codes || !slot[Field::rows] || p.shape.size() > 1, who, ": rows: expected None with uint8 moments of one row");
  check(!codes || !slot[Field::max_exp_avg_sq], who, ": max_exp_avg_sq: expected None with uint8 moments");
  check(!codes || record.anchoring != Anchoring::selective, who,
        ": anchoring: expected floating-point moments with selective, got uint8");
  check(bool(slot[Field::low_bits]) == bool(slot[Field::weight_sums]), who,
        ": weight_sums: expected with low_bits, and only with them");
  if (record.rounding_key) {
    const bool exact = slot[Field::low_bits] && slot[Field::low_bits].view().dtype == DType::u16;
    check(item_size(p.dtype) == 2 && !exact, who, ": rounding_key: expected None, since nothing is rounded");
    const ElementIndex& index = record.index;
    check(index.row == 0 || (index.row > 0 && p.numel % index.row == 0 && index.stride >= 0 && index.first >= 0), who,
          ": index: expected (row, stride, first) of whole rows, got (", index.row, ", ", index.stride, ", ",
          index.first, ")");
  }
}

// Throws ArgumentError unless the slot's tensor i fits its parameter as kRecordTensors asks.
void AdamWPlan::check_tensor(const Slot& slot, size_t i, bool counts_on_device) {
  const std::string& who = slot.name;
  const RecordTensor& rule = kRecordTensors[i];
  const TensorView &t = slot.tensors[i].view(), &p = slot[Field::stepped].view();
  const DType state = slot[Field::exp_avg].view().dtype;
  if (rule.like_param) {
    check(t.same_layout(p), who, ": ", rule.name, ": expected the parameter's shape ", p.shape_str(),
          " in the parameter's memory order, got shape ", t.shape_str());
    check(t.device == p.device, who, ": ", rule.name, ": expected a tensor on ", p.device.str(), ", got one on ",
          t.device.str());
  }
  switch (rule.dtypes) {
    case Dtypes::floating:
      break;
    case Dtypes::moment: {
      const bool is_double = p.dtype == DType::f64;
      const bool takes = t.dtype == p.dtype || (!is_double && (t.dtype == DType::bf16 || t.dtype == DType::u8)) ||
                         (item_size(p.dtype) == 2 && t.dtype == DType::f32);
      check(takes, who, ": ", rule.name, ": expected ", is_double ? "float64" : "",
            p.dtype == DType::f16 ? "float16, " : "", is_double ? "" : "float32, bfloat16 or uint8 codes", ", got ",
            name(t.dtype));
      break;
    }
    case Dtypes::low_bits:
      check((t.dtype == DType::u16 || t.dtype == DType::u8) && p.dtype == DType::bf16, who, ": ", rule.name,
            ": expected uint16 or uint8 with a bfloat16 parameter, got ", name(t.dtype), " with ", name(p.dtype));
      break;
    case Dtypes::scales: {
      const int64_t row = block_row(p), count = row > 0 ? p.numel / row * ((row + kBlock8 - 1) / kBlock8) : 0;
      check(t.dtype == DType::f32 && t.numel == count && t.contiguous() && t.device == p.device, who, ": ", rule.name,
            ": expected ", count, " float32 in one piece on ", p.device.str(), ", got ", t.numel, " ", name(t.dtype),
            " on ", t.device.str());
      break;
    }
    case Dtypes::sums: {
      const int64_t row = block_row(p), blocks = row > 0 ? p.numel / row * ((row + kBlock8 - 1) / kBlock8) : 0;
      const bool codes = slot[Field::exp_avg].view().dtype == DType::u8;
      const int64_t least = std::max(p.numel / 1024, codes ? blocks * kBlock8 / kUnit : 0) + 1;
      check(t.dtype == DType::int32 && t.numel >= least && t.contiguous() && t.device == p.device, who, ": ", rule.name,
            ": expected at least ", least, " int32 in one piece on ", p.device.str(), ", got ", t.numel, " ",
            name(t.dtype), " on ", t.device.str());
      break;
    }
    case Dtypes::as_exp_avg:
      check(t.dtype == state, who, ": ", rule.name, ": expected exp_avg's dtype ", name(state), ", got ",
            name(t.dtype));
      break;
    case Dtypes::readable:
      check(is_floating(t.dtype) && (t.dtype != DType::f64 || p.dtype == DType::f64), who, ": ", rule.name,
            ": expected float32, bfloat16 or float16 (float64 with a float64 parameter), got ", name(t.dtype));
      break;
    case Dtypes::boolean:
      check(t.dtype == DType::boolean, who, ": ", rule.name, ": expected bool, got ", name(t.dtype));
      break;
    case Dtypes::indices:
      check(t.dtype == DType::int64 && t.shape.size() == 1 && p.rows_contiguous() && t.device == p.device, who, ": ",
            rule.name, ": expected ascending int64 indices into rows that lie in one piece");
      break;
    case Dtypes::count:
      check(t.numel == 1 && (t.dtype == DType::f32 || t.dtype == DType::f64), who, ": ", rule.name,
            ": expected one float32 or float64, got ", t.numel, " ", name(t.dtype));
      check(counts_on_device ? t.device == p.device && t.dtype == DType::f32 : t.device.type == dlpack::kCPU, who, ": ",
            rule.name, ": expected ", counts_on_device ? "a float32 on " + p.device.str() : "a tensor on cpu", ", got ",
            name(t.dtype), " on ", t.device.str());
      break;
  }
}

void AdamWPlan::remember_state(PyObject* state) {
  state_items_.clear();
  state_item_sizes_.clear();
  PyObject *key, *value, *inner_key, *inner_value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) {
    state_items_.push_back({key, value});
    state_item_sizes_.push_back(PyDict_Check(value) ? PyDict_GET_SIZE(value) : -1);
    if (PyDict_Check(value))
      for (Py_ssize_t i = 0; PyDict_Next(value, &i, &inner_key, &inner_value);)
        state_items_.push_back({inner_key, inner_value});
  }
  state_known_ = true;
}

// Whether state and the dicts in it hold objects at the very addresses that they held: some nanoseconds an item. What
// is found so lives, since the dict holds it, and may be asked whether it is still the same.
bool AdamWPlan::state_is_unchanged(PyObject* state) const {
  const Snapshot* item = state_items_.data();
  const Snapshot* const end = item + state_items_.size();
  size_t outer = 0;
  PyObject *key, *value, *inner_key, *inner_value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value); ++outer) {
    if (item == end || item->key != key || item->value != value) return false;
    ++item;
    if (state_item_sizes_[outer] != (PyDict_Check(value) ? PyDict_GET_SIZE(value) : -1)) return false;
    if (PyDict_Check(value))
      for (Py_ssize_t i = 0; PyDict_Next(value, &i, &inner_key, &inner_value); ++item)
        if (item->key != inner_key || item->value != inner_value) return false;
  }
  return item == end;
}

bool AdamWPlan::gather(const py::list& parameter_lists, const py::dict& state) {
  release();
  if (!state_known_) remember_state(state.ptr());
  if (!state_is_unchanged(state.ptr()) || !gather_from(parameter_lists)) {
    release();
    return false;
  }
  return true;
}

bool AdamWPlan::gather_from(const py::list& parameter_lists) {
  size_t position = 0;
  int32_t group_index = -1;
  for (const py::handle group : parameter_lists) {
    ++group_index;
    const py::object sequence = py::reinterpret_steal<py::object>(
        PySequence_Fast(group.ptr(), "param_groups: expected a list of parameters in each group"));
    if (!sequence) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr()); ++i, ++position) {
      PyObject* param = PySequence_Fast_GET_ITEM(sequence.ptr(), i);
      if (position >= slots_.size() || slots_[position].param != param || slots_[position].group != group_index)
        return false;
      Slot& slot = slots_[position];
      if (position + kAhead < slots_.size()) slots_[position + kAhead].prefetch();
      if (slot.kind == Kind::ignored) continue;
      py::object grad = grad_of(param);
      if (grad.is_none()) continue;
      if (slot.kind == Kind::dormant || !slot.stands()) return false;
      slot.grad = std::move(grad);
      slot.active = true;
      hold(slot);
      if (slot.wrapped || !accept_grad(slot)) unread_.push_back(position);
    }
  }
  return position == slots_.size();
}

py::list AdamWPlan::unread() const {
  py::list positions;
  for (const size_t position : unread_) positions.append(position);
  return positions;
}

void AdamWPlan::hold(Slot& slot) {
  slot.held[Field::stepped] = py::reinterpret_borrow<py::object>(slot.param);
  for (size_t i = Field::stepped + 1; i < slot.held.size(); ++i)
    if (slot.tensors[i]) slot.held[i] = slot.tensors[i].keep();
}

// Takes the slot's gradient as it is, if it is a plain tensor that lies like the parameter.
bool AdamWPlan::accept_grad(Slot& slot) {
  const TensorView& p = slot[Field::stepped].view();
  void* data = nullptr;
  if (p.numel > 1 && slot[Field::stepped].is_like(slot.grad.ptr(), &data)) {
    slot.entry.grad = data;
    slot.entry.grad_dtype = p.dtype;
    return true;
  }
  dlpack::Tensor t;
  if (!read_dlpack(slot.grad.ptr(), &t)) return false;
  if (device_of(t.device) != p.device || t.ndim != static_cast<int32_t>(p.shape.size())) return false;
  for (int32_t d = 0; d < t.ndim; ++d)
    if (t.shape[d] != p.shape[d] || (t.shape[d] != 1 && p.numel > 0 && t.strides[d] != p.strides[d])) return false;
  const DType dtype = dtype_of(t.dtype);
  // The kernels widen gradients to float; only float64 parameters are computed in double.
  if (!is_floating(dtype) || (dtype == DType::f64 && p.dtype != DType::f64)) return false;
  if (t.data == nullptr && p.numel > 0) return false;
  // A lazily negated view shows in its strides, except where no stride counts.
  if (p.numel == 1 && slot.grad.attr("is_neg")().cast<bool>()) return false;
  slot.entry.grad = static_cast<const char*>(t.data) + t.byte_offset;
  slot.entry.grad_dtype = dtype;
  return true;
}

void AdamWPlan::set_grad(int64_t position, py::object grad) {
  check(position >= 0 && position < static_cast<int64_t>(slots_.size()) && slots_[position].kind == Kind::live,
        "set_grad: no parameter at position ", position);
  Slot& slot = slots_[position];
  slot.grad = std::move(grad);
  slot.active = true;
  hold(slot);
  const TensorView& p = slot[Field::stepped].view();
  if (!accept_grad(slot))
    throw ArgumentError(text(slot.name, ": grad: expected a plain tensor of shape ", p.shape_str(), " on ",
                             p.device.str(), " in the parameter's memory order, got ",
                             py::str(py::type::of(slot.grad)).cast<std::string>(), " of shape ",
                             py::str(slot.grad.attr("shape")).cast<std::string>()));
}

py::object AdamWPlan::stepped(int64_t position) const {
  const Slot& slot = slots_.at(position);
  return slot.wrapped ? slot[Field::stepped].keep() : py::none();
}

py::list AdamWPlan::written() const {
  py::list out;
  for (const Slot& slot : slots_) {
    if (!slot.active || !slot.counts_versions) continue;
    out.append(py::handle(slot.param));
    if (slot.wrapped) out.append(slot[Field::stepped].keep());
  }
  return out;
}

void AdamWPlan::release() {
  unread_.clear();
  for (Slot& slot : slots_) {
    if (!slot.active) continue;
    slot.active = false;
    slot.grad = py::object();
    for (py::object& object : slot.held) object = py::object();
  }
}

py::list AdamWPlan::devices() const {
  std::vector<Device> found;
  for (const Slot& slot : slots_)
    if (slot.active && std::find(found.begin(), found.end(), slot[Field::stepped].view().device) == found.end())
      found.push_back(slot[Field::stepped].view().device);
  py::list out;
  for (Device d : found) out.append(py::make_tuple(static_cast<int32_t>(d.type), d.index));
  return out;
}

// This step's entries on a device. With groups, also the bias corrections of the step being taken.
std::vector<AdamWEntry> AdamWPlan::active_entries(Device device, const std::vector<AdamWGroup>* groups) {
  struct Last {
    double t = -1.0, bias1 = 0.0, bias2 = 0.0;
  };
  std::vector<Last> last(groups ? groups->size() : 0);  // most tensors of a group have the same step count
  std::vector<AdamWEntry> entries;
  entries.reserve(slots_.size());
  for (Slot& slot : slots_) {
    if (!slot.active || slot[Field::stepped].view().device != device) continue;
    AdamWEntry& e = slot.entry;
    if (groups && e.device_step == nullptr) {
      const double t = read_scalar(slot[Field::step].view()) + 1.0;
      Last& known = last[e.group];
      if (known.t != t) {
        const AdamWOptions& o = (*groups)[e.group].options;
        known = {t, adamw_bias(o.beta1, t), adamw_bias(o.beta2, t)};
      }
      e.t = t;
      e.bias1 = known.bias1;
      e.bias2 = known.bias2;
    }
    entries.push_back(e);
  }
  return entries;
}

void AdamWPlan::count_steps(Device device) {
  for (Slot& slot : slots_) {
    if (!slot.active || slot[Field::stepped].view().device != device || slot.entry.device_step) continue;
    const TensorView& step = slot[Field::step].view();
    if (step.dtype == DType::f64)
      *static_cast<double*>(step.data) += 1.0;
    else
      *static_cast<float*>(step.data) += 1.0f;
  }
}

#if FASTFT_WITH_CUDA
cuda::AdamWTable& AdamWPlan::table(Device device, const py::object& workspace) {
  const TensorView memory = read_tensor(workspace, "workspace");
  std::unique_ptr<Table>& known = tables_[{device.type, device.index}];
  if (!known || known->workspace != memory.data)
    known.reset(new Table{memory.data, cuda::AdamWTable(device.index, memory.data, memory.numel)});
  return known->table;
}
#endif

int64_t AdamWPlan::workspace_bytes([[maybe_unused]] const py::tuple& device) const {
#if FASTFT_WITH_CUDA
  const Device d = parse_device(device);
  if (!is_kernel_device(d)) return 0;
  std::vector<AdamWEntry> entries;
  for (const Slot& slot : slots_)
    if (slot.kind == Kind::live && slot[Field::stepped].view().device == d) entries.push_back(slot.entry);
  return cuda::AdamWTable::workspace_bytes(entries);
#else
  return 0;
#endif
}

int64_t AdamWPlan::launches([[maybe_unused]] const py::tuple& device) const {
#if FASTFT_WITH_CUDA
  const Device d = parse_device(device);
  const auto found = tables_.find({d.type, d.index});
  if (found != tables_.end()) return found->second->table.launches();
#endif
  return 0;
}

void AdamWPlan::sum_of_squares(const py::tuple& device, const py::object& out, const py::object& workspace) {
  const Device d = parse_device(device);
  double* result = scalar_data<double>(out, DType::f64, d, "out");
  const std::vector<AdamWEntry> entries = active_entries(d, nullptr);
#if FASTFT_WITH_CUDA
  if (is_kernel_device(d)) {
    cuda::AdamWTable& t = table(d, workspace);
    void* stream = current_stream(d);
    const py::gil_scoped_release unlocked;
    t.set_entries(entries, stream);
    t.sum_of_squares(result, stream);
    return;
  }
#endif
  static_cast<void>(workspace);
  const py::gil_scoped_release unlocked;
  *result = cpu::sum_of_squares(entries);
}

void AdamWPlan::step(const py::tuple& device, const py::list& groups, const py::list& lrs,
                     const py::object& sum_of_squares, double max_grad_norm, bool skip_nonfinite,
                     const py::object& grad_scale, const py::object& found_inf, const py::object& skipped_steps,
                     const py::object& workspace) {
  const Device d = parse_device(device);
  check(groups.size() == lrs.size(), "lrs: expected one for each of ", groups.size(), " groups, got ", lrs.size());
  std::vector<AdamWGroup> options;
  options.reserve(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) options.push_back(read_group(groups[i], lrs[i], d));
  const AdamWControl control = {
      scalar_data<const double>(sum_of_squares, DType::f64, d, "sum_of_squares"),
      scalar_data<const float>(grad_scale, DType::f32, d, "grad_scale"),
      scalar_data<const float>(found_inf, DType::f32, d, "found_inf"),
      scalar_data<int64_t>(skipped_steps, DType::int64, d, "skipped_steps"),
      max_grad_norm,
      skip_nonfinite,
  };
  const std::vector<AdamWEntry> entries = active_entries(d, &options);
  bool skipped = false;
#if FASTFT_WITH_CUDA
  if (is_kernel_device(d)) {
    cuda::AdamWTable& t = table(d, workspace);
    void* stream = current_stream(d);
    const py::gil_scoped_release unlocked;
    t.set_entries(entries, stream);
    t.adamw(options, control, stream);
  } else
#endif
  {
    static_cast<void>(workspace);
    const py::gil_scoped_release unlocked;
    skipped = cpu::adamw(entries, options, control);
  }
  if (!skipped) count_steps(d);
}

py::list overlapping(const py::list& tensors) {
  struct Interval {
    uintptr_t begin, end;
    size_t position;
  };
  std::vector<Interval> intervals;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView t = read_tensor(tensors[i], "tensors");
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data);
    if (t.numel > 0) intervals.push_back({begin, begin + t.numel * item_size(t.dtype), i});
  }
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  std::vector<bool> hit(tensors.size(), false);
  size_t furthest = 0;  // of the intervals so far, the one that ends last
  for (size_t i = 1; i < intervals.size(); ++i) {
    if (intervals[i].begin < intervals[furthest].end)
      hit[intervals[i].position] = hit[intervals[furthest].position] = true;
    if (intervals[i].end > intervals[furthest].end) furthest = i;
  }
  py::list out;
  for (size_t i = 0; i < hit.size(); ++i)
    if (hit[i]) out.append(i);
  return out;
}

}  // namespace fastft
