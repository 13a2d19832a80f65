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

void check_device(const TensorRef& t, Device device, const std::string& argument) {
  check(t.view().device == device, argument, ": expected a tensor on ", device.str(), ", got one on ",
        t.view().device.str());
}

// One scalar in float32 or float64.
double read_scalar(const TensorView& view) {
  return view.dtype == DType::f64 ? *static_cast<const double*>(view.data) : *static_cast<const float*>(view.data);
}

const void* data_or_null(const TensorRef& t) {
  return t ? t.view().data : nullptr;
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

AdamWPlan::AdamWPlan(const py::list& entries) : slots_(entries.size()) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const py::tuple t = entries[i];
    Slot& slot = slots_[i];
    slot.param = py::object(t[0]).ptr();
    slot.group = t[1].cast<int32_t>();
    if (t.size() > 3)
      fill(slot, t);
    else if (t[2].cast<bool>())
      slot.kind = Kind::dormant;
  }
}

void AdamWPlan::fill(Slot& slot, const py::tuple& t) {
  slot.kind = Kind::live;
  slot.name = t[2].cast<std::string>();
  const std::string& who = slot.name;
  const auto optional = [&](size_t i, const char* what, TensorRef::Hold hold) {
    return t[i].is_none() ? TensorRef() : TensorRef(t[i], who + ": " + what, hold);
  };
  slot.wrapped = !t[3].is(t[0]);
  slot.counts_versions = !t[3].attr("is_inference")().cast<bool>();
  // The parameter holds its own data, and the state dict holds the moments; but not their local parts.
  const TensorRef::Hold hold = slot.wrapped ? TensorRef::kOwned : TensorRef::kWeak;
  slot.stepped = TensorRef(t[3], who, slot.wrapped ? TensorRef::kOwned : TensorRef::kBorrowed);
  slot.exp_avg = TensorRef(t[4], who + ": exp_avg", hold);
  slot.exp_avg_sq = TensorRef(t[5], who + ": exp_avg_sq", hold);
  slot.max_exp_avg_sq = optional(6, "max_exp_avg_sq", hold);
  slot.step = TensorRef(t[7], who + ": step", TensorRef::kWeak);
  slot.anchor = optional(8, "anchor", TensorRef::kOwned);
  slot.importance = optional(9, "importance", TensorRef::kOwned);
  slot.mask = optional(10, "update_mask", TensorRef::kOwned);
  slot.rows = optional(11, "rows", TensorRef::kOwned);

  const TensorView& p = slot.stepped.view();
  check(is_floating(p.dtype), who, ": expected a float32, bfloat16, float16 or float64 parameter, got ", name(p.dtype));
  check(p.dense(), who,
        ": expected a parameter whose elements each have a place of their own, without gaps; got shape ",
        p.shape_str());
  check_kernel_device(p.device, who);

  const DType state = slot.exp_avg.view().dtype;
  const bool sixteen_bit = item_size(p.dtype) == 2;
  check(state == p.dtype || (sixteen_bit && state == DType::f32), who, ": exp_avg: expected ", name(p.dtype),
        sixteen_bit ? " or float32" : "", ", got ", name(state));
  const auto check_like_param = [&](const TensorRef& ref, const char* what) {
    if (!ref) return;
    check(ref.view().same_layout(p), who, ": ", what, ": expected the parameter's shape ", p.shape_str(),
          " in the parameter's memory order, got shape ", ref.view().shape_str());
    check_device(ref, p.device, who + ": " + what);
  };
  check_like_param(slot.exp_avg, "exp_avg");
  check_like_param(slot.exp_avg_sq, "exp_avg_sq");
  check_like_param(slot.max_exp_avg_sq, "max_exp_avg_sq");
  check_like_param(slot.anchor, "anchor");
  check_like_param(slot.importance, "importance");
  check_like_param(slot.mask, "update_mask");
  for (const TensorRef* ref : {&slot.exp_avg_sq, &slot.max_exp_avg_sq})
    check(!*ref || ref->view().dtype == state, who, ": exp_avg_sq and max_exp_avg_sq: expected exp_avg's dtype ",
          name(state), ", got ", *ref ? name(ref->view().dtype) : "");
  const auto check_narrow = [&](const TensorRef& ref, const char* what) {
    if (!ref) return;
    const DType t = ref.view().dtype;
    check(is_floating(t) && (t != DType::f64 || p.dtype == DType::f64), who, ": ", what,
          ": expected float32, bfloat16 or float16 (float64 with a float64 parameter), got ", name(t));
  };
  check_narrow(slot.anchor, "anchor");
  check_narrow(slot.importance, "importance");
  check(!slot.importance || slot.anchor, who, ": importance: expected None without an anchor");
  check(!slot.mask || slot.mask.view().dtype == DType::boolean, who, ": update_mask: expected bool, got ",
        slot.mask ? name(slot.mask.view().dtype) : "");
  if (slot.rows) {
    const TensorView& rows = slot.rows.view();
    check(rows.dtype == DType::int64 && rows.shape.size() == 1 && p.rows_contiguous() && rows.device == p.device, who,
          ": rows: expected ascending int64 indices into rows that lie in one piece");
  }
  const TensorView& step = slot.step.view();
  const bool counts_on_device = t[12].cast<bool>();
  check(step.numel == 1 && (step.dtype == DType::f32 || step.dtype == DType::f64), who,
        ": step: expected one float32 or float64, got ", step.numel, " ", name(step.dtype));
  check(counts_on_device ? step.device == p.device && step.dtype == DType::f32 : step.device.type == dlpack::kCPU, who,
        ": step: expected ", counts_on_device ? "a float32 on " + p.device.str() : "a tensor on cpu", ", got ",
        name(step.dtype), " on ", step.device.str());

  AdamWEntry& e = slot.entry;
  e.param = p.data;
  e.exp_avg = slot.exp_avg.view().data;
  e.exp_avg_sq = slot.exp_avg_sq.view().data;
  e.max_exp_avg_sq = const_cast<void*>(data_or_null(slot.max_exp_avg_sq));
  e.anchor = data_or_null(slot.anchor);
  e.importance = data_or_null(slot.importance);
  e.mask = static_cast<const uint8_t*>(data_or_null(slot.mask));
  e.rows = static_cast<const int64_t*>(data_or_null(slot.rows));
  e.numel = p.numel;
  e.row_size = !p.shape.empty() && p.shape[0] > 0 ? p.numel / p.shape[0] : 0;
  e.live_rows = slot.rows ? slot.rows.view().numel : 0;
  static const int64_t no_row = 0;  // a list of no rows may have no data: still not "all rows"
  if (slot.rows && e.rows == nullptr) e.rows = &no_row;
  e.device_step = counts_on_device ? static_cast<float*>(step.data) : nullptr;
  e.group = slot.group;
  e.dtype = p.dtype;
  e.state_dtype = state;
  e.anchor_dtype = slot.anchor ? slot.anchor.view().dtype : DType::f32;
  e.importance_dtype = slot.importance ? slot.importance.view().dtype : DType::f32;
  const bool selective = t[13].cast<bool>();
  check(!selective || (slot.anchor && !slot.importance), who,
        ": selective: expected False without an anchor and with an importance");
  e.anchoring = selective         ? Anchoring::selective
                : slot.importance ? Anchoring::weighted
                : slot.anchor     ? Anchoring::plain
                                  : Anchoring::none;
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

py::object AdamWPlan::gather(const py::list& parameter_lists, const py::dict& state) {
  release();
  const py::object stale = py::bool_(false);
  if (!state_known_) remember_state(state.ptr());
  if (!state_is_unchanged(state.ptr())) return stale;
  py::list need_help;
  size_t position = 0;
  int32_t group_index = -1;
  for (const py::handle group : parameter_lists) {
    ++group_index;
    const py::object sequence = py::reinterpret_steal<py::object>(
        PySequence_Fast(group.ptr(), "param_groups: expected a list of parameters in each group"));
    if (!sequence) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr()); ++i, ++position) {
      PyObject* param = PySequence_Fast_GET_ITEM(sequence.ptr(), i);
      if (position >= slots_.size() || slots_[position].param != param || slots_[position].group != group_index) {
        release();
        return stale;
      }
      Slot& slot = slots_[position];
      if (position + kAhead < slots_.size()) slots_[position + kAhead].prefetch();
      if (slot.kind == Kind::ignored) continue;
      py::object grad = grad_of(param);
      if (grad.is_none()) continue;
      if (slot.kind == Kind::dormant || !slot.stepped.same_view() || !slot.exp_avg.same_data() ||
          !slot.exp_avg_sq.same_data() || !slot.step.same_data() ||
          (slot.max_exp_avg_sq && !slot.max_exp_avg_sq.same_data()) || (slot.anchor && !slot.anchor.same_data()) ||
          (slot.importance && !slot.importance.same_data())) {
        release();
        return stale;
      }
      slot.grad = std::move(grad);
      slot.active = true;
      hold(slot);
      if (slot.wrapped || !accept_grad(slot)) need_help.append(position);
    }
  }
  if (position != slots_.size()) {
    release();
    return stale;
  }
  return need_help;
}

void AdamWPlan::hold(Slot& slot) {
  slot.held[0] = py::reinterpret_borrow<py::object>(slot.param);
  slot.held[1] = slot.exp_avg.keep();
  slot.held[2] = slot.exp_avg_sq.keep();
  slot.held[3] = slot.step.keep();
  if (slot.max_exp_avg_sq) slot.held[4] = slot.max_exp_avg_sq.keep();
}

// Takes the slot's gradient as it is, if it is a plain tensor that lies like the parameter.
bool AdamWPlan::accept_grad(Slot& slot) {
  const TensorView& p = slot.stepped.view();
  void* data = nullptr;
  if (p.numel > 1 && slot.stepped.is_like(slot.grad.ptr(), &data)) {
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
  const TensorView& p = slot.stepped.view();
  if (!accept_grad(slot))
    throw ArgumentError(text(slot.name, ": grad: expected a plain tensor of shape ", p.shape_str(), " on ",
                             p.device.str(), " in the parameter's memory order, got ",
                             py::str(py::type::of(slot.grad)).cast<std::string>(), " of shape ",
                             py::str(slot.grad.attr("shape")).cast<std::string>()));
}

py::object AdamWPlan::stepped(int64_t position) const {
  const Slot& slot = slots_.at(position);
  return slot.wrapped ? slot.stepped.keep() : py::none();
}

py::list AdamWPlan::written() const {
  py::list out;
  for (const Slot& slot : slots_) {
    if (!slot.active || !slot.counts_versions) continue;
    out.append(py::handle(slot.param));
    if (slot.wrapped) out.append(slot.stepped.keep());
  }
  return out;
}

void AdamWPlan::release() {
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
    if (slot.active && std::find(found.begin(), found.end(), slot.stepped.view().device) == found.end())
      found.push_back(slot.stepped.view().device);
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
    if (!slot.active || slot.stepped.view().device != device) continue;
    AdamWEntry& e = slot.entry;
    if (groups && e.device_step == nullptr) {
      const double t = read_scalar(slot.step.view()) + 1.0;
      Last& known = last[e.group];
      if (known.t != t) {
        const AdamWOptions& o = (*groups)[e.group].options;
        known = {t, adamw_bias(o.beta1, t), adamw_bias(o.beta2, t)};
      }
      e.bias1 = known.bias1;
      e.bias2 = known.bias2;
    }
    entries.push_back(e);
  }
  return entries;
}

void AdamWPlan::count_steps(Device device) {
  for (Slot& slot : slots_) {
    if (!slot.active || slot.stepped.view().device != device || slot.entry.device_step) continue;
    const TensorView& step = slot.step.view();
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
    if (slot.kind == Kind::live && slot.stepped.view().device == d) entries.push_back(slot.entry);
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

void AdamWPlan::step(const py::tuple& device, const py::list& groups, const py::object& sum_of_squares,
                     double max_grad_norm, bool skip_nonfinite, const py::object& grad_scale,
                     const py::object& found_inf, const py::object& skipped_steps, const py::object& workspace) {
  const Device d = parse_device(device);
  std::vector<AdamWGroup> options;
  options.reserve(groups.size());
  for (const py::handle item : groups) {
    const py::tuple g = py::reinterpret_borrow<py::tuple>(item);
    AdamWGroup group = {};
    if (PyFloat_Check(py::object(g[0]).ptr())) {
      group.options.lr = g[0].cast<double>();
    } else {
      const TensorView lr = read_tensor(g[0], "lr");
      check(is_floating(lr.dtype) && lr.numel == 1 && lr.device == d, "lr: expected one floating-point number on ",
            d.str(), ", got ", lr.numel, " ", name(lr.dtype), " on ", lr.device.str());
      group.lr = lr.data;
      group.lr_dtype = lr.dtype;
    }
    group.options.beta1 = g[1].cast<double>();
    group.options.beta2 = g[2].cast<double>();
    group.options.eps = g[3].cast<double>();
    group.options.weight_decay = g[4].cast<double>();
    group.options.anchor_decay = g[5].cast<double>();
    group.options.l2_anchor = g[6].cast<bool>();
    group.options.amsgrad = g[7].cast<bool>();
    group.options.maximize = g[8].cast<bool>();
    options.push_back(group);
  }
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
