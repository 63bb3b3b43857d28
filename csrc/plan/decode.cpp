#include "plan/decode.h"

#include <algorithm>
#include <array>

namespace marlin::plan {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define MARLIN_SM90_DECODE(tokens, row_tiles, splits, stage_blocks, least_tiles, least_k, reason) \
  DecodeKernel{0, DecodeTile{tokens, row_tiles, splits, stage_blocks}, least_tiles, least_k,      \
               reason},

auto numbered_table() {
  auto table = std::to_array<DecodeKernel>({
#include "plan/decode_table.inc"
  });
  for (size_t i = 0; i < table.size(); ++i) table[i].id = static_cast<int>(i);
  return table;
}

#undef MARLIN_SM90_DECODE

// How many blocks should share a tile's k: two where that still leaves a multiprocessor to each and
// both have work for all splits. Not four: 12.3 us to 9.0 at 4096 x 4096, M = 32 (H200).
int cluster_for(const DecodeTile& tile, const Problem& problem) {
  const int64_t tiles = ceil_div(problem.n, tile.rows());
  const int64_t stages = ceil_div(problem.k, tile.stage_k());
  return problem.device.clusters_of(2) > 0 && tiles * 2 <= problem.device.sm_count &&
                 stages >= 2 * tile.splits
             ? 2
             : 1;
}

}  // namespace

std::span<const DecodeKernel> decode_kernels() {
  static const auto table = numbered_table();
  return table;
}

std::string DecodeKernel::name() const {
  return "sm90_decode_t" + std::to_string(tile.tokens) + "_r" + std::to_string(tile.rows()) + "_k" +
         std::to_string(tile.stage_k());
}

DecodePlan decode_plan_with(const DecodeKernel& kernel, int cluster, const Problem& problem) {
  DecodePlan plan{};
  plan.kernel = kernel;
  plan.period = problem.group_size < 128 && problem.group_size < problem.k
                    ? static_cast<int>(problem.group_size)
                    : 128;
  plan.row_tiles = static_cast<int>(ceil_div(problem.n, kernel.tile.rows()));
  plan.cluster = cluster;
  plan.stages_per_block =
      static_cast<int>(ceil_div(ceil_div(problem.k, kernel.tile.stage_k()), cluster));
  plan.blocks =
      cluster > 1 ? plan.row_tiles * cluster : std::min(plan.row_tiles, problem.device.sm_count);
  return plan;
}

std::optional<DecodePlan> select_decode(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  for (const DecodeKernel& kernel : decode_kernels()) {
    const bool enough_tiles = ceil_div(problem.n, kernel.tile.rows()) >= kernel.least_tiles;
    if (kernel.tile.tokens < problem.m || !enough_tiles || problem.k < kernel.least_k) continue;
    return decode_plan_with(kernel, cluster_for(kernel.tile, problem), problem);
  }
  return std::nullopt;
}

}  // namespace marlin::plan
