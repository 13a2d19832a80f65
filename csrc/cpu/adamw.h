// The CPU backend of the AdamW step.
#pragma once

#include <string>
#include <vector>

#include "../adamw.h"

namespace fastft::cpu {

// Σ grad² over the live elements of all entries. The same bits whatever the number of threads.
double sum_of_squares(const std::vector<AdamWEntry>& entries);

// The step; returns whether it was skipped.
bool adamw(const std::vector<AdamWEntry>& entries, const std::vector<AdamWGroup>& groups, const AdamWControl& control);

// Which instruction set the loops use on this machine.
std::string instruction_set();

}  // namespace fastft::cpu
