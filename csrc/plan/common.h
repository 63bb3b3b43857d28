// What the planners share: host C++, not for users of the plans.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/plan.h"

namespace marlin::plan {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns between scales, as the Hopper kernels are compiled: 32, 64, or 128 for all longer groups.
inline int scale_period(const Problem& problem) {
  return problem.group_size < 128 && problem.group_size < problem.k
             ? static_cast<int>(problem.group_size)
             : 128;
}

// A table with every kernel's place in it, for one kind of weight.
auto numbered(auto table, bool sparse) {
  for (size_t i = 0; i < table.size(); ++i) {
    table[i].id = static_cast<int>(i);
    table[i].tile.sparse = sparse;
  }
  return table;
}

}  // namespace marlin::plan
