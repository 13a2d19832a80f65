// A step's tensors, checked once and then only watched. Python makes a plan when parameters, state, masks or anchors
// change; each step asks it whether it still holds, gathers the gradients and runs.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "adamw.h"
#include "adamw_record.h"
#include "torch_access.h"
#if FASTFT_WITH_CUDA
#include "cuda/adamw.h"
#endif

namespace fastft {

class AdamWPlan {
 public:
  // One AdamWRecord for each parameter, in the order of the groups. Throws ArgumentError. The plan keeps neither
  // parameters nor their state alive (a tensor that a user takes out of a group or of the state is gone at once), only
  // local parts, anchors, importances, masks and rows.
  explicit AdamWPlan(const py::list& records);

  // Whether the plan still describes `parameter_lists` (one sequence a group) and `state`; if so, their gradients are
  // read, but for those at unread().
  bool gather(const py::list& parameter_lists, const py::dict& state);
  // Positions whose gradient cannot be read as it is (not plain, or laid out differently): to be given to set_grad.
  py::list unread() const;
  // The local part that is stepped for the parameter at a position; None if that is the parameter itself.
  py::object stepped(int64_t position) const;
  void set_grad(int64_t position, py::object grad);
  // The tensors that this step writes and autograd may have saved: parameters and local parts, save inference tensors.
  py::list written() const;
  // Lets go of the gradients.
  void release();

  // Where this step's parameters lie: a list of (device type, index).
  py::list devices() const;

  // Writes Σ grad² over the live elements on a device into a float64 tensor there.
  void sum_of_squares(const py::tuple& device, const py::object& out, const py::object& workspace);

  // Steps the parameters of a device. groups: the optimizer's param_groups, of which betas, eps, weight_decay,
  // anchor_decay, amsgrad and maximize are read; lrs: a float, or a tensor on the device, for each of them.
  void step(const py::tuple& device, const py::list& groups, const py::list& lrs, const py::object& sum_of_squares,
            double max_grad_norm, bool skip_nonfinite, const py::object& grad_scale, const py::object& found_inf,
            const py::object& skipped_steps, const py::object& workspace);

  // Bytes of zeroed memory to pass as `workspace`; 0 for the CPU.
  int64_t workspace_bytes(const py::tuple& device) const;

  // Kernels launched so far; 0 for the CPU.
  int64_t launches(const py::tuple& device) const;

 private:
  enum class Kind { ignored, dormant, live };

  struct Slot {
    Kind kind = Kind::ignored;
    PyObject* param = nullptr;  // as it stands in the group; only its address counts until it is found there again
    int32_t group = 0;
    bool wrapped = false;  // stepped is not param itself
    bool counts_versions = true;
    std::string name;
    std::array<TensorRef, Field::count_> tensors;
    AdamWEntry entry = {};
    // This step:
    py::object grad;
    std::array<py::object, kept_by_state()> held;  // the borrowed ones: others may let go of them
    bool active = false;

    const TensorRef& operator[](size_t field) const { return tensors[field]; }

    // Whether all tensors lie where they lay when the plan was made.
    bool stands() const {
      if (!tensors[Field::stepped].same_view()) return false;
      for (size_t i = Field::stepped + 1; i < Field::count_; ++i)
        if (tensors[i] && !tensors[i].same_data()) return false;
      return true;
    }

    void prefetch() const {
      if (kind != Kind::live) return;
      for (const size_t i : {Field::stepped, Field::exp_avg, Field::exp_avg_sq, Field::step}) tensors[i].prefetch();
    }
  };

  // An item of a dict when the plan was made: addresses, to be compared with those it has now.
  struct Snapshot {
    PyObject *key, *value;
  };

  bool state_is_unchanged(PyObject* state) const;
  void remember_state(PyObject* state);
  void fill(Slot& slot, const AdamWRecord& record);
  static void check_tensor(const Slot& slot, size_t i, bool counts_on_device);
  static void check_low_precision(const Slot& slot, const AdamWRecord& record);
  bool gather_from(const py::list& parameter_lists);
  void hold(Slot& slot);
  bool accept_grad(Slot& slot);
  std::vector<AdamWEntry> active_entries(Device device, const std::vector<AdamWGroup>* groups);
  void count_steps(Device device);

  std::vector<Slot> slots_;
  std::vector<size_t> unread_;
  bool state_known_ = false;
  std::vector<Snapshot> state_items_;  // of `state` and, behind each item, of the parameter's own dict
  std::vector<Py_ssize_t> state_item_sizes_;
#if FASTFT_WITH_CUDA
  struct Table {
    void* workspace;
    cuda::AdamWTable table;
  };
  cuda::AdamWTable& table(Device device, const py::object& workspace);
  std::map<std::pair<int32_t, int32_t>, std::unique_ptr<Table>> tables_;
#endif
};

// Positions of tensors that overlap another one of the list in memory.
py::list overlapping(const py::list& tensors);

}  // namespace fastft
