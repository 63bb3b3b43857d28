// What the planners share: host C++, not for users of the plans.
#pragma once

#include <algorithm>
#include <cmath>
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

// How far the card's power limit holds its clock back: 0, or up to 1 as products go from 4 to 64 G
// multiplications. A multiplication then takes up to kPowerLimit longer. Fitted to an H200.
constexpr double kPowerLimit = 0.084;
inline double power_limit(const Problem& problem) {
  const double work = static_cast<double>(problem.m) * static_cast<double>(problem.n) *
                      static_cast<double>(problem.k);
  return std::clamp((std::log2(work) - 31.9) / 4, 0.0, 1.0);
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
