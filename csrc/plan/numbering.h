// The numbers of all compiled kernels: table after table, those for 2:4 sparse weights last, so that the
// numbers of the others do not depend on them.
#pragma once

#include <type_traits>

#include "plan/decode.h"
#include "plan/plan.h"
#include "plan/prefill.h"

namespace marlin::plan {

// Calls `visit` with every table, a span of kernels of one family.
template <typename Visit>
void for_each_table(Visit&& visit) {
  for (const bool sparse : {false, true}) {
    visit(sparse ? sparse_kernels() : kernels());
    visit(decode_kernels(sparse));
    visit(prefill_kernels(sparse));
  }
}

inline int kernel_count() {
  int count = 0;
  for_each_table([&](const auto& table) { count += static_cast<int>(table.size()); });
  return count;
}

template <typename Kernel>
int number_of(const Kernel& kernel) {
  int first = 0, number = -1;
  for_each_table([&](const auto& table) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(table[0])>, Kernel>) {
      if (table[0].tile.sparse == kernel.tile.sparse) number = first + kernel.id;
    }
    first += static_cast<int>(table.size());
  });
  return number;
}

}  // namespace marlin::plan
