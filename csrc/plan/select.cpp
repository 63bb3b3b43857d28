#include <algorithm>
#include <array>
#include <stdexcept>

#include "plan/common.h"

namespace marlin::plan {
namespace {

Partition partition_of(const Tile& tile, const Problem& p) {
  Partition out{};
  out.row_tiles = static_cast<int>(ceil_div(p.n, tile.rows()));
  out.token_tiles = static_cast<int>(ceil_div(p.m, tile.tokens));
  out.units_per_tile = static_cast<int>(ceil_div(p.k, tile.stage_k()));
  // An equal share for every multiprocessor. At least two units each: a block that does one spends
  // longer filling its pipeline than working.
  out.units_per_block = std::max<int64_t>(ceil_div(out.units(), p.device.sm_count), 2);
  out.units_per_block = std::min(out.units_per_block, out.units());
  out.blocks = static_cast<int>(ceil_div(out.units(), out.units_per_block));
  return out;
}

}  // namespace

std::span<const Kernel> kernels() {
#define MARLIN_SM80_KERNEL(tokens, row_blocks, warps_k, k_blocks, stages, reason) \
  Kernel{0, "sm80", Tile{tokens, row_blocks, warps_k, k_blocks, stages}, reason},
  static const auto table = numbered(std::to_array<Kernel>({
#include "plan/kernel_table.inc"
                                     }),
                                     false);
#undef MARLIN_SM80_KERNEL
  return table;
}

std::span<const Kernel> sparse_kernels() {
#define MARLIN_SM80_KERNEL(tokens, row_blocks, warps_k, k_blocks, stages, reason) \
  Kernel{0, "sm80_24", Tile{tokens, row_blocks, warps_k, k_blocks, stages}, reason},
  static const auto table = numbered(std::to_array<Kernel>({
#include "plan/sparse_kernel_table.inc"
                                     }),
                                     true);
#undef MARLIN_SM80_KERNEL
  return table;
}

std::string Kernel::name() const {
  return std::string(family) + "_t" + std::to_string(tile.tokens) + "_r" +
         std::to_string(tile.rows()) + "_k" + std::to_string(tile.stage_k()) + "_s" +
         std::to_string(tile.stages);
}

int shared_bytes_of(int sm) {
  const int kb = sm == 80 || sm == 87 ? 163 : sm == 90 || sm / 10 == 10 || sm / 10 == 11 ? 227 : 99;
  return kb * 1024;
}

Plan plan_with(const Kernel& kernel, const Problem& problem) {
  Plan plan{kernel, partition_of(kernel.tile, problem), 0};
  if (plan.partition.splits_tiles()) {
    plan.workspace_bytes = int64_t{2} * plan.partition.blocks * kernel.tile.tokens *
                           kernel.tile.rows() * static_cast<int64_t>(sizeof(float));
  }
  return plan;
}

// The tables are in order of preference: the first kernel that fits the device and whose tile holds all
// tokens; where none holds them all, the first of the largest that fit.
Plan select(const Problem& problem) {
  const Kernel* best = nullptr;
  for (const Kernel& kernel : problem.sparse ? sparse_kernels() : kernels()) {
    if (kernel.tile.shared_bytes() > problem.device.shared_bytes) continue;
    const bool holds_all = kernel.tile.tokens >= problem.m;
    const bool first_of_its_size = !best || kernel.tile.tokens > best->tile.tokens;
    if (first_of_its_size) best = &kernel;
    if (holds_all) break;
  }
  if (problem.device.sm < 80) {
    throw std::runtime_error("marlin: no kernel for compute capability " +
                             std::to_string(problem.device.sm / 10) + "." +
                             std::to_string(problem.device.sm % 10) + "; 8.0 or later is needed");
  }
  if (!best) {
    throw std::runtime_error("marlin: no kernel fits a device that gives a block " +
                             std::to_string(problem.device.shared_bytes) +
                             " bytes of shared memory");
  }
  return plan_with(*best, problem);
}

}  // namespace marlin::plan
