// A parameter as Python describes it to a plan. Its tensors are listed here and nowhere else: the module exports their
// names, and the plan checks, watches and keeps them by these rules. A new state is one more line.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "math/adamw.h"
#include "math/stochastic.h"
#include "tensor.h"

namespace fastft {

namespace py = pybind11;

// Which dtypes a tensor of a record may have.
enum class Dtypes : uint8_t {
  floating,    // float32, bfloat16, float16, float64
  moment,      // the parameter's; float32 with a 16-bit one; bfloat16 but with float64; uint8, codes, where scales are
  as_exp_avg,  // exp_avg's
  readable,    // floating; float64 with a float64 parameter only
  boolean,
  indices,   // int64
  count,     // float32, or float64 on the CPU
  low_bits,  // uint16 or uint8, with a bfloat16 parameter
  scales,    // float32, one for each block of each row
  sums,      // int32, at least one for each unit
};

// Who keeps a tensor alive: the plan; or the optimizer's state, from which a user may take it at any time. (What a
// wrapper such as DTensor holds inside is kept by the plan all the same.)
enum class Keeper : uint8_t { plan, state };

// name, needed to step, like the parameter (in shape, memory order and device), dtypes, keeper
#define FASTFT_RECORD_TENSORS(X)                                    \
  X(stepped, true, true, Dtypes::floating, Keeper::state)           \
  X(exp_avg, true, true, Dtypes::moment, Keeper::state)             \
  X(exp_avg_sq, true, true, Dtypes::as_exp_avg, Keeper::state)      \
  X(max_exp_avg_sq, false, true, Dtypes::as_exp_avg, Keeper::state) \
  X(step, true, false, Dtypes::count, Keeper::state)                \
  X(low_bits, false, true, Dtypes::low_bits, Keeper::state)         \
  X(exp_avg_scales, false, false, Dtypes::scales, Keeper::state)    \
  X(exp_avg_sq_scales, false, false, Dtypes::scales, Keeper::state) \
  X(anchor, false, true, Dtypes::readable, Keeper::plan)            \
  X(importance, false, true, Dtypes::readable, Keeper::plan)        \
  X(update_mask, false, true, Dtypes::boolean, Keeper::plan)        \
  X(rows, false, false, Dtypes::indices, Keeper::plan)              \
  X(weight_sums, false, false, Dtypes::sums, Keeper::plan)

struct RecordTensor {
  const char* name;
  bool needed, like_param;
  Dtypes dtypes;
  Keeper keeper;
};

#define FASTFT_ROW(name, needed, like_param, dtypes, keeper) {#name, needed, like_param, dtypes, keeper},
constexpr RecordTensor kRecordTensors[] = {FASTFT_RECORD_TENSORS(FASTFT_ROW)};
#undef FASTFT_ROW

// The place of each in kRecordTensors: Field::stepped, Field::exp_avg, ...
namespace Field {
#define FASTFT_PLACE(name, ...) name,
enum : size_t { FASTFT_RECORD_TENSORS(FASTFT_PLACE) count_ };
#undef FASTFT_PLACE
}  // namespace Field

// How many of them the optimizer's state keeps: these come first.
constexpr size_t kept_by_state() {
  size_t count = 0;
  while (count < Field::count_ && kRecordTensors[count].keeper == Keeper::state) ++count;
  return count;
}
static_assert(kRecordTensors[Field::count_ - 1].keeper == Keeper::plan && kept_by_state() == Field::anchor,
              "tensors that the state keeps come before those that the plan keeps");

// One parameter of the optimizer, in the order of its groups.
struct AdamWRecord {
  py::object param;  // as it stands in the group
  int32_t group = 0;
  bool dormant = false;   // not stepped, and without state: its first gradient makes the plan stale
  std::string name = {};  // for messages
  Anchoring anchoring = Anchoring::none;
  bool counts_on_device = false;                       // a kernel counts the steps
  std::optional<uint64_t> rounding_key = {};           // of stochastic rounding; to nearest without
  ElementIndex index = {0, 0, 0};                      // where its elements lie in the whole tensor; row 0: it is whole
  std::array<py::object, Field::count_> tensors = {};  // None where there is none; all None: not stepped

  bool steps() const { return !tensors[Field::stepped].is_none(); }
  // With these tensors, by their names, in place of its own. Throws TypeError for an unknown name.
  AdamWRecord replaced(const py::kwargs& others) const;
  // The same parameter, not stepped: its gradient, if it has one, is passed over.
  AdamWRecord unstepped() const;
};

// Adds AdamWRecord and Anchoring to the module.
void bind_record(py::module_& module);

}  // namespace fastft
