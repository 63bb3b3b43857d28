#include "plan/prefill.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "plan/common.h"

namespace marlin::plan {
namespace {

#define MARLIN_SM90_PREFILL(tokens, row_blocks, stage_blocks, reason) \
  PrefillKernel{0, PrefillTile{tokens, row_blocks, stage_blocks}, reason},
#define MARLIN_SM90_PREFILL_RUNS(tokens, row_blocks, stage_blocks, reason) \
  PrefillKernel{0, PrefillTile{tokens, row_blocks, stage_blocks, false, true}, reason},

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
#undef MARLIN_SM90_PREFILL_RUNS

// Of the tiles done at once, this many share a tile of weights, and on an H200 about as many bytes of
// activations and weights are then in use. From 4 to 16 made no difference beyond the noise; without
// groups, 8192 tokens at 28672 x 4096 took 10% longer.
constexpr int kTokenGroup = 8;
// Of runs, blocks that follow each other are at almost the same columns, and share what the tiles that follow each
// other have in common: activations, up to eight times as many bytes a stage as weights. 1024 x 8192, M = 8192: 204 us, in
// groups of 8 246; 8192 x 8192, M = 3072: 609 and 622 (H200).
constexpr int kTokenGroupOfRuns = 2;

// With so many tokens, pairs of blocks share activations: 720 us instead of 739 at 8192 x 8192, M = 4096
// (H200), 1332 instead of 1363 at 28672 x 4096, and 1976 instead of 2023 there, 2:4, M = 8192; with fewer, and
// with four blocks, it is no faster.
constexpr int64_t kTokensToShare = 4096;

// Whether a kernel is worth a look: of those whose tile takes at most 128 tokens, the one that leaves
// the least room in as few tiles as possible.
bool suits(const PrefillKernel& kernel, const Problem& problem) {
  if (kernel.tile.tokens > 128) return problem.m > 128;
  const int64_t tiles = ceil_div(problem.m, 128), share = ceil_div(problem.m, tiles);
  const auto holds = [&](const PrefillTile& tile) {
    return tile.runs == kernel.tile.runs && tile.tokens >= share;
  };
  const auto kernels = prefill_kernels(problem.sparse);
  return holds(kernel.tile) && std::ranges::none_of(kernels, [&](const PrefillKernel& other) {
           return holds(other.tile) && other.tile.tokens < kernel.tile.tokens;
         });
}

}  // namespace

std::span<const PrefillKernel> prefill_kernels(bool sparse) {
  static const auto dense = numbered(dense_table(), false);
  static const auto sparse_24 = numbered(sparse_table(), true);
  return sparse ? std::span<const PrefillKernel>(sparse_24) : dense;
}

std::string PrefillKernel::name() const {
  return (tile.sparse ? "sm90_prefill_24_t" : "sm90_prefill_t") + std::to_string(tile.tokens) +
         "_r" + std::to_string(tile.rows()) + "_k" + std::to_string(tile.stage_k()) +
         (tile.runs ? "_runs" : "");
}

PrefillPlan prefill_plan_with(const PrefillKernel& kernel, int cluster, const Problem& problem) {
  const PrefillTile& tile = kernel.tile;
  PrefillPlan plan{};
  plan.kernel = kernel;
  plan.period = scale_period(problem);
  plan.row_blocks = static_cast<int>(ceil_div(problem.n, 64));
  plan.token_tiles = static_cast<int>(ceil_div(problem.m, tile.tokens));
  plan.stages = static_cast<int>(ceil_div(problem.k, tile.stage_k()));
  // Each block must have rows, and copy whole swizzle patterns of 8 tokens.
  plan.cluster = tile.runs ? 1 : std::min(cluster, plan.row_blocks);
  while (tile.tokens % (8 * plan.cluster) != 0) --plan.cluster;
  const int64_t rows = int64_t{tile.row_blocks} * plan.cluster;  // row blocks of a cluster's tile
  plan.row_tiles = static_cast<int>(ceil_div(plan.row_blocks, rows));
  const int64_t tiles = int64_t{plan.row_tiles} * plan.token_tiles;
  const int64_t clusters = std::max(problem.device.clusters_of(plan.cluster), 1);
  if (tile.runs) {
    plan.blocks = static_cast<int>(std::min(tiles * plan.stages, clusters));
    const int64_t each = tiles / plan.blocks;
    plan.whole_tiles =
        static_cast<int>(tiles % plan.blocks == 0 ? each : std::max<int64_t>(each - 1, 0));
    plan.token_group = kTokenGroupOfRuns;
    return plan;
  }
  // Whole tiles where there are many, or where a cluster gets fewer pieces that way than in runs: 558 us and 469 at
  // 3584 x 14336, M = 3584, 122 and 101 at 4096 x 4096, 2:4, M = 3072 (H200).
  const int64_t clusters_each = clusters / plan.token_tiles;  // for one token tile
  const int64_t each = clusters_each ? ceil_div(plan.row_blocks, clusters_each) : plan.row_blocks;
  const int64_t of_whole_tiles = ceil_div(tiles, clusters) * rows;
  if (clusters_each == 0 || each > 4 * rows || of_whole_tiles < each) {
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

// A model of the time in microseconds, fitted on an H200 with decode.cpp's for many tokens. 64
// columns, or 128 of 2:4 weights, cost a tile something of its own and something for each of its pieces, which with
// 256 tokens is what the tensor cores take; few pieces leave warpgroups idle. Every tile has an end. Blocks that
// share tiles over memory write sums, and wait for and read those of others; and they are not all at the same
// columns, so that activations which L2 does not hold are read from memory more often.
double estimated_us(const PrefillPlan& plan) {
  constexpr double kStart = 3, kSharing = 4.8, kSender = 1.6, kWholeTile = 0.6;
  constexpr double kPace = 1.025, kPaceFromMemory = 1.045, kHeldByL2 = 40e6;  // bytes
  const PrefillTile& tile = plan.kernel.tile;
  const auto of_stages = [&](double stages, int64_t pieces) {
    const auto count = static_cast<double>(pieces);
    const double work = count * tile.tokens;
    const double of_block = tile.sparse         ? std::max(0.1 + 0.0015 * work, 0.5)
                            : tile.tokens > 128 ? 0.075 + 0.00106 * work
                                                : 0.13 + 0.058 * count + 0.00055 * work;
    return stages * tile.stage_blocks * of_block;
  };
  const auto of_end = [](int64_t pieces) { return 1.5 + 0.2 * static_cast<double>(pieces); };
  const auto of_tile = [&](int64_t pieces) {
    return pieces == 0 ? 0.0 : of_stages(plan.stages, pieces) + of_end(pieces);
  };
  if (tile.runs) {
    const double each = static_cast<double>(plan.row_tiles) * plan.token_tiles / plan.blocks;
    if (!plan.stage_runs().share_tiles()) return kStart + each * of_tile(tile.row_blocks);
    const double whole = std::max(each, 1.0), senders = std::max(1 / each, 1.0);
    const double sharing = kWholeTile * whole + kSharing + kSender * (senders - 1);
    const double activations = 2.0 * tile.tokens * tile.stage_k() * plan.token_tiles * plan.stages;
    return (activations > kHeldByL2 ? kPaceFromMemory : kPace) *
           (kStart + of_stages(std::ceil(each * plan.stages), tile.row_blocks) + sharing);
  }
  const int64_t pieces = ceil_div(plan.pieces_per_cluster, plan.cluster);
  const int64_t whole = pieces / tile.row_blocks;
  return kStart + static_cast<double>(whole) * of_tile(tile.row_blocks) +
         of_tile(pieces % tile.row_blocks);
}

std::optional<PrefillPlan> select_prefill(const Problem& problem) {
  if (!problem.device.wgmma) return std::nullopt;
  std::optional<PrefillPlan> best;
  for (const PrefillKernel& kernel : prefill_kernels(problem.sparse)) {
    if (!suits(kernel, problem)) continue;
    const PrefillPlan plan = prefill_plan_with(kernel, 1, problem);
    if (!best || estimated_us(plan) < estimated_us(*best)) best = plan;
  }
  // Tiles of 256 tokens gain, and 2:4 ones, whose stages bring twice the activations.
  const bool gains =
      best && !best->kernel.tile.runs && (best->kernel.tile.tokens > 128 || problem.sparse);
  if (gains && problem.m >= kTokensToShare && problem.device.clusters_of(2) > 0) {
    const PrefillPlan shared = prefill_plan_with(best->kernel, 2, problem);
    if (estimated_us(shared) <= estimated_us(*best))
      best = shared;  // pairs may not go round as well
  }
  return best;
}

}  // namespace marlin::plan
