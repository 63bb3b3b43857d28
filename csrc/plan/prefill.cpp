#include "plan/prefill.h"

#include <algorithm>
#include <array>
#include <cstdlib>

namespace marlin::plan {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define MARLIN_SM90_PREFILL(tokens, row_blocks, stage_blocks, reason) \
  PrefillKernel{0, PrefillTile{tokens, row_blocks, stage_blocks}, reason},

auto numbered_table() {
  auto table = std::to_array<PrefillKernel>({
#include "plan/prefill_table.inc"
  });
  for (size_t i = 0; i < table.size(); ++i) table[i].id = static_cast<int>(i);
  return table;
}

#undef MARLIN_SM90_PREFILL

// Of the tiles done at once, about as many share a tile of tokens as share a tile of weights, counted in
// bytes.
constexpr int kTokenGroup = 8;

constexpr int kClusters[] = {1, 2, 4, 8};

// How many clusters run at once with one block per multiprocessor. A cluster lies in one GPC; an H200
// has 132 multiprocessors in GPCs of 16 and 18, and cudaOccupancyMaxActiveClusters says 66 clusters of
// 2, 30 of 4 and 15 of 8.
int clusters_at_once(int cluster, int sm_count) {
  return (cluster <= 2 ? sm_count : sm_count * 10 / 11) / cluster;
}

// A model of a plan's time, to compare plans of one problem: microseconds on an H200.
double estimated_us(const PrefillPlan& plan) {
  const PrefillTile& tile = plan.kernel.tile;
  const double piece = 0.178 * tile.stage_blocks * tile.tokens / 128 * plan.stages_per_block;
  const int64_t tiles = ceil_div(plan.pieces_per_cluster, tile.row_blocks);
  const double finish = plan.cluster == 1 ? 0.5 : 1.5 + 0.1 * plan.cluster;
  return static_cast<double>(plan.pieces_per_cluster) * piece +
         static_cast<double>(tiles) * finish;
}

}  // namespace

std::span<const PrefillKernel> prefill_kernels() {
  static const auto table = numbered_table();
  return table;
}

std::string PrefillKernel::name() const {
  return "sm90_prefill_t" + std::to_string(tile.tokens) + "_r" + std::to_string(tile.rows()) +
         "_k" + std::to_string(tile.stage_k());
}

PrefillPlan prefill_plan_with(const PrefillKernel& kernel, int cluster, const Problem& problem) {
  PrefillPlan plan{};
  plan.kernel = kernel;
  plan.period = problem.group_size < 128 && problem.group_size < problem.k
                    ? static_cast<int>(problem.group_size)
                    : 128;
  plan.row_blocks = static_cast<int>(ceil_div(problem.n, 64));
  plan.token_tiles = static_cast<int>(ceil_div(problem.m, kernel.tile.tokens));
  const int64_t stages = ceil_div(problem.k, kernel.tile.stage_k());
  plan.cluster = cluster;
  // Every block of a cluster must have a stage.
  while (plan.cluster > 1 && (plan.cluster - 1) * ceil_div(stages, plan.cluster) >= stages) {
    plan.cluster /= 2;
  }
  plan.stages_per_block = static_cast<int>(ceil_div(stages, plan.cluster));
  const int64_t pieces = int64_t{plan.row_blocks} * plan.token_tiles;
  const int64_t clusters = std::max(clusters_at_once(plan.cluster, problem.device.sm_count), 1);
  const int64_t each = ceil_div(pieces, clusters), rows = kernel.tile.row_blocks;
  plan.row_tiles = static_cast<int>(ceil_div(plan.row_blocks, rows));
  if (each > (getenv("MARLIN_TH") ? atoi(getenv("MARLIN_TH")) : 4) * rows) {
    const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles;
    plan.token_group = getenv("MARLIN_TG") ? atoi(getenv("MARLIN_TG")) : kTokenGroup;
    plan.pieces_per_cluster = static_cast<int>(ceil_div(tiles, clusters) * rows);
    plan.blocks = static_cast<int>(std::min(tiles, clusters)) * plan.cluster;
  } else {
    plan.pieces_per_cluster = static_cast<int>(each);
    plan.blocks = static_cast<int>(ceil_div(pieces, each)) * plan.cluster;
  }
  return plan;
}

std::optional<PrefillPlan> select_prefill(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  const auto kernels = prefill_kernels();
  const int64_t tiles = ceil_div(problem.m, kernels.back().tile.tokens);
  const auto kernel = std::ranges::find_if(
      kernels, [&](const PrefillKernel& k) { return k.tile.tokens * tiles >= problem.m; });
  std::optional<PrefillPlan> best;
  for (const int cluster : kClusters) {
    const PrefillPlan plan = prefill_plan_with(*kernel, cluster, problem);
    if (!best || estimated_us(plan) < estimated_us(*best)) best = plan;
  }
  return best;
}

}  // namespace marlin::plan
