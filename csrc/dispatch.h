// The kernels that this processor can run.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace gk {

struct InstructionSet {
  std::string name;
  bool usable;
};

// Slowest first.
std::vector<InstructionSet> instruction_sets();

// The kernels of that name, or the fastest usable ones for "". Throws std::invalid_argument otherwise.
const Kernels& kernels_named(const std::string& name);

}  // namespace gk
