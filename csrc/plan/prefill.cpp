#include "plan/prefill.h"

#include <algorithm>
#include <array>

#include "plan/common.h"

namespace marlin::plan {
namespace {

#define MARLIN_SM90_PREFILL(tokens, row_blocks, stage_blocks, reason) \
  PrefillKernel{0, PrefillTile{tokens, row_blocks, stage_blocks}, reason},

auto dense_table() {
  return std::to_array<PrefillKernel>({
#include "plan/prefill_table.inc"
  });
}

auto sparse_table() {
  return std::to_array<PrefillKernel>({
#include "plan/prefill_24_table.inc"
  });
}

#undef MARLIN_SM90_PREFILL

// Of the tiles done at once, this many share a tile of weights, and on an H200 about as many bytes of
// activations and weights are then in use. From 4 to 16 made no difference beyond the noise; without
// groups, 8192 tokens at 28672 x 4096 took 10% longer.
constexpr int kTokenGroup = 8;

// With so many tokens, pairs of blocks share activations: 720 us instead of 739 at 8192 x 8192, M = 4096
// (H200), 1332 instead of 1363 at 28672 x 4096, and 1976 instead of 2023 there, 2:4, M = 8192; with fewer, and
// with four blocks, it is no faster.
constexpr int64_t kTokensToShare = 4096;

// Whether a kernel is worth a look: of those whose tile takes at most 128 tokens, the one that leaves
// the least room in as few tiles as possible.
bool suits(const PrefillKernel& kernel, int64_t m) {
  if (kernel.tile.tokens > 128) return m > 128;
  const int64_t tiles = ceil_div(m, 128), share = ceil_div(m, tiles);
  return kernel.tile.tokens >= share && (kernel.tile.tokens - 16 < share || kernel.id == 0);
}

}  // namespace

std::span<const PrefillKernel> prefill_kernels(bool sparse) {
  static const auto dense = numbered(dense_table(), false);
  static const auto sparse_24 = numbered(sparse_table(), true);
  return sparse ? std::span<const PrefillKernel>(sparse_24) : dense;
}

std::string PrefillKernel::name() const {
  return (tile.sparse ? "sm90_prefill_24_t" : "sm90_prefill_t") + std::to_string(tile.tokens) +
         "_r" + std::to_string(tile.rows()) + "_k" + std::to_string(tile.stage_k());
}

PrefillPlan prefill_plan_with(const PrefillKernel& kernel, int cluster, int input_shares,
                              const Problem& problem) {
  PrefillPlan plan{};
  plan.kernel = kernel;
  plan.period = scale_period(problem);
  plan.row_blocks = static_cast<int>(ceil_div(problem.n, 64));
  plan.token_tiles = static_cast<int>(ceil_div(problem.m, kernel.tile.tokens));
  const int64_t stages = ceil_div(problem.k, kernel.tile.stage_k());
  // Each block must have rows, and copy whole swizzle patterns of 8 tokens.
  plan.input_shares = std::min(input_shares, plan.row_blocks);
  while (kernel.tile.tokens % (8 * plan.input_shares) != 0) --plan.input_shares;
  int64_t k_shares = std::max(cluster / plan.input_shares, 1);
  while (k_shares > 1 && (k_shares - 1) * ceil_div(stages, k_shares) >= stages) --k_shares;
  plan.cluster = static_cast<int>(k_shares) * plan.input_shares;
  plan.stages_per_block = static_cast<int>(ceil_div(stages, k_shares));
  const int64_t clusters = std::max(problem.device.clusters_of(plan.cluster), 1);
  const int64_t rows =
      kernel.tile.row_blocks * plan.input_shares;  // row blocks of a cluster's tile
  plan.row_tiles = static_cast<int>(ceil_div(plan.row_blocks, rows));
  // Whole tiles where there are many, or where a cluster gets fewer pieces that way than in runs: 558 us and 469 at
  // 3584 x 14336, M = 3584, 122 and 101 at 4096 x 4096, 2:4, M = 3072 (H200). Not of blocks that share k: the model then
  // takes pairs with tiles of 256 tokens where runs of one block are 3 to 7% faster.
  const int64_t clusters_each = clusters / plan.token_tiles;  // for one token tile
  const int64_t each = clusters_each ? ceil_div(plan.row_blocks, clusters_each) : plan.row_blocks;
  const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles;
  const int64_t of_whole_tiles = ceil_div(tiles, clusters) * rows;
  if (clusters_each == 0 || each > 4 * rows || (of_whole_tiles < each && k_shares == 1)) {
    plan.token_group = kTokenGroup;
    plan.pieces_per_cluster = static_cast<int>(of_whole_tiles);
    plan.blocks = static_cast<int>(std::min(tiles, clusters)) * plan.cluster;
  } else {
    plan.pieces_per_cluster = static_cast<int>(each);
    plan.runs = static_cast<int>(ceil_div(plan.row_blocks, each));
    plan.blocks = plan.runs * plan.token_tiles * plan.cluster;
  }
  return plan;
}

// A model of the time in microseconds, fitted on an H200 to the times of decode.cpp's model for many tokens. 64
// columns, or 128 of 2:4 weights, cost a tile something of its own and something for each of its pieces, which with
// 256 tokens is what the tensor cores take; few pieces leave warpgroups idle. Every tile has an end. Blocks that share
// a tile's k drain the ring after each tile, and exchange sums.
double estimated_us(const PrefillPlan& plan) {
  constexpr double kStart = 3;
  const PrefillTile& tile = plan.kernel.tile;
  const bool shares_k = plan.cluster > plan.input_shares;
  const auto of_tile = [&](int64_t pieces) {
    if (pieces == 0) return 0.0;
    const auto count = static_cast<double>(pieces);
    const double work = count * tile.tokens;
    const double of_block = tile.sparse         ? std::max(0.18 + 0.175 * count, 0.5)
                            : tile.tokens > 128 ? 0.075 + 0.00106 * work
                                                : 0.13 + 0.058 * count + 0.00055 * work;
    const double exchange = shares_k ? (tile.sparse ? 2 : 4) + 0.02 * tile.tokens + 0.01 * work : 0;
    return plan.stages_per_block * tile.stage_blocks * of_block + 1.5 + 0.2 * count + exchange;
  };
  const int64_t pieces = ceil_div(plan.pieces_per_cluster, plan.input_shares);
  const int64_t whole = pieces / tile.row_blocks;
  return kStart + static_cast<double>(whole) * of_tile(tile.row_blocks) +
         of_tile(pieces % tile.row_blocks);
}

std::optional<PrefillPlan> select_prefill(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  std::optional<PrefillPlan> best;
  for (const PrefillKernel& kernel : prefill_kernels(problem.sparse)) {
    if (!suits(kernel, problem.m)) continue;
    for (int cluster = 1; cluster <= Device::kLargestCluster; ++cluster) {
      if (problem.device.clusters_of(cluster) == 0) continue;
      const PrefillPlan plan = prefill_plan_with(kernel, cluster, 1, problem);
      if (problem.device.clusters_of(plan.cluster) == 0) continue;  // it may have fewer blocks
      if (!best || estimated_us(plan) < estimated_us(*best)) best = plan;
    }
  }
  // Tiles of 256 tokens gain, and 2:4 ones, whose stages bring twice the activations.
  const bool gains = best && (best->kernel.tile.tokens > 128 || problem.sparse);
  if (gains && best->cluster == 1 && problem.m >= kTokensToShare &&
      problem.device.clusters_of(2) > 0) {
    const PrefillPlan shared = prefill_plan_with(best->kernel, 2, 2, problem);
    if (estimated_us(shared) <= estimated_us(*best))
      best = shared;  // pairs may not go round as well
  }
  return best;
}

}  // namespace marlin::plan
