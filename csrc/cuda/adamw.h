// The CUDA backend of the AdamW step, as host code sees it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../adamw.h"

namespace fastft::cuda {

// Device memory that is kept between steps: the table of entries, the map from chunks to entries, tickets and
// partial sums. It is written only when something in it changed, so a step usually uploads nothing.
class AdamWTable {
 public:
  // Bytes of zeroed device memory that steps over any subset of these entries need.
  static int64_t workspace_bytes(const std::vector<AdamWEntry>& entries);

  AdamWTable(int32_t device, void* workspace, int64_t bytes) : device_(device), workspace_(workspace), bytes_(bytes) {}

  // Puts this step's entries in place. Gradients are not part of it: their addresses travel with each launch.
  void set_entries(const std::vector<AdamWEntry>& entries, void* stream);

  // *out = Σ grad² over the live elements, in double, always in the same order: one launch per 3,000 tensors.
  void sum_of_squares(double* out, void* stream);

  // The step: one launch per kernel that some tensor needs (and 3,000 tensors): the lean one for its dtypes, without or
  // with a mask of elements, or the generic one; with selectively anchored tensors, two of their own.
  void adamw(const std::vector<AdamWGroup>& groups, const AdamWControl& control, void* stream);

  // How many kernels this table has launched since it was made.
  int64_t launches() const { return launches_; }

 private:
  int32_t device_;
  void* workspace_;
  int64_t bytes_;
  int64_t launches_ = 0;
  std::vector<AdamWEntry> entries_;    // ordered by kernel
  std::vector<uint32_t> first_chunk_;  // one longer than entries_
  std::vector<char> image_;            // what the device holds
};

// Why CUDA cannot be used in this process, or "" when it can.
std::string unavailable_reason();

}  // namespace fastft::cuda
